"""MFU counts the passes of a training step, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import small_runs as runs
from videoadapt.config.cost import point_macs
from videoadapt.training import throughput
from videoadapt.training.utilisation import PointClock, product_rate, utilisation


class Time:
    """A clock that the test moves."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("frozen", "passes"), [(None, 3.0), ("backbone", 1.0)])
def test_utilisation_is_the_work_over_time_and_rate(
    frozen: str | None, passes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    monkeypatch.setattr(throughput, "time", time)
    clock, other = PointClock(torch.device("cpu")), PointClock(torch.device("cpu"))
    for seconds in (50.0, 50.0, 2.0, 3.0):  # the first two compile and fill caches
        with clock.timed():
            time.now += seconds
        time.now += 100.0  # other points, or the wait for a teacher
        with clock.timed(4):
            time.now += 1.0
    train = {"freeze": frozen, "init": "weights.pt"}
    config = runs.config(tmp_path / "data", tmp_path / "run", train=train)
    macs = point_macs(config.model)["6"]
    found = utilisation({"6": clock, "4": other}, 1e12, config)
    assert found == {"6": pytest.approx(passes * macs * 8 / 7 / 1e12, rel=0.01)}  # no value for what never ran


def test_the_rate_of_a_product_is_that_of_this_machine() -> None:
    """No core makes fewer than 0.1 or more than 1,000 G multiply-adds a second."""
    assert 1e8 < product_rate(torch.device("cpu"), torch.float32) < 1e12 * torch.get_num_threads()
