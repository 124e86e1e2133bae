"""Starts the ranks of a program as processes of this machine, with the environment of srun but without SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

JOIN_S = 60.0  # ranks import torch first, which is slow on a busy machine
HEAD = """
import os, sys, time
from pathlib import Path
from videoadapt.config.load import make_config
from videoadapt.runtime.ranks import all_gather, any_requested, broadcast_result, rank, rank0_then_all, ranks
from videoadapt.runtime.ranks import wait_for_all, world_size
from videoadapt.runtime.signals import StopRequest

folder = Path(sys.argv[1])
config = make_config({"run": {"dir": str(folder), "device": "cpu"}, "parallel": {"join_s": float(sys.argv[2])}})
"""


def as_step(rank: int, world: int, job: str = "7") -> dict[str, str]:
    """Returns the environment variables that srun sets for a task."""
    numbers = {"STEP_NUM_TASKS": world, "NTASKS": world, "PROCID": rank, "LOCALID": rank, "STEP_ID": 0}
    return {"SLURM_JOB_ID": job, **{f"SLURM_{name}": str(number) for name, number in numbers.items()}}


class Ranks:
    """The ranks of a program. The program is source code that follows `HEAD`."""

    def __init__(
        self, program: str, folder: Path, world: int, *, started: list[int] | None = None, join_s: float = JOIN_S
    ) -> None:
        self.since = time.monotonic()
        self.processes = {
            rank: subprocess.Popen(
                [sys.executable, "-c", HEAD + program, str(folder), str(join_s)],
                env=os.environ | as_step(rank, world),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (range(world) if started is None else started)
        }

    def ended(self, timeout_s: float = 100.0) -> dict[int, tuple[int, str]]:
        """Waits until all ranks have ended; returns exit code and standard error by rank."""
        try:
            errors = {rank: process.communicate(timeout=timeout_s)[1] for rank, process in self.processes.items()}
            return {rank: (process.returncode, errors[rank]) for rank, process in self.processes.items()}
        finally:
            for process in self.processes.values():
                process.kill()
