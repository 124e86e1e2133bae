"""Runs the ranks of a test program as processes of this machine, with the environment that srun would give them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

JOIN_S = 60.0  # enough for a rendezvous on a busy machine
HEAD = """
import os, sys, time
preloaded = "torch.distributed" in sys.modules
from pathlib import Path
from videoadapt.config.load import make_config
from videoadapt.runtime.ranks import all_gather, any_requested, broadcast_result, rank, ranks
from videoadapt.runtime.ranks import wait_for_all, world_size
from videoadapt.runtime.signals import StopRequest

folder = Path(sys.argv[1])
config = make_config({"run": {"dir": str(folder), "device": "cpu"}, "parallel": {"join_s": float(sys.argv[2])}})
"""

# The imports take seconds. Of our own modules only `config` is there: `runtime.console` reads the rank at its import.
_PRELOADED = (
    *("torch.distributed", "torchvision", "timm", "pandas", "pydantic", "rich.progress", "scipy.stats"),
    "videoadapt.config.load",
)
_FORK_SERVER = multiprocessing.get_context("forkserver")


@contextmanager
def torch_server() -> Iterator[None]:
    """Replaces multiprocessing's fork server in a `with` block by one that has imported torch.

    A process has one fork server. `index()` starts it too, without torch.
    """
    end_server()
    _FORK_SERVER.set_forkserver_preload(list(_PRELOADED))
    try:
        first = _FORK_SERVER.Process(target=int)
        first.start()
        first.join()  # the imports, which are no part of the time of a job
        yield
    finally:
        end_server()


def end_server() -> None:
    """Ends multiprocessing's fork server; the next process begins another."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:  # by itself, it would wait until all of its processes have ended
        os.kill(server._forkserver_pid, signal.SIGKILL)
    server._stop()


def as_step(rank: int, world: int, job: str = "7") -> dict[str, str]:
    """Returns the environment variables that srun gives to a task."""
    numbers = {"STEP_NUM_TASKS": world, "NTASKS": world, "PROCID": rank, "LOCALID": rank, "STEP_ID": 0}
    return {"SLURM_JOB_ID": job, **{f"SLURM_{name}": str(number) for name, number in numbers.items()}}


def _run_rank(program: str, arguments: list[str], environment: dict[str, str], stderr: Path) -> None:
    os.environ.clear()  # the server's environment is that of the first job
    os.environ.update(environment)
    # Processes of this context would start theirs from the server, too, without what the program patches.
    multiprocessing.set_start_method("fork", force=True)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["program", *arguments]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(program, "program", "exec"), namespace)
    finally:
        _save_coverage()


def _save_coverage() -> None:
    """A forked process ends without the exit handlers of the interpreter, one of which would save the coverage."""
    try:
        from coverage import Coverage
    except ImportError:
        return
    if current := Coverage.current():
        current.stop()
        current.save()


class Ranks:
    """The running ranks of a job. The test needs the fixture `rank_server`.

    Args:
        program: Python code that follows `HEAD`.
        folder: The run folder.
        world: The number of ranks of the job.
        started: The ranks to start; None = all.
        join_s: `parallel.join_s`.
    """

    def __init__(
        self, program: str, folder: Path, world: int, *, started: list[int] | None = None, join_s: float = JOIN_S
    ) -> None:
        self.since = time.monotonic()
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        self._logs = {rank: logs / f"{time.monotonic_ns()}-{rank}" for rank in range(world)}
        self.processes = {
            rank: _FORK_SERVER.Process(
                target=_run_rank,
                args=(
                    HEAD + program,
                    [str(folder), str(join_s)],
                    os.environ | as_step(rank, world),
                    self._logs[rank],
                ),
            )
            for rank in (range(world) if started is None else started)
        }
        for process in self.processes.values():
            process.start()

    def ended(self, timeout_s: float = 240.0, only: Iterable[int] | None = None) -> dict[int, tuple[int, str]]:
        """Waits until the ranks have ended; kills all ranks.

        Args:
            timeout_s: How long they may take.
            only: The ranks to wait for; None = all.

        Returns:
            Exit code and standard error of each of these ranks.

        Raises:
            TimeoutError: A rank has not ended in time.
        """
        deadline = time.monotonic() + timeout_s
        results = {}
        try:
            for rank in self.processes if only is None else only:
                self.processes[rank].join(max(0.0, deadline - time.monotonic()))
                code = self.processes[rank].exitcode
                if code is None:
                    raise TimeoutError(f"rank {rank} has not ended within {timeout_s:g} s")
                results[rank] = code, self._logs[rank].read_text(errors="replace")
        finally:
            for process in self.processes.values():
                process.kill()
                process.join()
        return results
