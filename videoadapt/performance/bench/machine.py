"""What a benchmark ran on, and the memory of its processes."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from videoadapt.runtime.machine import cpu_limit, peak_memory_bytes


def machine() -> dict[str, Any]:
    """CPU, number of CPUs, and system."""
    return {"cpu": cpu_model(), "cpus": cpu_limit().cpus, "system": platform.platform()}


def cpu_model() -> str:
    """The name of the CPU, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def print_machine(result: dict[str, Any]) -> None:
    """Date, machine and versions of a benchmark's result."""
    print(
        f"{result['date']}, {result['machine']['cpu']}, {result['machine']['cpus']} CPUs, {result['machine']['system']}"
    )
    print(", ".join(f"{name} {number}" for name, number in result["versions"].items()))


def memory_after_imports() -> int:
    """Resident bytes of this process; its peak counts from here on, where the system can forget the one before."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """The largest resident set of this process. `getrusage` would count that of the process which started it, too."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return peak_memory_bytes()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
