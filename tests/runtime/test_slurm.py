"""Ranks, jobs and restarts from the variables of torchrun, srun and submitit; answers of SLURM."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from videoadapt.errors import RunError
from videoadapt.runtime import slurm as cluster
from videoadapt.runtime.slurm import RankEnv, SlurmJob, cancel, cluster_name, job_states, rank_env, requeue, slurm_job

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
STEP = {
    "SLURM_JOB_ID": "71",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "3",
}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "99",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, RankEnv("none", 0, 1, 0)),
        (TORCHRUN, RankEnv("torchrun", 5, 8, 1)),
        (STEP, RankEnv("slurm", 4, 6, 3, "slurm-71-2-3")),
        (STEP | TORCHRUN, RankEnv("torchrun", 5, 8, 1)),  # torchrun inside a job
        (STEP | {"WORLD_SIZE": "6", "MASTER_PORT": "1"}, RankEnv("slurm", 4, 6, 3, "slurm-71-2-3")),  # as in tutorials
        (STEP | {"WORLD_SIZE": "6", "RANK": "4"}, RankEnv("slurm", 4, 6, 3, "slurm-71-2-3")),
        ({"WORLD_SIZE": "2"}, RankEnv("none", 0, 1, 0)),
        (LOCAL, RankEnv("submitit", 1, 2, 1, "local-99")),
        (STEP | LOCAL, RankEnv("submitit", 1, 2, 1, "local-99")),  # launch.cluster=local inside a job
        (STEP | {"SUBMITIT_EXECUTOR": "slurm"}, RankEnv("slurm", 4, 6, 3, "slurm-71-2-3")),
        ({"SLURM_JOB_ID": "71", "SLURM_NTASKS": "6", "SLURM_PROCID": "0"}, RankEnv("none", 0, 1, 0)),  # without srun
    ],
)
def test_the_rank_is_read_from_the_environment(environment: dict[str, str], expected: RankEnv) -> None:
    assert rank_env(environment) == expected


def test_each_start_of_a_job_has_another_rendezvous_name() -> None:
    starts = [{**STEP, "SLURM_RESTART_COUNT": count} for count in "012"]
    starts += [{**STEP, "SLURM_STEP_ID": "4"}, {**STEP, "SLURM_JOB_ID": "72"}]
    del starts[0]["SLURM_RESTART_COUNT"]  # SLURM sets it after the first requeue
    assert len({rank_env(start).rendezvous for start in starts}) == len(starts)


def test_a_job_has_id_restarts_and_tasks() -> None:
    assert slurm_job({}) is None
    assert slurm_job(STEP) == SlurmJob("71", 2, 6)
    assert slurm_job({"SLURM_JOB_ID": "71"}) == SlurmJob("71", 0, 0)
    assert slurm_job(STEP | {"SUBMITIT_EXECUTOR": "slurm"}) == SlurmJob("71", 2, 6)


def test_an_element_of_an_array_is_not_the_whole_array() -> None:
    """SLURM gives one element of each array the array's own id, and `scontrol requeue 71` requeues all elements."""
    elements = [STEP | {"SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": number} for number in "01"]
    jobs = [slurm_job(elements[0] | {"SLURM_JOB_ID": "72"}), slurm_job(elements[1])]
    assert [job and job.id for job in jobs] == ["71_0", "71_1"]


def test_a_local_process_inside_a_job_has_no_job() -> None:
    """Otherwise it would requeue a job although it is not a task of it."""
    assert slurm_job(STEP | LOCAL) is None


def answer(monkeypatch: pytest.MonkeyPatch, *, output: str = "", error: Exception | None = None) -> None:
    def run(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        if error:
            raise error
        return subprocess.CompletedProcess([], 0, output)

    monkeypatch.setattr(cluster.subprocess, "run", run)


def test_job_states_are_those_of_squeue_or_none_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, output="7|RUNNING|node[1-2]\n8_0|PENDING|\n")
    assert job_states(["7", "8"]) == {"7": "RUNNING|node[1-2]", "8_0": "PENDING|"}
    answer(monkeypatch, error=subprocess.CalledProcessError(1, "squeue", stderr="error: Invalid job id specified"))
    assert job_states(["7"]) == {}
    answer(monkeypatch, error=subprocess.CalledProcessError(1, "squeue", stderr="Unable to contact the controller"))
    assert job_states(["7"]) is None
    answer(monkeypatch, error=FileNotFoundError("squeue"))
    assert job_states(["7"]) is None


def test_the_cluster_is_that_of_the_job_or_else_that_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, output="Configuration data as of 2026-11-28\nClusterName             = blue\n")
    assert cluster_name({"SLURM_CLUSTER_NAME": "red"}) == "red"
    assert cluster_name({}) == "blue"
    answer(monkeypatch, error=FileNotFoundError("scontrol"))
    assert cluster_name({}) is None


def test_a_refused_requeue_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, error=subprocess.CalledProcessError(1, "scontrol", stderr="Requeue is disabled for job 7"))
    with pytest.raises(RunError, match=r"job 7 cannot be requeued \(Requeue is disabled for job 7\); submit it again"):
        requeue("7")


def test_a_refused_cancellation_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, error=subprocess.CalledProcessError(1, "scancel", stderr="Unable to contact the controller"))
    with pytest.raises(RunError, match=r"cannot be cancelled \(Unable to contact the controller\); run scancel 7 8"):
        cancel(["7", "8"])
