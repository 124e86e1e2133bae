"""What launchers tell a process through its environment: which rank of how many, in which job. And asking SLURM."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from videoadapt.errors import RunError

_ANSWER_S = 60.0  # that SLURM's controller may take


@dataclass(frozen=True)
class RankEnv:
    """One of the `world` processes of a job. `rendezvous` names this start of the job, which no other start shares."""

    launcher: Literal["none", "torchrun", "slurm", "submitit"]
    rank: int
    world: int
    local_rank: int
    rendezvous: str = ""


def rank_env(environment: Mapping[str, str]) -> RankEnv:
    """The place that torchrun, srun (as submitit uses it on SLURM), or submitit's local executor have given.

    torchrun inside a SLURM job counts as torchrun. One process alone is rank 0 of 1.
    """

    def number(name: str, otherwise: int = 0) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdigit() else otherwise

    if "WORLD_SIZE" in environment:
        return RankEnv("torchrun", number("RANK"), number("WORLD_SIZE", 1), number("LOCAL_RANK"))
    job = slurm_job(environment)
    if job is not None and "SLURM_STEP_NUM_TASKS" in environment:
        step = environment.get("SLURM_STEP_ID", "0")
        return RankEnv(
            "slurm",
            number("SLURM_PROCID"),
            number("SLURM_STEP_NUM_TASKS", 1),
            number("SLURM_LOCALID"),  # SLURM_NTASKS / SLURM_NNODES would be wrong for tasks spread unevenly
            f"slurm-{job.id}-{job.restarts}-{step}",
        )
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        name = f"local-{environment.get('SUBMITIT_LOCAL_JOB_ID', '')}"
        rank, world = number("SUBMITIT_LOCAL_GLOBALID"), number("SUBMITIT_LOCAL_NTASKS", 1)
        return RankEnv("submitit", rank, world, number("SUBMITIT_LOCAL_LOCALID"), name)
    return RankEnv("none", 0, 1, 0)


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job that a process runs in (of an array, the element). `restarts` counts how often it was requeued.

    `tasks` is what sbatch or salloc was asked for, which is not what a process started without srun gets.
    """

    id: str
    restarts: int
    tasks: int


def slurm_job(environment: Mapping[str, str]) -> SlurmJob | None:
    """The job of a process; none outside SLURM.

    A process of submitit's local executor is no task of the job in which that was called, such as `srun --pty bash`.
    """
    if "SLURM_JOB_ID" not in environment or environment.get("SUBMITIT_EXECUTOR") == "local":
        return None
    counts = (environment.get(name, "") for name in ("SLURM_RESTART_COUNT", "SLURM_NTASKS"))
    restarts, tasks = (int(count) if count.isdigit() else 0 for count in counts)
    return SlurmJob(environment["SLURM_JOB_ID"], restarts, tasks)


def requeue(job: str) -> None:
    """Gives a job back to SLURM, which ends it and starts it again. Raises `RunError` where SLURM refuses."""
    try:
        # Untouched by the SIGTERM that all processes of the job get for it, itself among them.
        _ask("sh", "-c", 'trap "" TERM; exec scontrol requeue "$1"', "sh", job)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(
            f"job {job} cannot be requeued ({_said(error)}); submit it again: it goes on from what is saved"
        ) from None


def cancel(jobs: Sequence[str]) -> None:
    """Takes jobs away from SLURM, whether they wait or run. Raises `RunError` where SLURM refuses."""
    try:
        _ask("scancel", *jobs)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(f"they cannot be cancelled ({_said(error)}); run scancel {' '.join(jobs)}") from None


def job_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """The state (`RUNNING`, `COMPLETED`, ...) and, after a `|`, the nodes of jobs by id, from squeue, not from sacct.

    sacct needs a database that small clusters lack. squeue knows a job for minutes after its end (`MinJobAge`); one
    that it has forgotten is left out. None where SLURM does not answer.
    """
    try:
        told = _ask("squeue", "--noheader", "--states=all", "--array", f"--jobs={','.join(jobs)}", "--format=%i|%T|%N")
    except subprocess.CalledProcessError as error:
        return {} if "Invalid job id" in error.stderr else None
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split("|", 1) for line in told.splitlines())


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ANSWER_S).stdout


def _said(error: OSError | subprocess.SubprocessError) -> str:
    return (getattr(error, "stderr", None) or str(error)).strip()
