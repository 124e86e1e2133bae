"""The machine under a run: its device, how it asks a run to stop, and how much memory was used."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from videoadapt.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device that `run.device` names; `auto` is CUDA where there is a GPU. Raises `ConfigError`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device: cuda was asked for, but torch sees no GPU; use run.device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # The current one: `parallel.ranks` gives each rank of a node a GPU of its own.
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def precision_dtype(name: str) -> torch.dtype:
    """The dtype of activations for `run.precision`."""
    return torch.bfloat16 if name == "bf16" else torch.float32


class CpuLimit(NamedTuple):
    """How many CPUs this process may use, and what says so."""

    cpus: int
    source: str


def cpu_limit(
    environment: Mapping[str, str] = os.environ,
    cgroups: Path = Path("/sys/fs/cgroup"),
    own_cgroups: Path = Path("/proc/self/cgroup"),
) -> CpuLimit:
    """The least of the process's affinity, its cgroup's quota and `SLURM_CPUS_PER_TASK`; at least 1.

    The ranks that torchrun starts on a node share these CPUs evenly; tasks that SLURM starts have each their own.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [(float(affinity), "CPU affinity")]
    if (quota := _cgroup_cpus(cgroups, own_cgroups)) is not None:
        limits.append((quota, "cgroup quota"))
    if (slurm := environment.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        limits.append((float(slurm), "SLURM_CPUS_PER_TASK"))
    cpus, source = min(limits)
    ranks = int(environment["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in environment else 1
    if ranks > 1:
        source += f" {cpus:g}, shared by {ranks} ranks"
    return CpuLimit(max(1, int(cpus / ranks)), source)


def _cgroup_cpus(cgroups: Path, own_cgroups: Path) -> float | None:
    """The least quota of the process's cgroups (v1 or v2) and of those above them; none without one."""
    try:
        lines = own_cgroups.read_text().splitlines()  # v2: `0::/group`; v1: `4:cpu,cpuacct:/group`
    except OSError:
        return None
    quotas = []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = cgroups / "cpu" if controllers else cgroups
        folder = mount / group.lstrip("/")
        # Inside a container the group's own folder may not be there, but the mount is the container's group.
        quotas += [_quota(path) for path in (folder, *folder.parents) if path.is_relative_to(mount)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / file).read_text() for file in files).split()
        except OSError:
            continue
        return None if quota in {"max", "-1"} else int(quota) / int(period)
    return None


def available_cpus() -> int:
    """CPUs that this process may use, as `cpu_limit` finds them."""
    return cpu_limit().cpus


def worker_count(workers: Literal["auto"] | int) -> int:
    """Processes that read videos, for `data.workers`; `auto` is one for each CPU that the job has."""
    return available_cpus() if workers == "auto" else workers


def peak_memory_bytes() -> int:
    """The largest resident set that this process or one of its finished children has had."""
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kib if sys.platform == "darwin" else kib * 1024
