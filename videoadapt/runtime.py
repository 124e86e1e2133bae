"""The machine under a run: its device, how it asks a run to stop, and how much memory was used."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Literal

import torch

from videoadapt.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device that `run.device` names; `auto` is CUDA where there is a GPU. Raises `ConfigError`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device: cuda was asked for, but torch sees no GPU; use run.device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def precision_dtype(name: str) -> torch.dtype:
    """The dtype of activations for `run.precision`."""
    return torch.bfloat16 if name == "bf16" else torch.float32


def available_cpus() -> int:
    """CPUs that this process may use: the least of its affinity, its cgroup's quota and `SLURM_CPUS_PER_TASK`."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    limits = [affinity, _cgroup_cpus(), int(slurm) if slurm.isdigit() else None]
    return max(1, min(limit for limit in limits if limit is not None))


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The quota of the process's cgroup (v2) or of any above it, in whole CPUs; none without one."""
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    folder = root / group.lstrip("/")
    quotas = []
    for path in (folder, *folder.parents):
        try:
            quota, period = (path / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            quotas.append(int(quota) / int(period))
    return max(1, int(min(quotas))) if quotas else None


def worker_count(workers: Literal["auto"] | int) -> int:
    """Processes that read videos, for `data.workers`; `auto` is one for each CPU that the job has."""
    return available_cpus() if workers == "auto" else workers


def peak_memory_bytes() -> int:
    """The largest resident set that this process or one of its finished children has had."""
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kib if sys.platform == "darwin" else kib * 1024
