"""What processes hold of the machine's memory, as Linux counts it."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from videoadapt.data.clips.loader import train_batches
from videoadapt.performance.bench.loaders import Work, reading_with

_WORKERS = 2
_EVERY_S = 0.005  # a clip takes ten times as long, or more


@dataclass(frozen=True)
class Memory:
    """Of one process, in KB: what it has for itself (USS), that and its part of what is shared (PSS), all (RSS)."""

    rss: int
    pss: int
    uss: int


def memory(pid: int) -> Memory:
    """What the kernel says of a process now. Raises `OSError` if it is gone, or the system is not Linux."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    kb = {name.rstrip(":"): int(value) for name, value, *_ in map(str.split, lines)}
    return Memory(kb["Rss"], kb["Pss"], kb["Private_Clean"] + kb["Private_Dirty"])


def peak(samples: Iterable[Memory]) -> Memory:
    """The largest of each number."""
    return Memory(*(max(values) for values in zip(*((s.rss, s.pss, s.uss) for s in samples), strict=True)))


def worker_memory(work: Work, reader: Literal["auto", "pyav"], clips: int) -> Memory | None:
    """The peak of the training loader's workers while they read `clips` clips of the work's videos, or a few more.

    None where the system does not tell. Raises `RunError` if a worker dies, or most videos fail.
    """
    config = reading_with(work.config, reader)
    videos = int((work.manifest["status"] == "ok").sum())
    data = config.data.model_copy(update={"workers": _WORKERS})
    train = config.train.model_copy(update={"batch": 1, "accumulate": 1, "epochs": 1 + -(-clips // videos)})
    config = config.model_copy(update={"data": data, "train": train})
    batches = train_batches(work.manifest, config)
    next(batches)  # starts the workers
    pids = [process.pid or 0 for process in multiprocessing.active_children()]
    samples: list[Memory] = []
    done = threading.Event()
    sampler = threading.Thread(target=_sample, args=(pids, samples, done))
    sampler.start()
    try:
        for _ in batches:
            pass
    finally:
        done.set()
        sampler.join()
    return peak(samples) if samples else None


def _sample(pids: Sequence[int], samples: list[Memory], done: threading.Event) -> None:
    while not done.wait(_EVERY_S):
        for pid in pids:
            with suppress(OSError):
                samples.append(memory(pid))
