"""Reads the job of this process from its environment variables, and sends commands to SLURM."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from videoadapt.errors import RunError

_TIMEOUT_S = 60.0  # a busy controller of a large cluster answers after many seconds


@dataclass(frozen=True)
class RankEnv:
    """The rank of this process, as its launcher has set it in the environment."""

    launcher: Literal["none", "torchrun", "slurm", "submitit"]
    rank: int  # number of this process among all processes of the job
    world: int  # number of processes
    local_rank: int  # number of this process among the processes on this node
    rendezvous: str = ""  # name of this start of the job, unique; empty for torchrun, which has another store


def rank_env(environment: Mapping[str, str]) -> RankEnv:
    """Reads the rank that torchrun, srun or submitit's local executor has set.

    Without a launcher the process is rank 0 of 1. torchrun inside a SLURM job is torchrun. It sets RANK, LOCAL_RANK and
    WORLD_SIZE; a batch script that exports WORLD_SIZE alone, as many tutorials do, starts its tasks with srun.

    Args:
        environment: The environment variables.
    """

    def number(name: str, default: int = 0) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdigit() else default

    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= environment.keys():
        return RankEnv("torchrun", number("RANK"), number("WORLD_SIZE", 1), number("LOCAL_RANK"))
    job = slurm_job(environment)
    # SLURM_STEP_NUM_TASKS is set by srun only. A batch script itself has the variables of the job without being a task.
    if job is not None and "SLURM_STEP_NUM_TASKS" in environment:
        step = environment.get("SLURM_STEP_ID", "0")
        return RankEnv(
            "slurm",
            number("SLURM_PROCID"),
            number("SLURM_STEP_NUM_TASKS", 1),
            number("SLURM_LOCALID"),  # SLURM_NTASKS / SLURM_NNODES is wrong if tasks are spread unevenly over nodes
            f"slurm-{job.id}-{job.restarts}-{step}",
        )
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        name = f"local-{environment.get('SUBMITIT_LOCAL_JOB_ID', '')}"
        rank, world = number("SUBMITIT_LOCAL_GLOBALID"), number("SUBMITIT_LOCAL_NTASKS", 1)
        return RankEnv("submitit", rank, world, number("SUBMITIT_LOCAL_LOCALID"), name)
    return RankEnv("none", 0, 1, 0)


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job (or the element of a job array) that a process belongs to."""

    id: str  # of an element of an array, ARRAY_NUMBER
    restarts: int  # number of times that the job was requeued
    tasks: int  # requested by sbatch or salloc; a process that was started without srun is still alone


def slurm_job(environment: Mapping[str, str]) -> SlurmJob | None:
    """Returns the SLURM job of a process, or None outside SLURM.

    Args:
        environment: The environment variables.
    """
    # A process of submitit's local executor inherits the variables of a job in which it was started (such as
    # `srun --pty bash`), but it is not a task of that job: it must not requeue it.
    if "SLURM_JOB_ID" not in environment or environment.get("SUBMITIT_EXECUTOR") == "local":
        return None
    counts = (environment.get(name, "") for name in ("SLURM_RESTART_COUNT", "SLURM_NTASKS"))
    restarts, tasks = (int(count) if count.isdigit() else 0 for count in counts)
    # An element of an array: one of them has the array's own id as SLURM_JOB_ID, and a command about that id is about
    # all of them.
    array, number = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return SlurmJob(f"{array}_{number}" if array and number else environment["SLURM_JOB_ID"], restarts, tasks)


def cluster_name(environment: Mapping[str, str]) -> str | None:
    """Returns the name of the cluster of this job; outside a job, of the cluster whose commands are found here, if any.

    Args:
        environment: The environment variables.
    """
    if name := environment.get("SLURM_CLUSTER_NAME"):
        return name
    try:
        output = _run("scontrol", "show", "config")
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (line.split() for line in output.splitlines())  # `ClusterName = linux`
    return next((words[-1] for words in lines if words[:1] == ["ClusterName"]), None)


def requeue(job: str) -> None:
    """Returns a running job to SLURM's queue. SLURM ends its processes and starts it again later.

    Raises:
        RunError: SLURM refuses or does not answer.
    """
    try:
        # SLURM sends SIGTERM to all processes of the job, scontrol included, which must not die before it has finished.
        _run("sh", "-c", 'trap "" TERM; exec scontrol requeue "$1"', "sh", job)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(
            f"job {job} cannot be requeued ({_reason(error)}); submit it again: it continues from its last checkpoint"
        ) from None


def cancel(jobs: Sequence[str]) -> None:
    """Cancels pending and running jobs.

    Raises:
        RunError: SLURM refuses or does not answer.
    """
    try:
        _run("scancel", *jobs)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(f"the jobs cannot be cancelled ({_reason(error)}); run scancel {' '.join(jobs)}") from None


def job_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """Asks squeue for the states of jobs.

    squeue instead of sacct, because sacct needs a database that small clusters do not have. squeue forgets a job some
    minutes after its end (`MinJobAge`).

    Args:
        jobs: Ids of jobs, or of elements of job arrays.

    Returns:
        For each job that SLURM knows, `STATE|NODES`, such as `RUNNING|node[1-2]`. None if SLURM does not answer.
    """
    command = ["squeue", "--noheader", "--states=all", "--array", f"--jobs={','.join(jobs)}", "--format=%i|%T|%N"]
    try:
        output = _run(*command)
    except subprocess.CalledProcessError as error:
        return {} if "Invalid job id" in error.stderr else None  # squeue fails if it knows none of the jobs
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split("|", 1) for line in output.splitlines())


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S).stdout


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    return (getattr(error, "stderr", None) or str(error)).strip()
