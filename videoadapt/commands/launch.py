"""Runs stages as SLURM jobs, or as processes of this machine, through submitit.

A job calls `stage.run_stage`, as `srun videoadapt STAGE CONFIG` in `slurm/*.sbatch` does. It carries the config as it
is at submission: if the file changes while the job waits or is requeued, the job does not see the change.

Only the verb `launch` imports this module, because submitit is slow to import.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from videoadapt.commands.failure import FAILURES, fail, is_failure
from videoadapt.commands.stage import Stage, run_stage
from videoadapt.config.load import Config, make_config
from videoadapt.errors import ConfigError, RunError
from videoadapt.runtime.console import say
from videoadapt.runtime.files import Summary
from videoadapt.runtime.slurm import cancel

STAGES: tuple[Stage, ...] = get_args(Stage)
# A shell function that the job's script calls instead of the command of this name; slurm/*.sbatch have it too.
PASS_SIGNALS_ON = """\
# A signal to this shell alone (scancel --batch --signal=USR2) would end the job. It is passed on to srun, which sends
# it to all tasks. A shell handles signals between two commands and in `wait`, so srun runs in the background.
srun() {
    local step= code=0 again passed=
    trap 'passed=1; kill -USR1 "$step"' USR1
    trap 'passed=1; kill -USR2 "$step"' USR2
    command srun "$@" &
    step=$!
    wait "$step" || code=$?
    while [[ $passed ]]; do  # the signal has ended `wait`, while srun still runs
        passed= again=0
        wait "$step" || again=$?
        ((again == 127)) || code=$again  # 127: srun had ended already, and its code is known
    done
    return "$code"
}
"""
_NO_LIMIT_MINUTES = 366 * 24 * 60  # submitit's local executor needs a limit: a year
_SQUEUE_EVERY_S = 60  # how often a handle asks SLURM for the state of its job, unless forced


@dataclass(frozen=True)
class Job:
    """A job to submit: a stage on `nodes * tasks_per_node` ranks, or an array of `shards` such jobs."""

    stage: Stage
    nodes: int
    tasks_per_node: int
    shards: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks of the job; of an array, ranks of each of its jobs."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, or, on this machine, has run."""

    stage: Stage
    id: str
    ranks: int
    shards: int
    log: str  # path of the log file; of an array, a pattern
    sbatch: str  # the equivalent sbatch command; empty on this machine


@dataclass(frozen=True)
class LaunchResult:
    """The result of `launch`."""

    cluster: str  # "slurm" or "local"
    jobs: list[Submission]


def launch(config: Config, words: Sequence[str]) -> LaunchResult:
    """Submits the jobs of `launch.stage`. Each job starts when the job before it has succeeded.

    With `launch.cluster=slurm`, returns as soon as all jobs are submitted. If SLURM refuses one, the jobs before it
    are cancelled. With `launch.cluster=local`, runs the jobs here, one after the other, and returns after the last.

    Args:
        config: The config of the run.
        words: The config file and the overrides as the user gave them. They appear in the equivalent sbatch commands.

    Raises:
        ConfigError: `launch.cluster=local` with more than one node.
        RunError: SLURM refuses a job, or a job fails on this machine.
    """
    jobs = jobs_of(config)
    submitted = _run_here(jobs, config) if config.launch.cluster == "local" else _submit_all(jobs, config, words)
    return LaunchResult(config.launch.cluster, submitted)


def jobs_of(config: Config) -> list[Job]:
    """Returns the jobs of `launch.stage` in their order.

    With `launch.shards` > 1 on SLURM, `label` and `evaluate` take two jobs each: an array that scores the shards, and
    a job that merges the scores. On one machine an array gains nothing, so there is none.
    """
    arrays = config.launch.shards > 1 and config.launch.cluster == "slurm"
    stages = STAGES if config.launch.stage == "all" else (config.launch.stage,)
    jobs: list[Job] = []
    for stage in stages:
        if stage in ("label", "evaluate") and arrays:
            jobs += [Job(stage, 1, 1, config.launch.shards), Job(stage, 1, 1)]
        elif stage == "assign":  # the assigner is small: it trains on one rank
            jobs.append(Job(stage, 1, 1))
        else:
            jobs.append(Job(stage, config.slurm.nodes, config.slurm.tasks_per_node))
    return jobs


def sbatch_options(job: Job, config: Config) -> dict[str, str]:
    """Returns the sbatch options of a job, without their dashes. An empty value marks an option that takes none."""
    slurm = config.slurm
    options = {
        "job-name": f"videoadapt-{job.stage}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "comment": slurm.comment,
        "time": slurm.time_minutes,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "gpus-per-task": slurm.gpus_per_task or None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem_gb and f"{slurm.mem_gb}G",
        "signal": f"USR2@{slurm.signal_s}",  # sent to the ranks before the time limit; see `run_stage`
        "requeue": "",  # after preemption or the failure of a node
        "open-mode": "append",  # a requeued job keeps the log of its earlier starts
        "array": f"0-{job.shards - 1}" if job.shards > 1 else None,
    }
    return {option: str(value) for option, value in options.items() if value is not None}


def sbatch_line(job: Job, config: Config, words: Sequence[str], after: str | None) -> str:
    """Returns the shell command that submits the same job by hand.

    The lines of `slurm.setup` are missing, because sbatch has no option for them: they belong into the sbatch file.

    Args:
        job: The job.
        config: The config of the run.
        words: The config file and the overrides.
        after: The id of the job that must succeed first, if there is one.
    """
    no_gpu = {"gpus-per-task": "0"}  # the sbatch file asks for one GPU, which the command must be able to revoke
    options = no_gpu | sbatch_options(job, config) | _dependency(after)
    flags = [f"--{option}={value}" if value else f"--{option}" for option, value in options.items()]
    return shlex.join(["sbatch", *flags, f"slurm/{job.stage}.sbatch", *words])


def submit(job: Job, config: Config, after: str | None = None) -> list[submitit.Job[Summary]]:
    """Submits a job to SLURM.

    Args:
        job: The job.
        config: The config of the run.
        after: The id of the job that must succeed first, if there is one.

    Returns:
        The handle of the job; of an array, one handle per shard. They know the state of the job without sacct.

    Raises:
        RunError: SLURM refuses the job, or is not installed.
    """
    shards = [None] if job.shards == 1 else list(range(job.shards))
    calls = [StageCall(job, config, shard) for shard in shards]
    try:
        executor = SqueueExecutor(folder=_job_folder(config) / "%j")
        executor.update_parameters(**_submitit_parameters(job, config, after))
        return executor.submit_array(calls)
    except (RuntimeError, OSError, FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"{job.stage} cannot be submitted: {error}") from error


class StageCall:
    """The function that submitit pickles and a job calls: a stage with its config."""

    def __init__(self, job: Job, config: Config, shard: int | None = None) -> None:
        parallel = {"ranks": job.ranks, "shard": None if shard is None else f"{shard}/{job.shards}"}
        self.stage = job.stage
        self.values = config.model_dump(mode="json")  # plain values: a pickled Config would tie the job to its class
        self.values["parallel"] |= parallel

    def __call__(self) -> Summary:
        """Runs the stage and returns its summary.

        Raises:
            SystemExit: The stage failed by an error of the user or of the machine, which was printed as one line.
                submitit would print the traceback of any other exception.
        """
        try:
            return run_stage(self.stage, make_config(self.values, "the config at submission"))
        except FAILURES as error:
            if not is_failure(error):
                raise
            fail(error)


def _submit_all(jobs: Sequence[Job], config: Config, words: Sequence[str]) -> list[Submission]:
    """Submits jobs that depend on each other; cancels them all if one is refused."""
    submitted: list[Submission] = []
    before: str | None = None
    try:
        for job in jobs:
            line = sbatch_line(job, config, words, before)
            handles = submit(job, config, before)
            before = handles[0].job_id.split("_")[0]  # 7 of 7_0: the next job waits for the whole array
            log = handles[0].paths.stdout if job.shards == 1 else _job_folder(config) / f"{before}_*" / "*.out"
            submitted.append(Submission(job.stage, before, job.ranks, job.shards, str(log), line))
    except (RunError, KeyboardInterrupt):
        if submitted:
            say(_cancel_all(submitted))
        raise
    return submitted


def _cancel_all(submitted: Sequence[Submission]) -> str:
    """Cancels the jobs of an incomplete chain; returns a message with the outcome."""
    names = ", ".join(f"{job.stage} {job.id}" for job in submitted)
    try:
        cancel([job.id for job in submitted])
    except RunError as error:
        return f"already submitted: {names}; {error}"
    return f"cancelled, because the chain cannot be completed: {names}"


def _submitit_parameters(job: Job, config: Config, after: str | None) -> dict[str, Any]:
    """Returns `sbatch_options` as the parameters of submitit, which has its own names for some options."""
    options = sbatch_options(job, config) | _dependency(after)
    for option in ("job-name", "nodes", "ntasks-per-node", "time", "signal", "open-mode", "array"):
        options.pop(option, None)
    return {
        "job_name": f"videoadapt-{job.stage}",
        "nodes": job.nodes,
        "ntasks_per_node": job.tasks_per_node,
        "time": config.slurm.time_minutes,
        "signal_delay_s": config.slurm.signal_s,
        "setup": [*config.slurm.setup, *PASS_SIGNALS_ON.splitlines()],
        # When one rank fails, srun ends the others. Since SLURM 22.05, srun does not inherit sbatch's CPUs per task.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={config.slurm.cpus_per_task}"],
        "additional_parameters": {option: value or True for option, value in options.items()},
    }


def _dependency(after: str | None) -> dict[str, str]:
    # kill-on-invalid-dep: without it, a job whose predecessor has failed stays in the queue for ever.
    return {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"} if after else {}


def _run_here(jobs: Sequence[Job], config: Config) -> list[Submission]:
    """Runs jobs one after the other as processes of this machine."""
    done = []
    for job in jobs:
        if job.nodes > 1:
            raise ConfigError(f"slurm.nodes is {job.nodes}; with launch.cluster=local it must be 1, this machine")
        executor = submitit.LocalExecutor(folder=_job_folder(config) / "%j")
        executor.update_parameters(
            tasks_per_node=job.tasks_per_node,
            gpus_per_node=job.tasks_per_node * config.slurm.gpus_per_task,
            timeout_min=_NO_LIMIT_MINUTES,
        )
        handle = executor.submit(StageCall(job, config))
        say(f"{job.stage}: {job.ranks} ranks; log: {handle.paths.stdout}")
        try:
            handle.results()
        except (FailedJobError, UncompletedJobError) as error:
            raise RunError(_why_failed(job, handle)) from error
        except KeyboardInterrupt:
            handle.cancel()  # the job has its own process group, which Ctrl-C does not reach
            raise
        done.append(Submission(job.stage, handle.job_id, job.ranks, job.shards, str(handle.paths.stdout), ""))
    return done


def _why_failed(job: Job, handle: submitit.Job[Summary]) -> str:
    """Returns the error that a rank of a job on this machine has printed, and its log."""
    for log in sorted(handle.paths.folder.glob("*_log.err")):  # one for each rank
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"error( on rank \d+ of \d+)?: ", line)]
        if errors:
            return f"{job.stage} failed: {errors[-1].partition(': ')[2]} (log: {log})"
    return f"{job.stage} failed; see {handle.paths.stderr}"


def _job_folder(config: Config) -> Path:
    return config.run.dir.absolute() / "jobs"


# submitit asks sacct for the states of jobs. sacct needs a database, which small clusters do not have. The classes
# below ask squeue instead.


class SqueueWatcher(SlurmInfoWatcher):
    """Asks squeue for the states of all jobs at once."""

    def _make_command(self) -> list[str] | None:
        jobs = sorted({job.split("_")[0] for job in self._registered - self._finished})
        return ["squeue", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%N"] if jobs else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Returns state and nodes by job id, from the output of squeue."""
        text = string if isinstance(string, str) else string.decode()
        _, *lines = text.splitlines()
        return super().read_info("\n".join(["JobID|State|NodeList", *lines]))  # the header that sacct prints


class SqueueJob(SlurmJob[Any]):
    """A job that asks squeue for its state."""

    watcher = SqueueWatcher(delay_s=_SQUEUE_EVERY_S)


class SqueueExecutor(SlurmExecutor):
    """Submits jobs as `SqueueJob`."""

    job_class = SqueueJob

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Any]:
        jobs = super()._internal_process_submissions(delayed_submissions)
        # submitit ignores `job_class` for the jobs of an array, and makes them as its own class.
        return [SqueueJob(self.folder, job.job_id, tasks=list(range(job.num_tasks))) for job in jobs]
