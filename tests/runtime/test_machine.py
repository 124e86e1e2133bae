"""The number of CPUs: the smallest limit, divided by the ranks of a node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from videoadapt.runtime.machine import CpuLimit, cpu_limit, worker_count


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


class Machine:
    """A fake /sys/fs/cgroup and /proc/self/cgroup."""

    def __init__(self, folder: Path, groups: str, files: dict[str, str]) -> None:
        self.own, self.cgroups = folder / "self_cgroup", folder / "cgroup"
        self.own.write_text(groups)
        for name, text in files.items():
            path = self.cgroups / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def limit(self, **environment: str) -> CpuLimit:
        return cpu_limit(environment, self.cgroups, self.own)


V2 = "0::/slurm/job_7/step_0\n"
V1 = "5:memory:/slurm/job_7\n4:cpu,cpuacct:/slurm/job_7\n1:name=systemd:/\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        (V2, {"slurm/job_7/step_0/cpu.max": "max 100000\n", "slurm/job_7/cpu.max": "400000 100000\n"}, 4),
        (V2, {"slurm/job_7/step_0/cpu.max": "250000 100000\n", "slurm/cpu.max": "400000 100000\n"}, 2),
        (V2, {"cpu.max": "50000 100000\n"}, 1),  # inside a container; half a CPU is one
        (V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": "600000\n", "cpu/slurm/job_7/cpu.cfs_period_us": "100000\n"}, 6),
        (V1, {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 3),  # inside a container
    ],
)
def test_the_smallest_quota_of_the_cgroup_and_its_parents_is_used(
    tmp_path: Path, groups: str, files: dict[str, str], cpus: int
) -> None:
    assert Machine(tmp_path, groups, files).limit() == CpuLimit(cpus, "cgroup quota")


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        (V2, {"slurm/job_7/cpu.max": "max 100000\n"}),
        (V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": "-1\n", "cpu/slurm/job_7/cpu.cfs_period_us": "100000\n"}),
        (V1, {"memory/slurm/job_7/cpu.max": "100000 100000\n"}),  # another controller's folder
        (V2, {}),
        ("", {}),
    ],
)
def test_without_a_quota_the_affinity_is_used(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    assert Machine(tmp_path, groups, files).limit() == CpuLimit(16, "CPU affinity")


def test_a_system_without_cgroups_uses_the_affinity(tmp_path: Path) -> None:
    assert cpu_limit({}, tmp_path, tmp_path / "none") == CpuLimit(16, "CPU affinity")


def test_the_smallest_limit_is_used_and_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2, {"cpu.max": "800000 100000\n"})
    assert machine.limit(SLURM_CPUS_PER_TASK="4") == CpuLimit(4, "SLURM_CPUS_PER_TASK")
    assert machine.limit(SLURM_CPUS_PER_TASK="32") == CpuLimit(8, "cgroup quota")
    assert machine.limit(SLURM_CPUS_PER_TASK="") == CpuLimit(8, "cgroup quota")


def test_ranks_of_torchrun_and_local_ones_share_the_cpus_and_tasks_of_slurm_do_not(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2, {})
    torchrun = {"TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "4"}
    assert machine.limit(**torchrun) == CpuLimit(4, "CPU affinity 16, shared by 4 ranks")
    one_task = machine.limit(**torchrun, SLURM_CPUS_PER_TASK="8")
    assert one_task == CpuLimit(2, "SLURM_CPUS_PER_TASK 8, shared by 4 ranks")
    assert machine.limit(**torchrun, SLURM_CPUS_PER_TASK="2").cpus == 1
    local = machine.limit(SUBMITIT_EXECUTOR="local", SUBMITIT_LOCAL_NTASKS="2")
    assert local == CpuLimit(8, "CPU affinity 16, shared by 2 ranks")
    assert machine.limit(LOCAL_WORLD_SIZE="4", SLURM_CPUS_PER_TASK="8") == CpuLimit(8, "SLURM_CPUS_PER_TASK")


def test_auto_leaves_a_cpu_to_the_process_that_launches_the_work_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, cpus, workers in ((False, 8, 8), (True, 8, 7), (True, 1, 1)):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr("videoadapt.runtime.machine.available_cpus", lambda cpus=cpus: cpus)
        assert worker_count("auto") == workers


def test_auto_is_one_worker_for_each_cpu_and_a_number_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert worker_count("auto") == 1
    assert worker_count(7) == 7
    assert worker_count(0) == 0
