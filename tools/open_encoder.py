"""Opens an encoder of PyAV, for `resize_videos.py` and the tests."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext


def open_encoder(context: VideoCodecContext) -> None:
    """Opens an encoder, then restores the scheduling policy of this process.

    SVT-AV1 run as root gives real-time priority (SCHED_FIFO 99) to its threads and to the calling thread, and every
    process that is started later inherits it. A process that polls with this priority takes a whole core from all
    others. This function gives every thread the policy that the caller had before.

    Args:
        context: Codec context of a PyAV stream, with all options set.

    Raises:
        av.FFmpegError: The encoder refuses its options.
    """
    if not hasattr(os, "sched_setscheduler"):  # not on macOS
        context.open()
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        context.open()
    finally:
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(ProcessLookupError):  # the thread has ended since
                if os.sched_getscheduler(thread) != before[0]:
                    os.sched_setscheduler(thread, *before)
