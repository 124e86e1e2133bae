"""The clock of a run: what it measures, and when it says that reading does not keep up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from videoadapt.data.clips.loader import Batch
from videoadapt.runtime.machine import CpuLimit
from videoadapt.training import throughput
from videoadapt.training.throughput import Throughput, ThroughputMeter

SLURM = CpuLimit(4, "SLURM_CPUS_PER_TASK")


def test_a_starved_gpu_is_told_how_many_workers_and_cpus_it_wants() -> None:
    pace = Throughput(clips=3120, seconds=100.0, waited_s=43.0)  # 54.7 clips/s in the 57 s that it was busy
    text = pace.starvation(4, SLURM, on_gpu=True)
    assert "could take 54.7 clips/s, 4 workers deliver 31.2; 43% of the time" in text
    assert "About 8 workers would do, but the job has 4 CPUs (SLURM_CPUS_PER_TASK): ask for more CPUs per task" in text
    enough = pace.starvation(4, CpuLimit(16, "CPU affinity"), on_gpu=True)
    assert "About 8 workers would do, and the job has 16 CPUs (CPU affinity): set data.workers=8, or" in enough


def test_without_workers_the_main_process_reads_only_while_it_waits() -> None:
    text = Throughput(clips=100, seconds=10.0, waited_s=7.5).starvation(0, SLURM, on_gpu=True)
    assert "could take 40.0 clips/s, reading in the main process delivers 10.0" in text
    assert "About 3 workers would do" in text  # 100 clips take one of them 7.5 s, and the GPU 2.5 s


def test_on_a_cpu_more_workers_are_not_advised() -> None:
    text = Throughput(clips=100, seconds=10.0, waited_s=5.0).starvation(2, SLURM, on_gpu=False)
    assert "Training and reading share 4 CPUs (SLURM_CPUS_PER_TASK)" in text
    assert "workers would do" not in text
    assert "resize_videos" in text


class Time:
    """A clock that goes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(throughput, "time", time)
    return time


def run(clock: ThroughputMeter, time: Time, steps: int, *, wait_s: float, busy_s: float) -> None:
    """Steps of 8 clips that come after `wait_s` and take `busy_s`."""

    def batches() -> Iterator[list[Batch]]:
        for _ in range(steps):
            time.now += wait_s
            labels = torch.zeros(4, dtype=torch.int64)
            yield [Batch(torch.empty(4), labels, labels, [], []) for _ in range(2)]

    for _ in clock.timed(batches()):
        time.now += busy_s


def test_rates_are_clips_over_time_and_waiting_over_time(time: Time) -> None:
    clock = ThroughputMeter(2, torch.device("cpu"))
    run(clock, time, 5, wait_s=1.0, busy_s=3.0)
    assert clock.rates() == pytest.approx({"clips_per_s": 2.0, "wait_fraction": 0.25})


def test_it_warns_once_after_a_warm_up_and_again_if_much_worse(time: Time, capsys: pytest.CaptureFixture[str]) -> None:
    clock = ThroughputMeter(2, torch.device("cuda"))

    def warnings(steps: int, *, wait_s: float, busy_s: float) -> int:
        run(clock, time, steps, wait_s=wait_s, busy_s=busy_s)
        return capsys.readouterr().err.count("loading starves training")

    assert warnings(20, wait_s=9.0, busy_s=1.0) == 0  # warm-up
    assert warnings(60, wait_s=0.1, busy_s=2.0) == 0
    assert warnings(19, wait_s=1.0, busy_s=2.0) == 0
    assert warnings(1, wait_s=1.0, busy_s=2.0) == 1
    assert warnings(60, wait_s=1.0, busy_s=1.5) == 0
    assert warnings(20, wait_s=3.0, busy_s=1.0) == 1
    assert warnings(60, wait_s=9.0, busy_s=1.0) == 0


def test_short_steps_are_watched_for_half_a_minute(time: Time, capsys: pytest.CaptureFixture[str]) -> None:
    clock = ThroughputMeter(2, torch.device("cuda"))
    run(clock, time, 590, wait_s=0.05, busy_s=0.05)
    assert "starves" not in capsys.readouterr().err
    run(clock, time, 20, wait_s=0.05, busy_s=0.05)
    assert "starves" in capsys.readouterr().err
