"""Measures the frame rate of a video from the timestamps of its frames. The functions open no video.

A timestamp is a number of ticks; the time base of a container is the length of a tick. Matroska rounds to 1 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, TypeGuard

import numpy as np

MAX_FPS = 10_000.0  # timestamps or headers with a higher rate are broken; high-speed cameras state about 1000
_ROUNDING = 1e-6  # of a tick, for floating-point arithmetic


class Rate(NamedTuple):
    """The frame rate of a video. It is variable if the frames are not evenly spaced, to one tick of the container."""

    fps: float  # the mean, if the rate is variable
    variable: bool


def frame_rate(
    ticks: Sequence[int | None], tick_s: Fraction | None, stated: Sequence[Fraction | None], default: Fraction | None
) -> Rate | None:
    """Returns the frame rate by the timestamps of a video, or a stated one if they are missing or broken.

    A stated rate is kept if the frames are evenly spaced and the rate agrees with their times.

    Args:
        ticks: Timestamps of all frames, in any order; None where a frame has none.
        tick_s: Length of a tick in seconds; None if unknown.
        stated: Rates of the container's header, the most reliable first.
        default: The rate of a video whose timestamps are missing or broken.

    Returns:
        The rate, or None if neither the timestamps nor `default` are usable.
    """
    times = usable_times(ticks, tick_s)
    if times is None or tick_s is None:
        return Rate(float(default), variable=False) if default is not None else None
    steps = len(times) - 1
    measured = float(steps / (int(times[-1]) * tick_s))
    if not _evenly_spaced(times, times[-1] / steps):
        return Rate(measured, variable=True)
    for rate in stated:
        # The end of the video by this rate is at most a frame too early or too late.
        if is_rate(rate) and abs(len(times) / float(rate) - len(times) / measured) <= 1 / measured:
            return Rate(float(rate), variable=False)
    return Rate(measured, variable=False)


def usable_times(ticks: Sequence[int | None], tick_s: Fraction | None) -> np.ndarray | None:
    """Returns timestamps in display order, counted from the first frame: (F,) int64 ticks.

    Returns None if they do not show when frames are displayed: one is missing, there is only one, many are equal (a
    few may be, where a tick is long), or their rate is `MAX_FPS` or more.
    """
    known = [tick for tick in ticks if tick is not None]
    if tick_s is None or len(known) < max(len(ticks), 2):
        return None
    times = np.sort(np.array(known, np.int64))
    times -= times[0]
    if 2 * len(np.unique(times)) <= len(times) or (len(times) - 1) / (int(times[-1]) * float(tick_s)) >= MAX_FPS:
        return None
    return times


def _evenly_spaced(times: np.ndarray, step: float) -> bool:
    """Returns whether each time is at most a tick from a multiple of `step`."""
    return bool(np.abs(times - np.arange(len(times)) * step).max() <= 1 + _ROUNDING)


def is_rate(rate: Fraction | None) -> TypeGuard[Fraction]:
    """Returns whether a stated rate may be right."""
    return rate is not None and 0 < rate < MAX_FPS
