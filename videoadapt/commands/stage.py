"""A stage as a job: what a verb, `srun` and submitit all call, and what becomes of a job that is told to stop.

Imports no stage before the handlers of the job's signals are installed: importing torch takes seconds, in which a
signal would kill the job for good.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from videoadapt.config.load import Config
from videoadapt.errors import RunError
from videoadapt.runtime.console import say
from videoadapt.runtime.signals import JOB_SIGNALS, WARNINGS, Stopped, StopRequest
from videoadapt.runtime.slurm import SlurmJob, rank_env, requeue, slurm_job

Stage = Literal["train", "label", "assign", "evaluate"]

_KILLED_WITHIN_S = 600.0  # clusters grant less
_TERMINATED = 128 + signal.SIGTERM  # exit code


def run_stage(stage: Stage, config: Config) -> dict[str, Any]:
    """Runs a stage to its end and returns its summary; in a SLURM job, signals make it save first.

    Near its time limit (SIGUSR1, SIGUSR2) the job is then requeued, at most `slurm.max_restarts` times: `SystemExit`,
    or `RunError` after the last. At preemption (SIGTERM) it waits for its end, after which SLURM requeues it: a job
    that ended by itself would count as completed.
    """
    job = slurm_job(os.environ)
    if job is not None and job.restarts > config.slurm.max_restarts:
        raise RunError(_out_of_restarts(job, config))
    if job is not None:
        for number in WARNINGS:  # one that comes after the stage has ended, on some ranks first, must not kill it
            signal.signal(number, signal.SIG_IGN)
    with StopRequest(JOB_SIGNALS if job is not None else ()):
        try:
            return _function(stage)(config)
        except Stopped as stopped:
            if job is None or stopped.signal not in JOB_SIGNALS:
                raise
            warned = stopped.signal in WARNINGS
        # Outside the `except`, which would keep the stage's workers alive: they get the signals that follow.
        _leave(job, warned, config)


def _function(stage: Stage) -> Callable[[Config], dict[str, Any]]:
    if stage == "train":
        from videoadapt.training.train import train

        return train
    if stage == "label":
        from videoadapt.routing.label import label

        return label
    if stage == "assign":
        from videoadapt.routing.fit_assigner import assign

        return assign
    from videoadapt.evaluation.evaluate import evaluate

    return evaluate


def _leave(job: SlurmJob, warned: bool, config: Config) -> NoReturn:
    """Waits until SLURM ends this process: one that ends before has failed, or completed, and takes the job along."""
    if warned and job.restarts >= config.slurm.max_restarts:
        raise RunError(_out_of_restarts(job, config))
    ends: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ends.append(number))
    if not warned:
        say(f"job {job.id} loses its nodes: saved, waiting for the end")
    elif rank_env(os.environ).rank == 0:
        requeue(job.id)
        say(f"job {job.id} is near its time limit: saved and requeued (restart {job.restarts + 1})")
    deadline = time.monotonic() + _KILLED_WITHIN_S
    while not ends and time.monotonic() < deadline:
        time.sleep(0.5)  # which a signal that another thread gets does not end
    raise SystemExit(_TERMINATED)


def _out_of_restarts(job: SlurmJob, config: Config) -> str:
    return (
        f"job {job.id} was restarted {job.restarts} times and may not be again (slurm.max_restarts "
        f"{config.slurm.max_restarts}); what is saved is intact: submit it again to go on"
    )
