"""Batches for training and a stream of videos for evaluation, from worker processes that only read and crop.

Workers deliver clip by clip: the first step is there sooner than if one worker made it whole, a timeout is that of one
clip, and what waits in shared memory does not grow with the number of workers.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.data.clips import token_labels as tokenlabels
from videoadapt.data.clips.datasets import Clip, EvalVideos, Failure, TrainClips, VideoViews
from videoadapt.data.clips.token_labels import TokenLabels
from videoadapt.data.clips.workers import _read
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError, UserError
from videoadapt.runtime.machine import worker_count
from videoadapt.runtime.seeds import seed_of

_CPU = torch.device("cpu")
_FAILURES_WATCHED = 256  # clips; a run stops if more than half of the last ones failed


@dataclass
class Batch:
    """B clips (B, C, T, S, S) uint8, their labels and their videos' rows in the manifest, (B,) int64.

    `positions` are the clips' places in the step of all ranks. Clips, labels and `tokens` (with `data.token_labels`)
    are on the device that was asked for, the rest on the host. B is smaller than asked for, down to 0, by the videos
    that failed.
    """

    clips: Tensor
    labels: Tensor
    videos: Tensor
    positions: list[int]
    failures: list[Failure]
    tokens: TokenLabels | None = None

    def without_clips(self) -> Batch:
        """The batch of a rank that has nothing to do."""
        return replace(
            self, clips=self.clips[:0], labels=self.labels[:0], videos=self.videos[:0], positions=[], tokens=None
        )


class ClipSource(Protocol):
    """What gives a rank the clips that it trains, where ranks share the decoding: see `training/exchange`."""

    read: range
    """Positions, in a step of all ranks, of the clips that this rank decodes."""

    def exchanged(self, clips: Iterator[Clip | Failure], steps: Iterable[np.ndarray]) -> Iterator[Clip | Failure]:
        """The clips that this rank trains, in order, for those that it decodes; `steps` are manifest rows."""


def steps_per_epoch(manifest: Manifest, config: Config) -> int:
    """Whole steps of `train.batch` clips in the readable train videos. Raises `UserError` if there is not one."""
    videos = len(_train_rows(manifest))
    if videos < config.train.batch:
        raise UserError(f"train.batch: {config.train.batch} clips a step, but only {videos} train videos can be read")
    return videos // config.train.batch


def epoch_rows(manifest: Manifest, config: Config, epoch: int) -> np.ndarray:
    """The manifest rows of an epoch in its order, (steps, parts of a step, clips of a part) int64.

    Depends on (manifest, run.seed, epoch) and the sizes of steps and parts alone. An incomplete step is dropped.
    """
    steps, train = steps_per_epoch(manifest, config), config.train
    order = np.random.default_rng(seed_of("order", config.run.seed, epoch)).permutation(_train_rows(manifest))
    return order[: steps * train.batch].reshape(steps, train.accumulate, train.batch // train.accumulate)


def train_batches(
    manifest: Manifest,
    config: Config,
    start: int = 0,
    *,
    device: torch.device = _CPU,
    positions: Callable[[int], range] = range,
    exchange: ClipSource | None = None,
) -> Iterator[list[Batch]]:
    """Every training step from `start` to the end of the last epoch: its `train.accumulate` parts, on `device`.

    What a step holds depends on (manifest, config, step), not on the number of workers, nor on `start`. `share` says
    which positions of a part's clips this rank trains, given their number; without it, all. It reads these, or its part
    of an `exchange`, which every rank must then have. Nothing before `start` is decoded. Workers read on into the next
    epoch. Raises `RunError` if a worker dies or does not answer within `data.timeout_s`, naming the files, and if most
    videos fail.
    """
    on_gpu = device.type == "cuda"
    part_clips = config.train.batch // config.train.accumulate
    own = positions(part_clips)
    first = [part * part_clips + own.start for part in range(config.train.accumulate)]  # position of each part
    trained = [position + number for position in first for number in range(len(own))]
    read = trained if exchange is None else list(exchange.read)
    epoch_clips = steps_per_epoch(manifest, config) * len(read)
    plan, ahead = itertools.tee(_plan(manifest, config, start))
    keys = ((epoch, row) for epoch, rows in ahead for row in rows[read].tolist())
    workers = min(worker_count(config.data.workers), epoch_clips)
    items = _read(TrainClips(manifest, config), keys, workers, ahead=len(read), pin=on_gpu and exchange is None)
    clips = _unless_most_fail(items, min(_FAILURES_WATCHED, epoch_clips))
    if exchange is not None:
        plan, sent = itertools.tee(plan)
        clips = exchange.exchanged(clips, (rows for _, rows in sent))
    steps = ([_gather(itertools.islice(clips, len(own)), position, device) for position in first] for _ in plan)
    yield from _one_ahead(steps, device) if on_gpu else steps


def stream(dataset: EvalVideos, rows: Sequence[int]) -> Iterator[VideoViews | Failure]:
    """The videos of some rows, one by one and in this order. Raises `RunError` if a worker dies or is late."""
    return _read(dataset, rows, min(worker_count(dataset.config.data.workers), len(rows)))


def _train_rows(manifest: Manifest) -> np.ndarray:
    return np.flatnonzero((manifest["split"] == "train") & (manifest["status"] == "ok"))


def _plan(manifest: Manifest, config: Config, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """Epoch and manifest rows, (clips of a step,), of every step from `start` on."""
    per_epoch = steps_per_epoch(manifest, config)
    for epoch in range(start // per_epoch, config.train.epochs):
        for step in epoch_rows(manifest, config, epoch)[max(0, start - epoch * per_epoch) :]:
            yield epoch, step.reshape(-1)


def _gather(items: Iterable[Clip | Failure], first: int, device: torch.device) -> Batch:
    """A batch of clips that lie one after the other in the step, from position `first` on."""
    every = list(items)
    clips = [item for item in every if isinstance(item, Clip)]
    frames = [clip.frames.to(device, non_blocking=True) for clip in clips]
    labels = torch.tensor([clip.label for clip in clips], dtype=torch.int64, pin_memory=device.type == "cuda")
    maps = [clip.tokens for clip in clips if clip.tokens is not None]
    return Batch(
        # At once: copied one by one on a CPU, each clip would wake all of torch's threads, which then spin.
        clips=torch.stack(frames) if frames else torch.empty((0,) * 5, dtype=torch.uint8, device=device),
        labels=labels.to(device, non_blocking=True),
        videos=torch.tensor([clip.video for clip in clips], dtype=torch.int64),
        positions=[first + number for number, item in enumerate(every) if isinstance(item, Clip)],
        failures=[item for item in every if isinstance(item, Failure)],
        tokens=tokenlabels.gather(maps, device) if maps else None,
    )


def _one_ahead(steps: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The same steps; each is copied to the GPU, on a stream of its own, while the one before it is computed."""
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch() -> tuple[list[Batch] | None, torch.cuda.Event]:
        with torch.cuda.stream(copying):
            return next(steps, None), copying.record_event()

    following, copied = fetch()
    while following is not None:
        step, ready = following, copied
        following, copied = fetch()
        computing.wait_event(ready)
        for batch in step:
            for tensor in (batch.clips, batch.labels, *(batch.tokens or ())):
                tensor.record_stream(computing)  # else its memory could be given to the next copy too early
        yield step


def _unless_most_fail(items: Iterable[Clip | Failure], window: int) -> Iterator[Clip | Failure]:
    """The same items. Raises `RunError` once more than half of the last `window` are failures."""
    failed: deque[bool] = deque(maxlen=window)
    for item in items:
        failed.append(isinstance(item, Failure))
        if isinstance(item, Failure) and len(failed) == window and (count := sum(failed)) > window / 2:
            raise RunError(
                f"{count} of the last {window} training clips ({count / window:.0%}) cannot be read, at last "
                f"{item.path}: {item.cause}"
            )
        yield item
