"""Queues of views that wait for a batch, one for each point. They know nothing of models, threads or real clocks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Waiting(Generic[T]):
    """One view that waits."""

    view: T
    arrived_s: float  # when its video arrived


class Queues(Generic[T]):
    """One queue for each point, which is ready when it holds a batch, or when its oldest view is due.

    A view is due early enough that its pass can end `max_wait_s` after the arrival: the duration of the point's latest
    pass is taken off.

    Args:
        batches: Views of a full batch, by point.
        max_wait_s: Longest time from the arrival of a view to the end of its pass, if no other pass is in the way.
            None: queues wait until they are full.
    """

    def __init__(self, batches: Mapping[int, int], max_wait_s: float | None) -> None:
        self.batches, self.max_wait_s = dict(batches), max_wait_s
        self._queues: dict[int, deque[Waiting[T]]] = {point: deque() for point in batches}
        self._pass_s = dict.fromkeys(batches, 0.0)

    def add(self, point: int, view: T, arrived_s: float) -> None:
        """Appends a view to the queue of a point."""
        self._queues[point].append(Waiting(view, arrived_s))

    def full(self) -> int | None:
        """Returns the point with the most batches that are full; None if no batch is."""
        return max(
            (point for point, queue in self._queues.items() if len(queue) >= self.batches[point]),
            key=lambda point: len(self._queues[point]) / self.batches[point],
            default=None,
        )

    def due(self, now_s: float) -> int | None:
        """Returns the point whose oldest view is due first, if it is due at `now_s`; otherwise None."""
        point = min(self._queues, key=self._due_s)
        return point if self._due_s(point) <= now_s else None

    def next_due_s(self) -> float:
        """Returns the time at which the next view is due; infinity if none ever is."""
        return min(map(self._due_s, self._queues))

    @property
    def waiting(self) -> set[int]:
        """The points whose queues are not empty."""
        return {point for point, queue in self._queues.items() if queue}

    def take(self, point: int) -> list[T]:
        """Removes a batch of a point, or the fewer views that wait, and returns them, oldest first."""
        queue = self._queues[point]
        return [queue.popleft().view for _ in range(min(len(queue), self.batches[point]))]

    def passed(self, point: int, seconds: float) -> None:
        """Records the duration of a point's pass."""
        self._pass_s[point] = seconds

    def _due_s(self, point: int) -> float:
        queue = self._queues[point]
        if not queue or self.max_wait_s is None:
            return math.inf
        # Not that of the first: a view of a later round may stand behind a clip that arrived after its own.
        arrived_s = min(waiting.arrived_s for waiting in queue)
        return arrived_s + self.max_wait_s - self._pass_s[point]
