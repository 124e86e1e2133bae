"""Ranks that are forked from one process, which has imported all they need: they start in a fraction of a second.

`python forked_ranks.py MODULE.py` reads orders from stdin, one JSON line each, and answers each with a line.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HANGS_AFTER_S = 280  # ranks print where they are and exit
_REPORT_S = 8  # enough for the rank that reports an error to print it


class ForkedRanks:
    """Runs functions of one module on several ranks, which are started as srun would start them."""

    def __init__(self, module: Path) -> None:
        folders = [Path(__file__).parent, module.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        )

    def run(self, function: Callable[..., None], ranks: int, *arguments: object) -> None:
        """Calls a function of the module on every rank; the arguments are passed as text."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        order = [function.__name__, ranks, [str(argument) for argument in arguments]]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        error = json.loads(self._process.stdout.readline())
        assert not error, error

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=60)


def _call(number: int, function: Callable[..., None], world: int, job: int, arguments: list[str]) -> None:
    import torch

    from rank_jobs import as_step

    faulthandler.dump_traceback_later(_HANGS_AFTER_S, exit=True)
    os.environ |= as_step(number, world, str(job))
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except SystemExit:  # another rank reports the cause; the first process that ends makes torch kill the others
        time.sleep(_REPORT_S)
        raise


def _serve(path: Path) -> None:
    from torch.multiprocessing import start_processes

    # Answers have a channel of their own: what the ranks print must not come between.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module: Any = importlib.import_module(path.stem)
    for job, line in enumerate(sys.stdin):
        name, ranks, arguments = json.loads(line)
        error = ""
        try:
            start_processes(_call, (getattr(module, name), ranks, job, arguments), ranks, start_method="fork")
        except Exception:
            error = traceback.format_exc()
        answers.write(json.dumps(error) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
