"""How fast training is, and how much of the time it waits for data."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from videoadapt.data.clips.loader import Batch
from videoadapt.errors import plural
from videoadapt.runtime.console import advise
from videoadapt.runtime.machine import CpuLimit, cpu_limit

_LEAST_S = 1e-9  # avoids a division by zero where no time has passed
_PENDING = 64  # events of a clock that are kept without a look at whether the GPU has reached them


@dataclass(frozen=True)
class Throughput:
    """The work of a period of time."""

    clips: int
    seconds: float
    waited_s: float  # the part of `seconds` spent waiting for data

    def __sub__(self, earlier: Throughput) -> Throughput:
        return Throughput(self.clips - earlier.clips, self.seconds - earlier.seconds, self.waited_s - earlier.waited_s)

    @property
    def clips_per_s(self) -> float:
        """Clips per second, waiting included."""
        return self.clips / max(self.seconds, _LEAST_S)

    @property
    def wait_fraction(self) -> float:
        """Fraction of the time spent waiting for data, 0 to 1."""
        return self.waited_s / max(self.seconds, _LEAST_S)

    def starvation_warning(self, workers: int, limit: CpuLimit, *, on_gpu: bool) -> str:
        """Returns a warning that loading is slower than training, with advice.

        Args:
            workers: Worker processes of this rank; 0 if the main process reads.
            limit: The CPUs of this rank.
            on_gpu: Whether training runs on a GPU, so that workers have the CPUs to themselves.
        """
        busy_s = max(self.seconds - self.waited_s, _LEAST_S)
        readers = (
            f"{plural(workers, 'worker')} {'delivers' if workers == 1 else 'deliver'}"
            if workers
            else "reading in the main process delivers"
        )
        cpus = f"{plural(limit.cpus, 'CPU')} ({limit.source})"
        # CPU seconds of reading, per second of training. Workers read all the time; the main process reads while it
        # "waits".
        wanted = math.ceil((workers * self.seconds if workers else self.waited_s) / busy_s)
        if not on_gpu:
            advice = f"Training and reading share {cpus}: more workers would slow the steps. Ask for more CPUs, or"
        elif wanted <= limit.cpus:
            advice = (
                f"About {plural(wanted, 'worker')} would suffice, and the job has {cpus}: set data.workers={wanted}, or"
            )
        else:
            advice = (
                f"About {plural(wanted, 'worker')} would suffice, but the job has {cpus}: ask for more CPUs per task "
                "(data.workers=auto uses all but one), or"
            )
        return (
            f"loading starves training: steps could process {self.clips / busy_s:.1f} clips/s, {readers} "
            f"{self.clips_per_s:.1f}; {self.wait_fraction:.0%} of the time is spent waiting. "
            f"{advice} resize the videos (tools/resize_videos.py)"
        )


class DeviceClock:
    """Adds up times of one kind of work or waiting. On a GPU, events measure them; the host does not wait.

    Args:
        device: The device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds, self._amount = 0.0, 0
        # Start, end and amount of what the GPU may not have reached.
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()

    def start(self) -> float | torch.cuda.Event:
        """Returns the present time, for `stop`."""
        if self._device.type != "cuda":
            return time.perf_counter()
        return torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))

    def stop(self, started: float | torch.cuda.Event, amount: int = 0) -> None:
        """Adds the time since `start` returned `started`, and an amount of work."""
        now = self.start()
        if isinstance(started, float):
            assert isinstance(now, float), "the device does not change"
            self._seconds += now - started
            self._amount += amount
        else:
            assert not isinstance(now, float), "the device does not change"
            self._pending.append((started, now, amount))
            if len(self._pending) > _PENDING:  # only some ranks read the sums at every step
                self.read()

    def read(self) -> tuple[float, int]:
        """Returns the sums so far: seconds, and amount of work."""
        while self._pending and self._pending[0][1].query():
            started, stopped, amount = self._pending.popleft()
            self._seconds += started.elapsed_time(stopped) / 1000
            self._amount += amount
        return self._seconds, self._amount


class ThroughputMeter:
    """Measures the throughput of training, and warns if loading does not keep up.

    The meter looks at one window of steps after the other. It warns if the wait fraction of a window is above 0.1, and
    again only if it has grown by 0.25 since the last warning.

    Attributes:
        start: When the meter was created, by `time.monotonic`.
        before_s: Seconds of training in earlier calls, which were interrupted.
        excluded_s: Time spent on something else than training; see `exclude`.
    """

    WINDOW_STEPS, WINDOW_S = 20, 30.0  # a window ends when it has both; shorter ones vary with single slow files
    WARN_FRACTION, WARN_AGAIN = 0.1, 0.25

    def __init__(self, workers: int, device: torch.device, ranks: int = 1) -> None:
        """Starts the clock.

        Args:
            workers: Worker processes of this rank.
            device: The device of the model.
            ranks: Ranks that split the global batch with this one, itself included.
        """
        self.start, self.before_s = time.monotonic(), 0.0
        self._ranks = ranks
        self._workers, self._on_gpu = workers, device.type == "cuda"
        self._clips, self._waited_s, self.excluded_s = 0, 0.0, 0.0
        self._window_start = Throughput(0, 0.0, 0.0)
        self._window_steps = 0
        self._warm = False  # becomes True after the first window, in which workers start and caches fill
        self._tolerated_fraction = self.WARN_FRACTION

    def timed(self, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Yields the same steps. The time until a step arrives counts as waiting."""
        while True:
            before = time.monotonic()
            step = next(steps, None)
            if step is None:
                return
            self._waited_s += time.monotonic() - before
            self._clips += sum(len(batch.labels) for batch in step)
            yield step
            self._end_step()

    def exclude(self, seconds: float) -> None:
        """Leaves out a time that was spent on something else than training, namely on a validation."""
        self.excluded_s += seconds

    def seconds(self) -> float:
        """Returns the seconds of training so far, with validations and with those of earlier calls."""
        return self.before_s + time.monotonic() - self.start

    def since_start(self) -> Throughput:
        """Returns the throughput of this rank since the start, without the excluded time."""
        return Throughput(self._clips, time.monotonic() - self.start - self.excluded_s, self._waited_s)

    def rates(self) -> dict[str, float]:
        """Returns `clips_per_s` of all ranks and `wait_fraction` of this rank, since the start."""
        throughput = self.since_start()
        return {"clips_per_s": throughput.clips_per_s * self._ranks, "wait_fraction": throughput.wait_fraction}

    def _end_step(self) -> None:
        """Ends the window if it is long enough, and warns."""
        self._window_steps += 1
        window = self.since_start() - self._window_start
        if self._window_steps < self.WINDOW_STEPS or window.seconds < self.WINDOW_S:
            return
        if self._warm and window.wait_fraction > self._tolerated_fraction:
            advise(window.starvation_warning(self._workers, cpu_limit(), on_gpu=self._on_gpu))
            self._tolerated_fraction = window.wait_fraction + self.WARN_AGAIN
        self._window_start, self._window_steps, self._warm = self.since_start(), 0, True
