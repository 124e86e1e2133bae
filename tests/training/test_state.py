"""What may change on resume; the throughput of a run, and when it warns that loading does not keep up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from videoadapt.config.sections import DataConfig, LossConfig, ModelConfig, Section, TrainConfig
from videoadapt.data.clips.loader import Batch
from videoadapt.errors import CheckpointError
from videoadapt.model.checkpoint import require_same
from videoadapt.runtime.machine import CpuLimit
from videoadapt.training import throughput as throughput_module
from videoadapt.training.state import RESUME_FREELY
from videoadapt.training.throughput import Throughput, ThroughputMeter

SLURM = CpuLimit(4, "SLURM_CPUS_PER_TASK")


def test_the_warning_for_a_gpu_names_the_workers_and_cpus_that_would_suffice() -> None:
    throughput = Throughput(clips=3120, seconds=100.0, waited_s=43.0)  # 54.7 clips/s in the 57 s that it was busy
    text = throughput.starvation_warning(4, SLURM, on_gpu=True)
    assert "could process 54.7 clips/s, 4 workers deliver 31.2; 43% of the time" in text
    assert (
        "About 8 workers would suffice, but the job has 4 CPUs (SLURM_CPUS_PER_TASK): ask for more CPUs per task"
        in text
    )
    enough = throughput.starvation_warning(4, CpuLimit(16, "CPU affinity"), on_gpu=True)
    assert "About 8 workers would suffice, and the job has 16 CPUs (CPU affinity): set data.workers=8, or" in enough


def test_without_workers_reading_takes_the_time_spent_waiting() -> None:
    text = Throughput(clips=100, seconds=10.0, waited_s=7.5).starvation_warning(0, SLURM, on_gpu=True)
    assert "could process 40.0 clips/s, reading in the main process delivers 10.0" in text
    assert "About 3 workers would suffice" in text  # 100 clips take one of them 7.5 s, and the GPU 2.5 s


def test_on_a_cpu_the_warning_does_not_advise_more_workers() -> None:
    text = Throughput(clips=100, seconds=10.0, waited_s=5.0).starvation_warning(2, SLURM, on_gpu=False)
    assert "Training and reading share 4 CPUs (SLURM_CPUS_PER_TASK)" in text
    assert "workers would suffice" not in text
    assert "resize_videos" in text


@pytest.mark.parametrize(
    ("name", "kind", "key", "value"),
    [
        ("train", TrainConfig, "nesterov", True),
        ("train", TrainConfig, "decay", "all"),
        ("model", ModelConfig, "drop_path_unit", "sequence"),
        ("data", DataConfig, "antialias", False),
        ("loss", LossConfig, "dense_lengths", "longest"),
    ],
)
def test_a_setting_that_changes_training_may_not_change_on_resume(
    name: str, kind: type[Section], key: str, value: Any
) -> None:
    older: dict[str, Any] = {}  # a checkpoint from before the key existed, which trained with its default
    changed = kind(**{key: value})
    with pytest.raises(CheckpointError, match=rf"{name}\.{key} is .* in the checkpoint"):
        require_same(Path("old"), changed, older, name, free=RESUME_FREELY[name])
    require_same(Path("old"), kind(), older, name, free=RESUME_FREELY[name])


class Time:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(throughput_module, "time", time)
    return time


def run(meter: ThroughputMeter, time: Time, steps: int, *, wait_s: float, busy_s: float) -> None:
    """Runs steps of 8 clips that arrive after `wait_s` and take `busy_s`."""

    def batches() -> Iterator[list[Batch]]:
        for _ in range(steps):
            time.now += wait_s
            labels = torch.zeros(4, dtype=torch.int64)
            yield [Batch(torch.empty(4), labels, labels, [], []) for _ in range(2)]

    for _ in meter.timed(batches()):
        time.now += busy_s


def test_rates_are_clips_over_time_and_waiting_over_time(time: Time) -> None:
    meter = ThroughputMeter(2, torch.device("cpu"))
    run(meter, time, 5, wait_s=1.0, busy_s=3.0)
    assert meter.rates() == pytest.approx({"clips_per_s": 2.0, "wait_fraction": 0.25})


def test_the_meter_warns_once_after_the_first_window_and_again_if_it_gets_much_worse(
    time: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    meter = ThroughputMeter(2, torch.device("cuda"))

    def warnings(steps: int, *, wait_s: float, busy_s: float) -> int:
        run(meter, time, steps, wait_s=wait_s, busy_s=busy_s)
        return capsys.readouterr().err.count("loading starves training")

    assert warnings(20, wait_s=9.0, busy_s=1.0) == 0  # warm-up
    assert warnings(60, wait_s=0.1, busy_s=2.0) == 0
    assert warnings(19, wait_s=1.0, busy_s=2.0) == 0
    assert warnings(1, wait_s=1.0, busy_s=2.0) == 1
    assert warnings(60, wait_s=1.0, busy_s=1.5) == 0
    assert warnings(20, wait_s=3.0, busy_s=1.0) == 1
    assert warnings(60, wait_s=9.0, busy_s=1.0) == 0


def test_a_window_of_short_steps_lasts_half_a_minute(time: Time, capsys: pytest.CaptureFixture[str]) -> None:
    meter = ThroughputMeter(2, torch.device("cuda"))
    run(meter, time, 590, wait_s=0.05, busy_s=0.05)
    assert "starves" not in capsys.readouterr().err
    run(meter, time, 20, wait_s=0.05, busy_s=0.05)
    assert "starves" in capsys.readouterr().err
