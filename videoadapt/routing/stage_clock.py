"""Where the time of routing goes: seconds by stage, of the host's clock, of its processors, and of a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Stage = Literal["transfer", "assign", "preprocess", "model"]


class StageClock:
    """Adds up the seconds of each stage.

    On a GPU, work runs after the host has launched it, so that the host's clock tells nothing: events on the GPU's
    streams measure it, and `seconds` waits for the last one.

    Args:
        device: The device of the model. The processor time of routing begins here, in this thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # On a CPU, operations run in many threads. On a GPU, stages of several threads overlap, and each stage must
        # count its own thread alone.
        self._cpu_clock = time.thread_time if self._on_gpu else time.process_time
        self._thread, self._begun_s = threading.get_ident(), self._cpu_clock()
        self._wall_s: dict[str, float] = {}
        self._cpu_s: dict[str, float] = {}
        self._beside_s = 0.0  # processor seconds of stages in other threads
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def of(self, stage: Stage) -> Iterator[None]:
        """Counts the time inside the context for a stage, on the current stream."""
        cpu_s, wall_s = self._cpu_clock(), time.perf_counter()
        begin = self._event()
        yield
        if begin is not None:
            end = self._event()
            assert end is not None
            self._events.append((stage, begin, end))
        else:
            self._wall_s[stage] = self._wall_s.get(stage, 0.0) + time.perf_counter() - wall_s
        spent_s = self._cpu_clock() - cpu_s
        self._cpu_s[stage] = self._cpu_s.get(stage, 0.0) + spent_s
        if threading.get_ident() != self._thread:
            self._beside_s += spent_s

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by stage: of the GPU if there is one, otherwise of the clock on the wall."""
        for stage, begin, end in self._events:
            end.synchronize()
            self._wall_s[stage] = self._wall_s.get(stage, 0.0) + begin.elapsed_time(end) / 1000  # milliseconds
        self._events = []
        return dict(self._wall_s)

    def cpu_seconds(self) -> dict[str, float]:
        """Returns the processor seconds by stage: on a CPU over all threads, on a GPU of the thread that launches.

        `route` is what the stages of this thread leave of its time since the clock was made.
        """
        spent_s = self._cpu_clock() - self._begun_s
        return self._cpu_s | {"route": max(0.0, spent_s - sum(self._cpu_s.values()) + self._beside_s)}

    def _event(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
