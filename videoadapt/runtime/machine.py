"""The machine: device, dtype, the CPUs that this process may use, the memory it has used, and what describes them."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from videoadapt.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Returns the device for `run.device`.

    Args:
        name: `cpu`, `cuda`, or `auto` (CUDA if there is a GPU).

    Raises:
        ConfigError: `cuda` was given, but torch finds no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device: cuda was given, but torch finds no GPU; use run.device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    _let_segments_grow()
    # The current device, because `runtime.ranks` has selected a GPU for each rank of a node.
    return torch.device(name, torch.cuda.current_device())


def _let_segments_grow() -> None:
    """Sets `expandable_segments` unless the user has set the allocator: points of all sizes would fragment memory.

    torch reads the variable when it first allocates memory of a GPU.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second one until torch 2.8
    if not any(name in os.environ for name in names):
        since = tuple(map(int, torch.__version__.split(".")[:2]))
        os.environ[names[since < _ALLOC_CONF_SINCE]] = "expandable_segments:True"


def use_deterministic_operations() -> None:
    """Makes a run on a GPU repeatable (`run.deterministic`). An operation that cannot be is named by a warning."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch's documentation asks
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False  # a measurement, which may choose another algorithm each time


def now(device: torch.device) -> float:
    """Returns the seconds of a monotonic clock after all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run asynchronously: without it only their launch is timed
    return time.perf_counter()


def precision_dtype(name: str) -> torch.dtype:
    """Returns the dtype of activations for `run.precision` (`fp32` or `bf16`)."""
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns a context in which activations have the dtype of `run.precision`, and weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread. Restores the number on the way out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_ALLOC_CONF_SINCE = (2, 9)  # torch


class CpuLimit(NamedTuple):
    """The number of CPUs that this process may use, and the limit that determines it."""

    cpus: int
    source: str


def cpu_limit(
    environment: Mapping[str, str] = os.environ,
    cgroups: Path = Path("/sys/fs/cgroup"),
    own_cgroups: Path = Path("/proc/self/cgroup"),
) -> CpuLimit:
    """Returns the smallest of the CPU affinity, the quota of the cgroup and `SLURM_CPUS_PER_TASK`; at least 1.

    The ranks that torchrun or submitit's local executor starts on a node share these CPUs evenly. A task that SLURM
    starts does not share its CPUs.

    Args:
        environment: The environment variables.
        cgroups: The folder where the cgroup file system is mounted.
        own_cgroups: The file that names the cgroups of this process.
    """
    # os.cpu_count() counts the CPUs of the machine, which a job on a shared node may not use.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [(float(affinity), "CPU affinity")]
    if (quota := _cgroup_cpus(cgroups, own_cgroups)) is not None:
        limits.append((quota, "cgroup quota"))
    if (slurm := environment.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        limits.append((float(slurm), "SLURM_CPUS_PER_TASK"))
    cpus, source = min(limits)
    # LOCAL_WORLD_SIZE alone is no proof of torchrun: users set it for other launchers.
    ranks = int(environment["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in environment else 1
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        ranks = int(environment.get("SUBMITIT_LOCAL_NTASKS", 1))
    if ranks > 1:
        source += f" {cpus:g}, shared by {ranks} ranks"
    return CpuLimit(max(1, int(cpus / ranks)), source)


def _cgroup_cpus(cgroups: Path, own_cgroups: Path) -> float | None:
    """Returns the smallest quota of the process's cgroups (v1, v2) and their parents, in CPUs; None without a quota."""
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
        # In a container the folder of the group may not exist; the mount itself is then the group of the container.
        quotas += [_quota(path) for path in (folder, *folder.parents) if path.is_relative_to(mount)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    """Returns the quota of one cgroup, in CPUs: microseconds of CPU time per period / microseconds of the period."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # cgroup v2, v1
        try:
            quota, period = " ".join((folder / file).read_text() for file in files).split()
        except OSError:
            continue
        return None if quota in {"max", "-1"} else int(quota) / int(period)  # "no quota" in v2 and v1
    return None


def available_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    return cpu_limit().cpus


def busy() -> str:
    """Returns how many processes want the CPUs, in words, if it is more than the CPUs bear; otherwise empty."""
    load, cpus = os.getloadavg()[0], available_cpus()  # of the last minute; this process is a part of it
    return f"{load:.0f} processes want its {cpus} CPUs" if load > cpus + 1 else ""


def worker_count(workers: Literal["auto"] | int) -> int:
    """Returns the number of worker processes for `data.workers`.

    `auto` is one for each available CPU; with a GPU, one less: the process that launches its work needs a core, too.
    """
    return max(1, available_cpus() - torch.cuda.is_available()) if workers == "auto" else workers


def cpu_model() -> str:
    """Returns the model name of the CPU; of other systems than Linux, what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()  # psutil does not give the model name
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_name(device: torch.device) -> str:
    """Returns the model name of a GPU or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def machine() -> dict[str, str | int]:
    """Returns the CPU model, the number of CPUs that this process may use, and the system, as JSON files hold them."""
    return {"cpu": cpu_model(), "cpus": cpu_limit().cpus, "system": platform.platform()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of Python and of the packages in `packages` that are installed, by name."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def peak_memory_bytes() -> int:
    """Returns the largest resident set size, in bytes, of this process and of each of its finished children.

    The sizes are not added up. psutil has no peak values on Linux.
    """
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
