"""Measures the peak memory of this process."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

from videoadapt.runtime.machine import peak_memory_bytes


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
