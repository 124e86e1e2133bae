"""The energy of CPUs is the sum of RAPL's counters over the sockets; that of a GPU is NVML's counter of this GPU.

The folder of RAPL is one that the test writes, and the module of NVML is simulated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from videoadapt.runtime.energy import _nvml, energy_meter

CPU = torch.device("cpu")
RANGE_UJ = 1_000_000


def counter(folder: Path, name: str, microjoules: int, zone: str = "package-0") -> Path:
    """Writes a counter and returns its file."""
    file = folder / name / "energy_uj"
    file.parent.mkdir(exist_ok=True)
    (file.parent / "name").write_text(f"{zone}\n")
    (file.parent / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    file.write_text(f"{microjoules}\n")
    return file


def test_sockets_add_up_and_parts_of_a_socket_are_not_counted_twice(tmp_path: Path) -> None:
    first, second = counter(tmp_path, "intel-rapl:0", 100), counter(tmp_path, "intel-rapl:1", 0)
    core = counter(tmp_path, "intel-rapl:0:0", 0, "core")
    machine = counter(tmp_path, "intel-rapl:2", 0, "psys")  # the whole machine, sockets included
    (tmp_path / "dtpm").mkdir()  # the same folder holds other kinds of counters
    meter = energy_meter(CPU, tmp_path)
    assert meter is not None
    before = meter()
    first.write_text("300100\n")
    second.write_text("200000\n")
    core.write_text("900000\n")
    machine.write_text("900000\n")
    assert meter() - before == pytest.approx(0.5)


def test_a_counter_that_begins_again_at_zero_goes_on(tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", 900_000)
    meter = energy_meter(CPU, tmp_path)
    assert meter is not None
    before = meter()
    for microjoules in (200_000, 100_000, 600_000):  # 0.3, 0.9 and 0.5 J; it begins again twice
        file.write_text(f"{microjoules}\n")
        after = meter()
        assert after >= before
    assert after - before == pytest.approx(1.7)


def test_joules_come_from_the_counter_of_this_call_and_stand_still_with_it(tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", 500)
    meter = energy_meter(CPU, tmp_path)
    assert meter is not None
    file.write_text("1500\n")
    assert meter() == meter() == pytest.approx(0.001)


def test_without_counters_that_can_be_read_there_is_no_meter(tmp_path: Path) -> None:
    assert energy_meter(CPU, tmp_path / "missing") is None
    assert energy_meter(CPU, tmp_path) is None
    file = counter(tmp_path, "intel-rapl:0", 0)
    file.write_text("unknown\n")
    assert energy_meter(CPU, tmp_path) is None
    file.unlink()
    file.mkdir()  # like a file that only root may read, an OSError also for root
    assert energy_meter(CPU, tmp_path) is None


@pytest.fixture
def millijoules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """The counters of two GPUs by their names for NVML, whose numbers need not be torch's."""
    counters = {"GPU-a": 5_000, "GPU-b": 70_000}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid if uuid in counters else pytest.fail(uuid),
        nvmlDeviceGetTotalEnergyConsumption=counters.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ba"[index]))
    _nvml.cache_clear()
    yield counters
    _nvml.cache_clear()


def test_the_energy_of_a_gpu_is_that_of_its_own_counter(millijoules: dict[str, int]) -> None:
    meter = energy_meter(torch.device("cuda", 1))
    assert meter is not None
    before = meter()
    millijoules["GPU-b"] += 9_000
    millijoules["GPU-a"] += 2_500
    assert meter() - before == pytest.approx(2.5)


def test_without_nvml_or_its_counter_a_gpu_has_no_meter(
    millijoules: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    millijoules.clear()  # as of GPUs before Volta, whose counter raises an error
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetHandleByUUID", str)
    assert energy_meter(torch.device("cuda")) is None
    _nvml.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import is an error
    assert energy_meter(torch.device("cuda", 0)) is None
