"""Measures the memory of processes, and of the training loader's workers while they read."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

from videoadapt.data.clips.loader import train_batches
from videoadapt.performance.bench.loaders import Work, reading_with

_WORKERS = 2
_EVERY_S = 0.005  # between samples; reading a clip takes at least ten times as long, so that no peak is missed
_KIB = 1 << 10


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, in KiB."""

    rss: int  # resident set: all pages, shared pages in full
    pss: int  # proportional set: shared pages divided by the number of processes that share them
    uss: int  # unique set: pages of this process alone


def process_memory(pid: int) -> ProcessMemory:
    """Returns the current memory of a process. Linux only: other systems have no PSS.

    Raises:
        psutil.Error: The process has ended, or belongs to another user.
    """
    info = psutil.Process(pid).memory_full_info()
    if info.rss == 0:  # psutil reads the RSS last; the process has ended since it read the rest
        raise psutil.NoSuchProcess(pid)
    return ProcessMemory(rss=info.rss // _KIB, pss=info.pss // _KIB, uss=info.uss // _KIB)


def peak(samples: Iterable[ProcessMemory]) -> ProcessMemory:
    """Returns the maximum of each field over the samples."""
    return ProcessMemory(*(max(values) for values in zip(*((s.rss, s.pss, s.uss) for s in samples), strict=True)))


def worker_memory(work: Work, reader: Literal["auto", "pyav"], clips: int) -> ProcessMemory | None:
    """Measures the peak memory of the training loader's workers.

    Args:
        work: Gives the videos and the config.
        reader: The value of `data.reader`.
        clips: The least number of clips to read; the workers read whole epochs.

    Returns:
        The maximum over workers and time; None on other systems than Linux.

    Raises:
        RunError: A worker dies, or most videos fail.
    """
    if sys.platform != "linux":
        return None
    config = reading_with(work.config, reader)
    videos = len(work.manifest.readable)
    data = config.data.model_copy(update={"workers": _WORKERS})
    epochs = 1 + -(-clips // videos)
    train = config.train.model_copy(update={"batch": 1, "accumulate": 1, "epochs": epochs})
    config = config.model_copy(update={"data": data, "train": train})
    batches = train_batches(work.manifest, config)
    next(batches)  # starts the workers
    pids = [process.pid or 0 for process in multiprocessing.active_children()]
    samples = _sample(pids)  # at least one, also if all clips are read before the thread runs
    done = threading.Event()
    sampler = threading.Thread(target=_sample_until, args=(done, pids, samples))
    sampler.start()
    try:
        for _ in batches:
            pass
    finally:
        done.set()
        sampler.join()
    return peak(samples) if samples else None


def _sample_until(done: threading.Event, pids: Sequence[int], samples: list[ProcessMemory]) -> None:
    while not done.wait(_EVERY_S):
        samples += _sample(pids)


def _sample(pids: Sequence[int]) -> list[ProcessMemory]:
    samples = []
    for pid in pids:
        with suppress(psutil.Error):  # a worker may have ended
            samples.append(process_memory(pid))
    return samples
