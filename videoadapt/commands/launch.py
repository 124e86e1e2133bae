"""Runs stages as SLURM jobs, or as processes of this machine, through submitit.

A job calls `stage.run_stage`, as `srun videoadapt STAGE CONFIG` in `slurm/*.sbatch` does. It carries the config as it
is at submission: if the file changes while the job waits or is requeued, the job does not see the change.

Only the verb `launch` imports this module, because submitit is slow to import.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from videoadapt.commands.failure import FAILURES, fail, is_failure
from videoadapt.commands.stage import has_assigner, run_stage
from videoadapt.config.cost import point_macs
from videoadapt.config.jobs import JobConfig, Stage
from videoadapt.config.load import Config, make_config
from videoadapt.errors import ConfigError, RunError, few, plural
from videoadapt.runtime.console import say
from videoadapt.runtime.results import Result
from videoadapt.runtime.signals import Stopped
from videoadapt.runtime.slurm import cancel
from videoadapt.training.groups import make_plan

STAGES: tuple[Stage, ...] = get_args(Stage)
_SHARDED: frozenset[Stage] = frozenset({"label", "calibrate", "evaluate"})  # their videos may be scored in shards
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
# Names that submitit gives to the config and the script of a job until SLURM has given it an id.
_UNSUBMITTED = re.compile(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh")
_NO_LIMIT_MINUTES = 366 * 24 * 60  # submitit's local executor needs a limit: a year
_STOP_EVERY_S = 0.5  # between two signals to the ranks of this machine
_SQUEUE_EVERY_S = 60  # how often a handle asks SLURM for the state of its job, unless forced


@dataclass(frozen=True)
class Job:
    """A job to submit: a stage with the options of its job, or an array of `shards` such jobs."""

    stage: Stage
    options: JobConfig
    shards: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks of the job; of an array, ranks of each of its jobs."""
        return self.options.nodes * self.options.tasks_per_node


@dataclass(frozen=True)
class PlannedJob:
    """A job that `launch` would submit."""

    name: str  # job1, job2, ...: stands for the id, which SLURM has not given yet
    after: str | None  # the name of the job that must succeed first
    stage: Stage
    ranks: int
    shards: int
    options: dict[str, str]  # of sbatch; an empty value marks an option that takes none
    log: str  # path of the log file, with SLURM's patterns
    script: str  # the file that sbatch gets
    sbatch: str  # a shell command that submits an equal job by hand


@dataclass(frozen=True)
class LaunchPlan:
    """The result of `plan_launch`."""

    folder: str  # of logs; it must exist before a job starts
    jobs: list[PlannedJob]


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, or, on this machine, has run."""

    stage: Stage
    id: str
    ranks: int
    shards: int
    log: str  # path of the log file of rank 0; of an array, a pattern
    sbatch: str  # a shell command that submits an equal job by hand; empty on this machine


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
        ConfigError: A stage would refuse the config, or `launch.cluster=local` has more than one node.
        RunError: SLURM refuses a job, or a job fails on this machine.
    """
    jobs = _checked_jobs(config)
    submitted = _run_here(jobs, config) if config.launch.cluster == "local" else _submit_all(jobs, config, words)
    return LaunchResult(config.launch.cluster, submitted)


def _checked_jobs(config: Config) -> list[Job]:
    """Returns the jobs of `launch.stage`, after checks and warnings."""
    jobs = jobs_of(config)
    _require_possible(jobs, config)
    _warn_of_idle_gpus(jobs)
    _warn_of_absent_inputs(config)
    return jobs


def _require_possible(jobs: Sequence[Job], config: Config) -> None:
    """Raises ConfigError for what a stage would refuse in its job, after the queue and the stages before it."""
    stages, data, points = [job.stage for job in jobs], config.data, config.model.points
    for stage, name, split in (("train", "train", data.train), ("evaluate", "val", data.val)):
        if stage in stages and split.annotations is None:
            raise ConfigError(f"data.{name}.annotations: {stage} needs the videos of this split; set it")
    if "calibrate" in stages and not data.calibrate:
        raise ConfigError("data.calibrate: 0 leaves no video for launch.stage=calibrate; set it before `train`")
    if len(points) == 1 and (without := {"assign", "calibrate"}.intersection(stages)):
        raise ConfigError(f"model.points: {points[0]} alone leaves nothing to choose for {min(without)}")
    fitted = [*config.evaluate.leap, *(text for text in config.evaluate.cascade if "cost=" in text)]
    if config.launch.stage == "all" and "label" not in stages and fitted:
        raise ConfigError(
            f"evaluate.leap, evaluate.cascade: {fitted[0]} is fitted to labels, but this chain has no `label`: "
            "label.source=teacher needs data.holdout above 0"
        )
    if config.parallel.shard is not None and (any(job.shards > 1 for job in jobs) or not _SHARDED.issuperset(stages)):
        raise ConfigError(
            f"parallel.shard: {config.parallel.shard} is one job of {few(sorted(_SHARDED))}; set launch.stage to one "
            "of them and launch.shards=1, or leave it out"
        )
    for job in jobs:
        if job.stage == "train":
            make_plan(config, job.ranks, point_macs(config.model))


def _warn_of_absent_inputs(config: Config) -> None:
    """Prints which inputs this machine does not have: a job without them fails after it has waited in the queue."""
    data = config.data
    given = {"data.train.annotations": data.train.annotations, "data.val.annotations": data.val.annotations}
    given |= {"data.root": data.root, "data.token_labels": data.token_labels, "run.checkpoint": config.run.checkpoint}
    for name, path in given.items():
        if path is not None and path not in map(Path, ("best", "last")) and not path.exists():
            say(f"{name}: {path} is not on this machine; the jobs need it on their nodes")


def plan_launch(config: Config, words: Sequence[str]) -> LaunchPlan:
    """Returns the jobs that `launch` would submit to SLURM. It submits and writes nothing, and needs no SLURM.

    Args:
        config: The config of the run.
        words: The config file and the overrides as the user gave them.

    Raises:
        ConfigError: A stage would refuse the config, or `launch.cluster=local`, which has no jobs.
    """
    if config.launch.cluster == "local":
        raise ConfigError("launch.cluster: local has no jobs to show; leave --dry-run or launch.cluster=local out")
    jobs = _checked_jobs(config)
    planned: list[PlannedJob] = []
    for number, job in enumerate(jobs, start=1):
        before = planned[-1].name if planned else None
        after = f"${before}" if before else None
        options = sbatch_options(job, config, after)
        script = _executor(job, config, after).script(job.shards)
        command = sbatch_command(job, config, words, after)
        planned.append(
            PlannedJob(
                f"job{number}", before, job.stage, job.ranks, job.shards, options, options["output"], script, command
            )
        )
    return LaunchPlan(str(_job_folder(config)), planned)


def jobs_of(config: Config) -> list[Job]:
    """Returns the jobs of `launch.stage` in their order.

    With `launch.shards` > 1 on SLURM, the stages that score videos take two jobs each: an array that scores the shards,
    and a job that merges the scores. On one machine an array gains nothing, so there is none.
    """
    arrays = config.launch.shards > 1 and config.launch.cluster == "slurm"
    stages = _all_stages(config) if config.launch.stage == "all" else (config.launch.stage,)
    jobs: list[Job] = []
    for stage in stages:
        options = config.slurm.of(stage)
        if stage in _SHARDED and arrays:
            jobs += [Job(stage, options.one_task(), config.launch.shards), Job(stage, options.one_task())]
        else:
            jobs.append(Job(stage, options))
    return jobs


def _all_stages(config: Config) -> tuple[Stage, ...]:
    """Returns the stages that have clips."""
    absent = set() if has_assigner(config) else {"label", "assign"}
    if not config.data.calibrate:
        absent.add("calibrate")
    return tuple(stage for stage in STAGES if stage not in absent)


def sbatch_options(job: Job, config: Config, after: str | None = None) -> dict[str, str]:
    """Returns the sbatch options of a job, without their dashes. An empty value marks an option that takes none.

    Args:
        job: The job.
        config: The config of the run.
        after: The id of the job that must succeed first, if there is one.
    """
    given = job.options
    number = "%A_%a" if job.shards > 1 else "%j"
    options = {
        "job-name": f"videoadapt-{job.stage}",
        "partition": given.partition,
        "account": given.account,
        "qos": given.qos,
        "reservation": given.reservation,
        "wckey": given.wckey,
        "constraint": given.constraint,
        "exclude": given.exclude,
        "licenses": given.licenses,
        "comment": given.comment,
        "mail-user": given.mail,
        "mail-type": given.mail and ",".join(given.mail_type),
        "time": given.time_minutes,
        "nodes": given.nodes,
        "ntasks-per-node": given.tasks_per_node,
        "gpus-per-task": given.gpus_per_task or None,
        # Not by task: SLURM would hide the node's other GPUs from NCCL, and its fast paths to them.
        "gpus-per-node": given.tasks_per_node if given.asks_by_default else given.gpus_per_node,
        "gres": given.gres,
        "gpu-bind": given.gpu_bind,
        "cpus-per-task": given.cpus_per_task,
        "mem": given.mem_gb and f"{given.mem_gb}G",
        **given.extra,
        "signal": f"USR2@{given.signal_s}",  # sent to the ranks before the time limit; see `run_stage`
        "requeue": "",  # after preemption or the failure of a node
        "open-mode": "append",  # a requeued job keeps the log of its earlier starts
        "output": f"{_job_folder(config)}/{number}_0_log.out",  # of rank 0, beside those that submitit gives the others
        "array": f"0-{job.shards - 1}" if job.shards > 1 else None,
        "dependency": after and f"afterok:{after}",
        # Without it, a job whose predecessor has failed stays in the queue for ever.
        "kill-on-invalid-dep": after and "yes",
    }
    return {option: str(value) for option, value in options.items() if value is not None}


def sbatch_command(job: Job, config: Config, words: Sequence[str], after: str | None) -> str:
    """Returns a shell command that submits an equal job by hand: sbatch with a script that runs the verb of the stage.

    Args:
        job: The job.
        config: The config of the run.
        words: The config file and the overrides.
        after: The id of the job that must succeed first, if there is one; or a variable of the shell that has it.
    """
    flags = [
        f"--{name}={value}" if value else f"--{name}" for name, value in sbatch_options(job, config, after).items()
    ]
    # Quotes would keep the shell from replacing a variable.
    quoted = [flag if flag.startswith("--dependency=") else shlex.quote(flag) for flag in flags]
    program = "videoadapt" if job.options.python is None else f"{job.options.python} -m videoadapt"
    run = f"{shlex.join(['srun', '--unbuffered', *_srun_options(job)])} {program} {shlex.join([job.stage, *words])}"
    run += f" parallel.ranks={job.ranks}"
    if job.shards > 1:
        run += f" parallel.shard=$SLURM_ARRAY_TASK_ID/{job.shards}"
    script = "\n".join(["#!/bin/bash", *job.options.setup, *PASS_SIGNALS_ON.splitlines(), run])
    return f"{' '.join(['sbatch', *quoted])} <<'END'\n{script}\nEND"


def submit(job: Job, config: Config, after: str | None = None) -> list[submitit.Job[Result]]:
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
    if shutil.which("sbatch") is None:
        raise RunError("no sbatch on this machine: launch from a node of the cluster, or set launch.cluster=local")
    shards = [None] if job.shards == 1 else list(range(job.shards))
    calls = [StageCall(job, config, shard) for shard in shards]
    folder = _job_folder(config)
    before = set(folder.glob("*"))
    try:
        return _executor(job, config, after).submit_array(calls)
    except (RuntimeError, OSError, FailedJobError, FailedSubmissionError) as error:
        for path in set(folder.glob("*")) - before:  # of this job: other jobs may have begun to write here, too
            if _UNSUBMITTED.fullmatch(path.name):
                path.unlink()
        with suppress(OSError):  # not empty
            folder.rmdir()
            config.run.dir.rmdir()
        raise RunError(f"{job.stage} cannot be submitted: {error}") from error


class StageCall:
    """The function that submitit pickles and a job calls: a stage with its config.

    Args:
        job: The job.
        config: The config of the run.
        shard: The number of the shard, in an array.
        gpus: Value of CUDA_VISIBLE_DEVICES for the stage. None: as it is in the process of the job.
    """

    def __init__(self, job: Job, config: Config, shard: int | None = None, gpus: str | None = None) -> None:
        parallel = {"ranks": job.ranks} | ({} if shard is None else {"shard": f"{shard}/{job.shards}"})
        self.stage, self.gpus = job.stage, gpus
        self.values = config.model_dump(mode="json")  # plain values: a pickled Config would tie the job to its class
        self.values["parallel"] |= parallel

    def __call__(self) -> Result:
        """Runs the stage and returns its result.

        Raises:
            SystemExit: The stage was interrupted, or failed by an error of the user or of the machine, which was
                printed as one line. submitit would print the traceback of any other exception.
        """
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        try:
            return run_stage(self.stage, make_config(self.values, "the config at submission"))
        except Stopped as stopped:
            raise SystemExit(128 + stopped.signal) from None
        except FAILURES as error:
            if not is_failure(error):
                raise
            fail(error)


def _warn_of_idle_gpus(jobs: Sequence[Job]) -> None:
    for job in jobs:
        gpus, tasks = job.options.gpus_on_node, job.options.tasks_per_node
        if gpus > tasks:
            say(
                f"{job.stage}: {gpus} GPUs on each node, of which {gpus - tasks} are idle: a task uses one GPU. "
                f"slurm.tasks_per_node={gpus} uses them all"
            )


def _submit_all(jobs: Sequence[Job], config: Config, words: Sequence[str]) -> list[Submission]:
    """Submits jobs that depend on each other; cancels them all if one is refused."""
    submitted: list[Submission] = []
    before: str | None = None
    try:
        for job in jobs:
            command = sbatch_command(job, config, words, before)
            handles = submit(job, config, before)
            before = handles[0].job_id.split("_")[0]  # 7 of 7_0: the next job waits for the whole array
            log = handles[0].paths.stdout if job.shards == 1 else _job_folder(config) / f"{before}_*_0_log.out"
            submitted.append(Submission(job.stage, before, job.ranks, job.shards, str(log), command))
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


def _executor(job: Job, config: Config, after: str | None) -> SqueueExecutor:
    """Returns submitit's executor with `sbatch_options` as its parameters. It has its own names for some options."""
    options = sbatch_options(job, config, after)
    named = {option.replace("-", "_"): options.pop(option) for option in ("job-name", "nodes", "ntasks-per-node")}
    options.pop("time")
    executor = SqueueExecutor(folder=_job_folder(config), python=job.options.python)
    executor.update_parameters(
        job_name=named["job_name"],
        nodes=job.options.nodes,
        ntasks_per_node=job.options.tasks_per_node,
        time=job.options.time_minutes,
        wckey=None,  # submitit's default is its own name, which clusters with accounting refuse
        stderr_to_stdout=True,
        setup=[*job.options.setup, *PASS_SIGNALS_ON.splitlines()],
        srun_args=_srun_options(job),
        additional_parameters={option: value or True for option, value in options.items()},
    )
    return executor


def _srun_options(job: Job) -> list[str]:
    # When one rank fails, srun ends the others. Since SLURM 22.05, srun does not inherit sbatch's CPUs per task.
    return ["--kill-on-bad-exit=1", f"--cpus-per-task={job.options.cpus_per_task}", *job.options.srun]


def _run_here(jobs: Sequence[Job], config: Config) -> list[Submission]:
    """Runs jobs one after the other as processes of this machine."""
    done = []
    for job in jobs:
        nodes, tasks = job.options.nodes, job.options.tasks_per_node
        if nodes > 1:
            raise ConfigError(f"slurm.nodes is {nodes}; with launch.cluster=local it must be 1, this machine")
        executor = submitit.LocalExecutor(folder=_job_folder(config))
        executor.update_parameters(
            tasks_per_node=tasks,
            gpus_per_node=min(tasks, job.options.gpus_for_tasks),
            timeout_min=_NO_LIMIT_MINUTES,
            stderr_to_stdout=True,
        )
        # submitit shows the ranks GPUs from 0 on, whichever ones this process was given.
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") if job.options.gpus_for_tasks else None
        with _ignoring_interrupts():
            handle = executor.submit(StageCall(job, config, gpus=gpus))
        say(f"{job.stage}: {plural(job.ranks, 'rank')}; log: {handle.paths.stdout}")
        try:
            handle.results()
        except (FailedJobError, UncompletedJobError) as error:
            raise RunError(_why_failed(job, handle)) from error
        except KeyboardInterrupt:
            _let_ranks_save(job, handle)
            raise
        done.append(Submission(job.stage, handle.job_id, job.ranks, job.shards, str(handle.paths.stdout), ""))
    return done


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Makes processes that start in the `with` block ignore Ctrl-C, which a terminal sends to all its processes.

    submitit's controller would kill the ranks a second later. `run_stage` has a handler of its own.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _let_ranks_save(job: Job, handle: submitit.Job[Result]) -> None:
    """Tells the ranks of a job on this machine to save and end, and waits for them."""
    say(f"{job.stage}: stopping once its ranks have saved; Ctrl-C again does not wait (log: {handle.paths.stdout})")
    while not handle.done():
        # The controller passes it on. Repeated, because a rank that still imports its modules ignores it.
        os.kill(int(handle.job_id), signal.SIGTERM)
        time.sleep(_STOP_EVERY_S)


def _why_failed(job: Job, handle: submitit.Job[Result]) -> str:
    """Returns the error that a rank of a job on this machine has printed, and its log."""
    for log in sorted(handle.paths.folder.glob(f"{handle.job_id}_*_log.out")):  # one for each rank
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"error( on rank \d+ of \d+)?: ", line)]
        if errors:
            return f"{job.stage} failed: {errors[-1].partition(': ')[2]} (log: {log})"
    return f"{job.stage} failed; see {handle.paths.stdout}"


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

    @classmethod
    def affinity(cls) -> int:
        """Returns that submitit may use this executor, without a look for srun: a dry run needs none."""
        return 1

    def script(self, shards: int) -> str:
        """Returns the file that sbatch gets."""
        parameters = self.parameters
        if shards > 1:
            self.parameters = parameters | {"map_count": shards}  # as `_internal_process_submissions` does
        text = self._make_submission_file_text(self._submitit_command_str, "")
        self.parameters = parameters
        return text

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Any]:
        jobs = super()._internal_process_submissions(delayed_submissions)
        # submitit ignores `job_class` for the jobs of an array, and makes them as its own class.
        return [SqueueJob(self.folder, job.job_id, tasks=list(range(job.num_tasks))) for job in jobs]
