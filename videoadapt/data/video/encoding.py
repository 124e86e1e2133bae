"""Encoders, opened so that they change nothing but the video."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext


def open_encoder(context: VideoCodecContext) -> None:
    """Opens it; afterwards every thread of this process has the scheduling policy that the caller had before.

    SVT-AV1, run as root, makes its threads and the caller's real-time ones (SCHED_FIFO 99). So would be every process
    started after that, and one that polls would leave no time to any other on its core. Raises `av.FFmpegError`.
    """
    if not hasattr(os, "sched_setscheduler"):
        context.open()
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        context.open()
    finally:
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(ProcessLookupError):  # it has ended
                if os.sched_getscheduler(thread) != before[0]:
                    os.sched_setscheduler(thread, *before)
