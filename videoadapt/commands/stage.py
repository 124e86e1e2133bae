"""Runs one stage as a job, and handles the signals that SLURM sends to the job.

The command line, `srun` and submitit all call `run_stage`. This module imports no stage at its head: importing torch
takes seconds, and a signal that arrives in them would kill the job. The handlers are installed first.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from videoadapt.config.jobs import JobConfig, Stage
from videoadapt.config.load import Config
from videoadapt.errors import RunError, one_line, plural
from videoadapt.runtime.console import say
from videoadapt.runtime.files import replacing
from videoadapt.runtime.results import Result, ShardResult
from videoadapt.runtime.run_config import say_other_parts
from videoadapt.runtime.signals import JOB_SIGNALS, WARNINGS, Stopped, StopRequest
from videoadapt.runtime.slurm import SlurmJob, rank_env, requeue, slurm_job

# The files that a stage leaves behind when it gets on, by name and size: what another start need not do again.
_PROGRESS = ("probed.jsonl", "manifest.parquet", "checkpoints/step-*", "assigner/*", "scores/*/part-*")
_END_TIMEOUT_S = 600.0  # SLURM kills a job sooner: its grace time is rarely more than a few minutes
_TERMINATED = 128 + signal.SIGTERM  # the exit code of a process that SIGTERM ended


def has_assigner(config: Config) -> bool:
    """Returns whether a run has points to choose from, and clips to label.

    The costliest point alone says nothing about the clips that it was trained on: labels of source `teacher` need a
    holdout. `videoadapt new` writes such a config where clips are too few for an assigner.
    """
    return len(config.model.points) > 1 and (config.data.holdout > 0 or config.label.source != "teacher")


def run_stage(stage: Stage, config: Config, policies: Sequence[str] = ()) -> Result:
    """Runs a stage to its end. In a SLURM job, a signal makes the stage save first.

    - SIGUSR1 or SIGUSR2 (the time limit is near): rank 0 requeues the job, at most `slurm.max_restarts` times. If two
      starts have saved nothing, it ends the job: a third would not get further.
    - SIGTERM (preemption): SLURM itself requeues the job. This process waits until SLURM ends it, because a job that
      ends by itself counts as completed.

    In a rank of `launch.cluster=local`, a signal makes the stage save and end.

    Args:
        stage: The stage to run.
        config: The config of the run.
        policies: Texts or files of further policies, for `evaluate`.

    Returns:
        The result of the stage.

    Raises:
        SystemExit: The job was requeued or preempted. The exit code is 143.
        RunError: The job has no restarts left, two of its starts made no progress, or the stage failed.
        UserError: The config or the input of the stage is wrong.
        KeyboardInterrupt: Ctrl-C; outside a SLURM job also the other signals.
    """
    job, options = slurm_job(os.environ), config.slurm.of(stage)
    if job is not None and job.restarts > options.max_restarts:  # SLURM also requeues after a node has failed
        raise RunError(_out_of_restarts(job, options))
    if job is not None:
        # Some ranks end the stage before others. A warning that arrives after the end must not kill them.
        for number in WARNINGS:
            signal.signal(number, signal.SIG_IGN)
    with StopRequest(_signals_to_save_at(job)):
        try:
            function = _function(stage)
            if stage != "train":
                say_other_parts(config, stage)
            result = function(config, policies) if policies else function(config)
            if stage == "train" and rank_env(os.environ).rank == 0:
                draw_new_curves(config.run.dir)
            if stage == "evaluate" and rank_env(os.environ).rank == 0 and not isinstance(result, ShardResult):
                draw_figures_of_evaluation(config.run.dir)
            if job is not None and rank_env(os.environ).rank == 0:
                _restart_file(job, config.run.dir).unlink(missing_ok=True)
            return result
        except Stopped as stopped:
            if job is None or stopped.signal not in JOB_SIGNALS:
                raise
            warned = stopped.signal in WARNINGS
        # After the `except`, whose exception would keep the stage's workers alive. Workers get the next signals too.
        _wait_for_end(job, warned, config.run.dir, options)


def _signals_to_save_at(job: SlurmJob | None) -> tuple[signal.Signals, ...]:
    if job is not None:
        return JOB_SIGNALS
    # A rank of a local launch starts with SIGINT ignored, and with a handler of submitit that ignores SIGTERM.
    return (signal.SIGINT, *JOB_SIGNALS) if rank_env(os.environ).launcher == "submitit" else ()


class CurvesWhileTraining:
    """Draws the curves of a training that goes on, after a validation: the first time after a minute.

    It draws again when the last drawing took at most a fiftieth of the time since.

    Args:
        run: The run folder.
        first_s: Seconds before the first drawing: a short training needs none before its end.
    """

    def __init__(self, run: Path, first_s: float = 60.0) -> None:
        self.run, self._next_at = run, time.monotonic() + first_s

    def __call__(self) -> None:
        """Draws, if it is time. An error is printed: it does not end the training."""
        started = time.monotonic()
        if started < self._next_at:
            return
        from videoadapt.reporting.plots import draw_curves  # here, since importing matplotlib takes a second

        try:
            draw_curves(self.run)
        except Exception as error:
            say(f"curves: not drawn while training ({type(error).__name__}: {one_line(error)})")
        self._next_at = time.monotonic() + 50 * (time.monotonic() - started)


def draw_new_curves(run: Path) -> None:
    """Draws the curves of a training that has just ended; an old training has them already."""
    curves, summary = run / "curves.png", run / "train.json"
    if not summary.exists() or (curves.exists() and curves.stat().st_mtime >= summary.stat().st_mtime):
        return
    from videoadapt.reporting.plots import draw_curves  # here, since importing matplotlib takes a second

    say(f"curves: {draw_curves(run)}")


def draw_figures_of_evaluation(run: Path) -> None:
    """Draws accuracy against cost, and the confusions, of an evaluation that has just ended."""
    from videoadapt.reporting.plots import draw_evaluation  # here, since importing matplotlib takes a second

    files = [file for file in draw_evaluation(run) if not file.stem.endswith("_dark")]
    say(f"figures: {', '.join(map(str, files))} (also as *_dark.png)")


def _function(stage: Stage) -> Callable[..., Result]:
    """Imports a stage and returns its function."""
    if stage == "train":
        from videoadapt.training.train import train

        return lambda config: train(config, CurvesWhileTraining(config.run.dir))
    if stage == "label":
        from videoadapt.routing.label import label

        return label
    if stage == "assign":
        from videoadapt.routing.fit_assigner import assign

        return assign
    if stage == "calibrate":
        from videoadapt.routing.calibrate import calibrate

        return calibrate
    from videoadapt.evaluation.evaluate import evaluate

    return evaluate


def _wait_for_end(job: SlurmJob, warned: bool, run: Path, options: JobConfig) -> NoReturn:
    """Requeues a warned job, then waits until SLURM ends this process.

    A process that ends earlier counts as failed or as completed, and `srun` then ends the other ranks with it.
    """
    if warned and job.restarts >= options.max_restarts:
        raise RunError(_out_of_restarts(job, options))
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    if not warned:
        say(f"job {job.id} is preempted: saved, waiting for the end")
    elif rank_env(os.environ).rank == 0:  # one rank requeues for all
        _require_progress(job, run, options)
        requeue(job.id)
        say(f"job {job.id} is near its time limit: saved and requeued (restart {job.restarts + 1})")
    deadline = time.monotonic() + _END_TIMEOUT_S
    while not received and time.monotonic() < deadline:
        time.sleep(0.5)  # polled: a signal that another thread receives does not interrupt the sleep
    raise SystemExit(_TERMINATED)


def _require_progress(job: SlurmJob, run: Path, options: JobConfig) -> None:
    """Records the progress of this start of a job, and raises `RunError` if the start before it got as far."""
    file, reached = _restart_file(job, run), progress_of(run)
    with suppress(OSError):  # the first start
        if file.read_text(encoding="utf-8") == reached:
            raise RunError(
                f"job {job.id} has saved nothing new in its last two starts: its time limit (slurm.time_minutes, now "
                f"{options.time_minutes}) is shorter than its start-up, or slurm.signal_s "
                f"({options.signal_s}) leaves no time. Raise the limit and submit again; what is saved is intact"
            )
    with replacing(file) as temporary:
        temporary.write_text(reached, encoding="utf-8")


def progress_of(run: Path) -> str:
    """Returns 64 hex digits that change whenever a stage saves something that its next start need not do again."""
    files = sorted(path for pattern in _PROGRESS for path in run.glob(pattern))
    listed = [f"{path.relative_to(run)} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def _restart_file(job: SlurmJob, run: Path) -> Path:
    return run / "restarts" / job.id


def _out_of_restarts(job: SlurmJob, options: JobConfig) -> str:
    return (
        f"job {job.id} was restarted {plural(job.restarts, 'time')}, and slurm.max_restarts is {options.max_restarts}. "
        "Everything saved is intact: submit the job again to continue"
    )
