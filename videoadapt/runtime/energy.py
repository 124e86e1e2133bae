"""The energy that a device has used, where the machine tells it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_RAPL = Path("/sys/class/powercap")


def energy_meter(device: torch.device, rapl: Path = _RAPL) -> Callable[[], float] | None:
    """Returns a function that returns the joules used since some moment; None if the machine does not tell them.

    Of a GPU by NVML (Volta and newer; needs the extra `energy`), of CPUs by RAPL, whose counters only root may read on
    most machines. They count all programs that run there.

    Args:
        device: The GPU, or the CPU.
        rapl: The folder of RAPL's counters.
    """
    return _gpu_meter(device.index or 0) if device.type == "cuda" else _cpu_meter(rapl)


def _gpu_meter(index: int) -> Callable[[], float] | None:
    with suppress(Exception):  # the package, the library or the counter is missing
        nvml = _nvml()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # millijoules
    return None


@cache
def _nvml() -> Any:
    nvml = import_module("pynvml")
    nvml.nvmlInit()
    return nvml


def _cpu_meter(rapl: Path) -> Callable[[], float] | None:
    # `intel-rapl:0` is a socket, `intel-rapl:0:1` a part of it. AMD's CPUs have the same names. The zone `psys` is the
    # whole machine, sockets included.
    zones = [folder for folder in sorted(rapl.glob("intel-rapl:*")) if folder.name.count(":") == 1]
    try:
        counters = [_Counter(zone) for zone in zones if (zone / "name").read_text().startswith("package")]
    except (OSError, ValueError):
        return None
    return (lambda: sum(counter.joules() for counter in counters)) if counters else None


class _Counter:
    """A counter of RAPL, in microjoules, which begins again at 0 after `max_energy_range_uj`."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._sum = self._read(), 0

    def joules(self) -> float:
        now = self._read()
        self._sum += (now - self._last) % self._range
        self._last = now
        return self._sum / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())
