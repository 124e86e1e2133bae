"""Describes the machine and the library versions of a benchmark, and measures the peak memory of a process."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from videoadapt.runtime.machine import cpu_limit, cpu_model, peak_memory_bytes


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


def print_machine(result: Mapping[str, Any]) -> None:
    """Prints the date, machine and versions of a benchmark's result."""
    print(
        f"{result['date']}, {result['machine']['cpu']}, {result['machine']['cpus']} CPUs, {result['machine']['system']}"
    )
    print(", ".join(f"{name} {number}" for name, number in result["versions"].items()))


def reset_peak_bytes() -> int:
    """Starts a new peak of the memory of this process, and returns its resident bytes at present.

    Freed memory goes back to the system first: a pass that uses it again would otherwise seem to need none. Without the
    reset, the peak could stem from imports. Both exist on Linux with glibc only.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: reset VmHWM
    return peak_bytes()


def peak_bytes() -> int:
    """Returns the largest resident set of this process in bytes, since the last reset."""
    try:
        # psutil has no peak on Linux, and the peak of getrusage includes the peak of the parent process.
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return peak_memory_bytes()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
