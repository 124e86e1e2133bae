"""Stages as jobs of SLURM, or of this machine, through submitit.

What is submitted is `jobs.run_stage`, as `srun videoadapt STAGE CONFIG` in `slurm/*.sbatch` calls it. The config is
kept as it is at submission: a job that waits or comes back does not see later changes of the file.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from videoadapt.commands.stage import Stage, run_stage
from videoadapt.config.load import Config, make_config
from videoadapt.errors import ConfigError, RunError
from videoadapt.runtime.console import print_table, say
from videoadapt.runtime.slurm import cancel

if TYPE_CHECKING:
    import submitit

STAGES: tuple[Stage, ...] = get_args(Stage)
_NO_LIMIT_MINUTES = 366 * 24 * 60


@dataclass(frozen=True)
class Job:
    """One submission: a stage on `nodes * tasks_per_node` ranks, or, with `shards`, an array of as many jobs."""

    stage: Stage
    nodes: int
    tasks_per_node: int
    shards: int = 1

    @property
    def ranks(self) -> int:
        """Ranks of the job, or of each job of the array."""
        return self.nodes * self.tasks_per_node


def jobs_of(config: Config) -> list[Job]:
    """The submissions of `launch.stage`, each of which needs the one before it.

    With `launch.shards`, label and evaluate are two: an array that scores, and a job that puts the scores together.
    One machine gains nothing from an array, and runs none.
    """
    arrays = config.launch.shards > 1 and config.launch.cluster == "slurm"
    stages = STAGES if config.launch.stage == "all" else (config.launch.stage,)
    jobs: list[Job] = []
    for stage in stages:
        if stage in ("label", "evaluate") and arrays:
            jobs += [Job(stage, 1, 1, config.launch.shards), Job(stage, 1, 1)]
        elif stage == "assign":
            jobs.append(Job(stage, 1, 1))
        else:
            jobs.append(Job(stage, config.slurm.nodes, config.slurm.tasks_per_node))
    return jobs


def sbatch_options(job: Job, config: Config) -> dict[str, str]:
    """What a job asks sbatch for, by option; an empty value stands for an option that takes none."""
    slurm = config.slurm
    asked = {
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
        "signal": f"USR2@{slurm.signal_s}",
        "requeue": "",
        "open-mode": "append",
        "array": f"0-{job.shards - 1}" if job.shards > 1 else None,
    }
    return {option: str(value) for option, value in asked.items() if value is not None}


def sbatch_line(job: Job, config: Config, words: Sequence[str], after: str | None) -> str:
    """The command that submits the same by hand; `words` are the config file and overrides, `after` a job's id.

    Lines of `slurm.setup` have no option: they go into the file.
    """
    no_gpu = {"gpus-per-task": "0"}  # the file asks for one
    options = no_gpu | sbatch_options(job, config) | _chained(after)
    flags = [f"--{option}={value}" if value else f"--{option}" for option, value in options.items()]
    return shlex.join(["sbatch", *flags, f"slurm/{job.stage}.sbatch", *words])


def launch(config: Config, words: Sequence[str]) -> dict[str, Any]:
    """Submits the jobs of `launch.stage`, each to start when the one before it has succeeded.

    `words` are the config file and overrides as given, for the equivalent sbatch lines. On SLURM it returns at once
    with ids, log files and these lines; if one is refused, those before it are cancelled. With `launch.cluster=local`
    the jobs run here one after the other, and it returns when they are done. Raises `ConfigError` or `RunError`.
    """
    jobs = jobs_of(config)
    submitted = _run_here(jobs, config) if config.launch.cluster == "local" else _submit_all(jobs, config, words)
    return {"cluster": config.launch.cluster, "jobs": submitted}


def print_launch(result: dict[str, Any]) -> None:
    """Ids, log files, and the sbatch lines."""
    rows = [(job["stage"], job["id"], job["ranks"], job["shards"], job["log"]) for job in result["jobs"]]
    print_table("Jobs", ("stage", "id", "ranks", "shards", "log"), rows)
    for job in result["jobs"]:
        if job["sbatch"]:
            print(job["sbatch"])


class StageCall:
    """What submitit carries to the job: a stage and its config."""

    def __init__(self, job: Job, config: Config, shard: int | None = None) -> None:
        parallel = {"ranks": job.ranks, "shard": None if shard is None else f"{shard}/{job.shards}"}
        self.stage = job.stage
        self.values = config.model_dump(mode="json")
        self.values["parallel"] |= parallel

    def __call__(self) -> dict[str, Any]:
        """Runs the stage."""
        return run_stage(self.stage, make_config(self.values, "the config at submission"))


def _submit_all(jobs: Sequence[Job], config: Config, words: Sequence[str]) -> list[dict[str, Any]]:
    submitted: list[dict[str, Any]] = []
    before: str | None = None
    try:
        for job in jobs:
            line = sbatch_line(job, config, words, before)
            handles = submit(job, config, before)
            before = handles[0].job_id.split("_")[0]  # of the array, not of its first job
            log = handles[0].paths.stdout if job.shards == 1 else _folder(config) / f"{before}_*" / "*.out"
            submitted.append(_told(job, before, log, line))
    except (RunError, KeyboardInterrupt):
        if submitted:
            say(_withdrawn(submitted))
        raise
    return submitted


def _withdrawn(submitted: Sequence[dict[str, Any]]) -> str:
    """Cancels the jobs of a chain that cannot be completed, and says what became of them."""
    named = ", ".join(f"{job['stage']} {job['id']}" for job in submitted)
    try:
        cancel([job["id"] for job in submitted])
    except RunError as error:
        return f"already submitted: {named}; {error}"
    return f"cancelled, as the chain cannot be completed: {named}"


def submit(job: Job, config: Config, after: str | None = None) -> list[submitit.Job[dict[str, Any]]]:
    """Submits one job, or the jobs of an array, to SLURM. Raises `RunError` where it is refused.

    The handles know the state of their jobs also where SLURM keeps no accounts.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    pass

    calls = [StageCall(job, config)] if job.shards == 1 else [StageCall(job, config, i) for i in range(job.shards)]
    try:
        executor = SqueueExecutor(folder=_folder(config) / "%j")
        executor.update_parameters(**_submitit_parameters(job, config, after))
        return executor.submit_array(calls)
    except (RuntimeError, OSError, FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"{job.stage} cannot be submitted: {error}") from error


def _submitit_parameters(job: Job, config: Config, after: str | None) -> dict[str, Any]:
    """`sbatch_options` for submitit, which itself adds those of the log, the signal and the array."""
    options = sbatch_options(job, config) | _chained(after)
    for option in ("job-name", "nodes", "ntasks-per-node", "time", "signal", "open-mode", "array"):
        options.pop(option, None)
    return {
        "job_name": f"videoadapt-{job.stage}",
        "nodes": job.nodes,
        "ntasks_per_node": job.tasks_per_node,
        "time": config.slurm.time_minutes,
        "signal_delay_s": config.slurm.signal_s,
        "setup": list(config.slurm.setup),
        # A rank that fails ends the others. srun does not take the CPUs from sbatch in all versions.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={config.slurm.cpus_per_task}"],
        "additional_parameters": {option: value or True for option, value in options.items()},
    }


def _chained(after: str | None) -> dict[str, str]:
    return {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"} if after else {}


def _run_here(jobs: Sequence[Job], config: Config) -> list[dict[str, Any]]:
    import submitit
    from submitit.core.utils import FailedJobError, UncompletedJobError

    done = []
    for job in jobs:
        if job.nodes > 1:
            raise ConfigError(f"slurm.nodes: launch.cluster=local has one node, this machine, not {job.nodes}")
        executor = submitit.LocalExecutor(folder=_folder(config) / "%j")
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
            raise RunError(f"{job.stage} failed; see {handle.paths.stderr}") from error
        except KeyboardInterrupt:
            handle.cancel()
            raise
        done.append(_told(job, handle.job_id, handle.paths.stdout, ""))
    return done


def _told(job: Job, number: str, log: Path, line: str) -> dict[str, Any]:
    return {
        "stage": job.stage,
        "id": number,
        "ranks": job.ranks,
        "shards": job.shards,
        "log": str(log),
        "sbatch": line,
    }


def _folder(config: Config) -> Path:
    return config.run.dir.absolute() / "jobs"


class SqueueWatcher(SlurmInfoWatcher):
    """Asks squeue for the states of all jobs at once."""

    def _make_command(self) -> list[str] | None:
        jobs = sorted({job.split("_")[0] for job in self._registered - self._finished})
        return ["squeue", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%N"] if jobs else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """States and nodes by job, from what squeue printed."""
        text = string if isinstance(string, str) else string.decode()
        _, *lines = text.splitlines()
        return super().read_info("\n".join(["JobID|State|NodeList", *lines]))


class SqueueJob(SlurmJob[Any]):
    """A job that knows its state where there is no sacct."""

    watcher = SqueueWatcher(delay_s=60)


class SqueueExecutor(SlurmExecutor):
    """Submits such jobs."""

    job_class = SqueueJob

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Any]:
        jobs = super()._internal_process_submissions(delayed_submissions)
        # Those of an array come as jobs of the base class.
        return [SqueueJob(self.folder, job.job_id, tasks=list(range(job.num_tasks))) for job in jobs]
