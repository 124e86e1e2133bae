"""Training batches, and a stream of evaluation videos, read by worker processes.

Workers deliver single clips, not whole batches. The first step is then ready sooner, a timeout applies to one clip, and
the amount of waiting data in shared memory does not grow with the number of workers.
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
from videoadapt.data.clips.datasets import Clip, EvalVideos, Failure, TrainClips, VideoViews
from videoadapt.data.clips.token_labels import TokenLabels, collate_label_maps
from videoadapt.data.clips.workers import read_items
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError, UserError, plural
from videoadapt.runtime.machine import worker_count
from videoadapt.runtime.seeds import seed_of

_CPU = torch.device("cpu")
_STEPS_AHEAD, _AHEAD_BYTES = 4, 1 << 30  # of waiting clips, the less of the two
_FAILURE_WINDOW = 256  # clips; the run stops if more than half of the latest ones failed


@dataclass
class Batch:
    """One micro-batch of one rank: B clips. B is smaller than planned, down to 0, if videos fail.

    Attributes:
        clips: (B, C, T, S, S) uint8, on the training device.
        labels: (B,) int64, on the training device.
        videos: (B,) int64, rows in the manifest, on the CPU.
        positions: Position of each clip in the step, counted over all ranks.
        failures: The videos that failed.
        tokens: Label maps, with `data.token_labels`, on the training device.
    """

    clips: Tensor
    labels: Tensor
    videos: Tensor
    positions: list[int]
    failures: list[Failure]
    tokens: TokenLabels | None = None

    def without_clips(self) -> Batch:
        """Returns an empty batch with the same failures, for a rank that has nothing to train in this step."""
        return replace(
            self, clips=self.clips[:0], labels=self.labels[:0], videos=self.videos[:0], positions=[], tokens=None
        )


class ClipSource(Protocol):
    """Exchanges clips between ranks that share the decoding. `training/exchange.py` implements it."""

    read: range
    """Positions, in a step of all ranks, of the clips that this rank decodes."""

    def exchanged(self, clips: Iterator[Clip | Failure], steps: Iterable[np.ndarray]) -> Iterator[Clip | Failure]:
        """Yields the clips that this rank trains, in order of position.

        Args:
            clips: The clips that this rank decodes, in order of position, step after step.
            steps: The manifest rows of the clips in each step, (train.batch,) int64.
        """


def steps_per_epoch(manifest: Manifest, config: Config) -> int:
    """Returns the number of whole steps of `train.batch` clips in the readable training videos.

    Raises:
        UserError: There are too few videos for one step.
    """
    videos = len(manifest.readable_rows("train"))
    if videos < config.train.batch:
        raise UserError(
            f"train.batch: {plural(config.train.batch, 'clip')} a step, but only {plural(videos, 'train video')} can "
            "be read; lower train.batch or add videos"
        )
    return videos // config.train.batch


def epoch_rows(manifest: Manifest, config: Config, epoch: int) -> np.ndarray:
    """Returns the manifest rows of an epoch in training order.

    The order depends on (manifest, run.seed, epoch, train.batch) alone. An incomplete last step is dropped.

    Returns:
        (steps, micro-batches of a step, clips of a micro-batch) int64.
    """
    steps, train = steps_per_epoch(manifest, config), config.train
    order = np.random.default_rng(seed_of("order", config.run.seed, epoch)).permutation(manifest.readable_rows("train"))
    # (videos,) -> (steps, accumulate, batch / accumulate)
    return order[: steps * train.batch].reshape(steps, train.accumulate, train.micro_batch)


def train_batches(
    manifest: Manifest,
    config: Config,
    start: int = 0,
    *,
    device: torch.device = _CPU,
    positions: Callable[[int], range] = range,
    exchange: ClipSource | None = None,
) -> Iterator[list[Batch]]:
    """Yields every training step from `start` to the end of the last epoch.

    The content of a step depends on (manifest, config, step) alone, not on the number of workers or on `start`. Steps
    before `start` are not decoded. Workers read ahead into the next epoch.

    Args:
        manifest: The videos.
        config: The batch size, the epochs, the seed and the augmentation are used.
        start: Number of the first step.
        device: The device for clips, labels and label maps.
        positions: Maps the number of clips in a micro-batch to the positions that this rank trains. Default: all.
        exchange: If given, this rank decodes `exchange.read` and receives the other clips. Every rank must have one.

    Yields:
        The `train.accumulate` micro-batches of a step.

    Raises:
        RunError: A worker died or exceeded `data.timeout_s` (the message names the files), or most videos fail.
        UserError: There are too few videos for one step.
    """
    on_gpu = device.type == "cuda"
    local = positions(config.train.micro_batch)  # positions of this rank inside each micro-batch
    # Position, in the step, of this rank's first clip of each micro-batch.
    firsts = [micro_batch * config.train.micro_batch + local.start for micro_batch in range(config.train.accumulate)]
    trained = [first + number for first in firsts for number in range(len(local))]
    read = trained if exchange is None else list(exchange.read)
    epoch_clips = steps_per_epoch(manifest, config) * len(read)
    schedule, ahead = itertools.tee(_scheduled_steps(manifest, config, start))  # workers run ahead of training
    keys = ((epoch, row) for epoch, rows in ahead for row in rows[read].tolist())
    workers = min(worker_count(config.data.workers), epoch_clips)
    # An exchange packs clips into messages on the CPU, so pinning them would be a wasted copy.
    ahead_steps = steps_ahead(len(read) * clip_bytes(config))
    pin = on_gpu and exchange is None
    items = read_items(TrainClips(manifest, config), keys, workers, ahead=ahead_steps * len(read), pin=pin)
    clips = _stop_if_most_fail(items, min(_FAILURE_WINDOW, epoch_clips))
    if exchange is not None:
        schedule, exchanged = itertools.tee(schedule)
        clips = exchange.exchanged(clips, (rows for _, rows in exchanged))
    steps = ([_collate(itertools.islice(clips, len(local)), first, device) for first in firsts] for _ in schedule)
    yield from _copy_one_step_ahead(steps, device) if on_gpu else steps


def clip_bytes(config: Config) -> int:
    """Returns the size of a training clip: uint8 RGB."""
    return 3 * config.model.num_frames * config.model.size**2


def steps_ahead(step_bytes: int) -> int:
    """Returns how many steps workers read ahead: several, since some files take much longer than others.

    Args:
        step_bytes: The clips of a step that this rank reads. They wait in shared memory, which is half of a machine's.
            0 where other ranks read all clips: more ranks share the decoding than a step has clips.
    """
    return max(1, min(_STEPS_AHEAD, _AHEAD_BYTES // max(step_bytes, 1)))


def stream(dataset: EvalVideos, rows: Sequence[int]) -> Iterator[VideoViews | Failure]:
    """Yields the videos of the given manifest rows, one by one, in the given order.

    Raises:
        RunError: A worker died or exceeded `data.timeout_s`.
    """
    return read_items(dataset, rows, min(worker_count(dataset.config.data.workers), len(rows)))


def _scheduled_steps(manifest: Manifest, config: Config, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the epoch and the manifest rows (train.batch,) of every step from `start` on."""
    per_epoch = steps_per_epoch(manifest, config)
    for epoch in range(start // per_epoch, config.train.epochs):
        for rows in epoch_rows(manifest, config, epoch)[max(0, start - epoch * per_epoch) :]:
            yield epoch, rows.reshape(-1)  # (accumulate, batch / accumulate) -> (batch,)


def _collate(items: Iterable[Clip | Failure], first: int, device: torch.device) -> Batch:
    """Makes a batch of clips with consecutive positions in the step, from `first` on."""
    every = list(items)
    clips = [item for item in every if isinstance(item, Clip)]
    frames = [clip.frames.to(device, non_blocking=True) for clip in clips]
    labels = torch.tensor([clip.label for clip in clips], dtype=torch.int64, pin_memory=device.type == "cuda")
    maps = [clip.tokens for clip in clips if clip.tokens is not None]
    return Batch(
        # One `stack`: with a copy per clip, each copy on a CPU would wake all threads of torch, which then spin.
        clips=torch.stack(frames) if frames else torch.empty((0,) * 5, dtype=torch.uint8, device=device),
        labels=labels.to(device, non_blocking=True),
        videos=torch.tensor([clip.video for clip in clips], dtype=torch.int64),
        positions=[first + number for number, item in enumerate(every) if isinstance(item, Clip)],
        failures=[item for item in every if isinstance(item, Failure)],
        tokens=collate_label_maps(maps, device) if maps else None,
    )


def _copy_one_step_ahead(steps: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Yields the steps unchanged. A second CUDA stream copies each step to the GPU during the step before it."""
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
                # Otherwise the allocator could reuse the memory for the next copy while it is still being read.
                tensor.record_stream(computing)
        yield step


def _stop_if_most_fail(items: Iterable[Clip | Failure], window: int) -> Iterator[Clip | Failure]:
    """Yields the items unchanged. Raises `RunError` once more than half of the latest `window` items are failures."""
    failed: deque[bool] = deque(maxlen=window)
    for item in items:
        failed.append(isinstance(item, Failure))
        # A full window: a few failures at the start do not stop a run.
        if isinstance(item, Failure) and len(failed) == window and (count := sum(failed)) > window / 2:
            raise RunError(
                f"{count} of the last {window} training clips ({count / window:.0%}) cannot be read; the latest is "
                f"{item.path}: {item.cause}"
            )
        yield item
