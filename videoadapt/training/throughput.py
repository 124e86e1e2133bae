"""Clips per second of training, and the time it spends waiting for data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from videoadapt.data.clips.loader import Batch
from videoadapt.runtime.console import say
from videoadapt.runtime.machine import CpuLimit, cpu_limit


@dataclass(frozen=True)
class Throughput:
    """So many clips in so many seconds, part of which were spent waiting for them."""

    clips: int
    seconds: float
    waited_s: float

    def __sub__(self, earlier: Throughput) -> Throughput:
        return Throughput(self.clips - earlier.clips, self.seconds - earlier.seconds, self.waited_s - earlier.waited_s)

    @property
    def clips_per_s(self) -> float:
        """What the run does."""
        return self.clips / max(self.seconds, 1e-9)

    @property
    def wait_fraction(self) -> float:
        """The part of the time in which the device had nothing to do."""
        return self.waited_s / max(self.seconds, 1e-9)

    def starvation(self, workers: int, limit: CpuLimit, *, on_gpu: bool) -> str:
        """What a run that waits is told: by how much, and what would mend it."""
        busy_s = max(self.seconds - self.waited_s, 1e-9)
        readers = f"{workers} workers deliver" if workers else "reading in the main process delivers"
        cpus = f"{limit.cpus} CPUs ({limit.source})"
        # Workers read all the time; without them, the main process reads only while it waits.
        wanted = math.ceil((workers * self.seconds if workers else self.waited_s) / busy_s)
        if not on_gpu:
            advice = f"Training and reading share {cpus}: more workers would slow the steps. Ask for more CPUs, or"
        elif wanted <= limit.cpus:
            advice = f"About {wanted} workers would do, and the job has {cpus}: set data.workers={wanted}, or"
        else:
            advice = (
                f"About {wanted} workers would do, but the job has {cpus}: ask for more CPUs per task "
                "(data.workers=auto uses them all), or"
            )
        return (
            f"loading starves training: steps could take {self.clips / busy_s:.1f} clips/s, {readers} "
            f"{self.clips_per_s:.1f}; {self.wait_fraction:.0%} of the time is spent waiting. "
            f"{advice} resize the videos (tools/resize_videos.py)"
        )


class ThroughputMeter:
    """Clips per second and the share of time spent waiting for data; warns where reading does not keep up.

    It looks at stretches of at least 20 steps and 30 s, the first of which is warm-up, and warns of more than a tenth
    of the time; again only if that share has grown by a quarter of the time.
    """

    STRETCH_STEPS, STRETCH_S = 20, 30.0

    def __init__(self, workers: int, device: torch.device, ranks: int = 1) -> None:
        self.start = time.monotonic()
        self._ranks = ranks  # that share the clips with this one
        self._workers, self._on_gpu = workers, device.type == "cuda"
        self._clips, self._waited_s = 0, 0.0
        self._before = Throughput(0, 0.0, 0.0)  # this stretch
        self._steps, self._warm = 0, False
        self._tolerated_share = 0.1

    def timed(self, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The same steps; the time until each is there counts as waiting."""
        while True:
            before = time.monotonic()
            step = next(steps, None)
            if step is None:
                return
            self._waited_s += time.monotonic() - before
            self._clips += sum(len(batch.labels) for batch in step)
            yield step
            self._look()

    def pace(self) -> Throughput:
        """Since the start."""
        return Throughput(self._clips, time.monotonic() - self.start, self._waited_s)

    def rates(self) -> dict[str, float]:
        """`clips_per_s` and `wait_fraction` since the start."""
        pace = self.pace()
        return {"clips_per_s": pace.clips_per_s * self._ranks, "wait_fraction": pace.wait_fraction}

    def _look(self) -> None:
        self._steps += 1
        stretch = self.pace() - self._before
        if self._steps < self.STRETCH_STEPS or stretch.seconds < self.STRETCH_S:
            return
        if self._warm and stretch.wait_fraction > self._tolerated_share:
            say(stretch.starvation(self._workers, cpu_limit(), on_gpu=self._on_gpu))
            self._tolerated_share = stretch.wait_fraction + 0.25
        self._before, self._steps, self._warm = self.pace(), 0, True
