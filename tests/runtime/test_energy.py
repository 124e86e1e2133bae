"""The energy of CPUs is the sum of RAPL's counters over the sockets. The folder is one that the test writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from videoadapt.runtime.energy import energy_meter

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
