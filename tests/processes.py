"""Starts programs as processes, alone or on several ranks. No process outlives its test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

TORCHRUN_ENDS_S = 60.0  # torchrun gives its ranks 30 s before it kills them


def torchrun(ranks: int, *words: object) -> list[str]:
    """Returns the command that starts `python WORDS` on several ranks of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, *map(str, words)]


def finished(line: Sequence[str], timeout_s: float = 240.0, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end. After a timeout it terminates torchrun, which ends its ranks; a kill orphans them."""
    with subprocess.Popen(  # type: ignore[call-overload]
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except BaseException:
            process.terminate()
            try:
                process.communicate(timeout=TORCHRUN_ENDS_S)
            finally:
                process.kill()
            raise
    return subprocess.CompletedProcess(line, process.returncode, out, errors)
