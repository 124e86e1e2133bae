"""Batches for training and a stream of videos for evaluation, from worker processes that only read and crop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from videoadapt.cluster import slurm_job
from videoadapt.config import Config
from videoadapt.data.datasets import Clip, EvalVideos, Failure, TrainClips, VideoViews
from videoadapt.data.manifest import Manifest
from videoadapt.data.sampling import seed_of
from videoadapt.errors import RunError, UserError
from videoadapt.runtime import worker_count
from videoadapt.stopping import WARNINGS


@dataclass
class Batch:
    """B clips (B, C, T, S, S) uint8, their labels and their videos' rows in the manifest, (B,) int64.

    B is smaller than asked for, down to 0, by the videos that failed.
    """

    clips: Tensor
    labels: Tensor
    videos: Tensor
    failures: list[Failure]

    def pin_memory(self) -> Batch:
        """For the loader, which copies it to page-locked memory where there is a GPU."""
        return Batch(self.clips.pin_memory(), self.labels.pin_memory(), self.videos.pin_memory(), self.failures)


def steps_per_epoch(manifest: Manifest, config: Config) -> int:
    """Whole steps of `train.batch` clips in the readable train videos. Raises `UserError` if there is not one."""
    videos = len(_train_rows(manifest))
    if videos < config.train.batch:
        raise UserError(f"train.batch: {config.train.batch} clips a step, but only {videos} train videos can be read")
    return videos // config.train.batch


class TrainLoader:
    """The train split's batches, epoch by epoch; its workers live as long as it does.

    What an epoch holds depends on (manifest, config, epoch), not on the number of workers, nor on where it starts.
    """

    def __init__(self, manifest: Manifest, config: Config) -> None:
        self._rows, self._config = _train_rows(manifest), config
        self._steps = steps_per_epoch(manifest, config)
        self._keys: list[list[tuple[int, int]]] = []  # the loader goes through this list anew in each epoch
        self._workers = min(worker_count(config.data.workers), self._steps * config.train.accumulate)
        self._loader: DataLoader[Any] = DataLoader(
            TrainClips(manifest, config),
            batch_sampler=self._keys,
            collate_fn=_collate,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            timeout=config.data.timeout_s if self._workers else 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the loader draws a seed an epoch: not from the stream that drop path uses
            pin_memory=torch.cuda.is_available() and config.run.device != "cpu",
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of `train.batch / train.accumulate` clips in the epoch's order, without the first `start`.

        Those are not decoded. An incomplete step at the end is dropped. Raises `RunError` if a worker dies, or does not
        answer within `data.timeout_s`.
        """
        self._keys[:] = self._order(epoch)[start:]
        return _guarded(self._loader, self._config.data.timeout_s)

    def _order(self, epoch: int) -> list[list[tuple[int, int]]]:
        train = self._config.train
        rng = np.random.default_rng(seed_of("order", self._config.run.seed, epoch))
        rows = rng.permutation(self._rows)[: self._steps * train.batch].tolist()
        part = train.batch // train.accumulate
        return [[(epoch, row) for row in rows[first : first + part]] for first in range(0, len(rows), part)]


def stream(dataset: EvalVideos, rows: Sequence[int]) -> Iterator[VideoViews | Failure]:
    """The videos of some rows, one by one and in this order. Raises `RunError` as `TrainLoader.epoch` does."""
    data = dataset.config.data
    workers = min(worker_count(data.workers), len(rows))
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=rows,
        collate_fn=_as_is,
        num_workers=workers,
        timeout=data.timeout_s if workers else 0,
        worker_init_fn=_start_worker,
    )
    return _guarded(loader, data.timeout_s)


def _train_rows(manifest: Manifest) -> np.ndarray:
    return np.flatnonzero((manifest["split"] == "train") & (manifest["status"] == "ok"))


def _collate(items: Sequence[Clip | Failure]) -> Batch:
    clips = [item for item in items if isinstance(item, Clip)]
    return Batch(
        clips=torch.stack([clip.frames for clip in clips]) if clips else torch.empty((0,) * 5, dtype=torch.uint8),
        labels=torch.tensor([clip.label for clip in clips], dtype=torch.int64),
        videos=torch.tensor([clip.video for clip in clips], dtype=torch.int64),
        failures=[item for item in items if isinstance(item, Failure)],
    )


def _as_is(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    # Ctrl-C reaches the whole process group: the main process decides what follows. A handler of SIGTERM that it has
    # installed must not keep workers alive.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if slurm_job(os.environ) is not None:  # its signals reach workers too, which must live until the job has saved
        for warning in WARNINGS:
            signal.signal(warning, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    torch.set_num_threads(1)


def _guarded(loader: DataLoader[Any], timeout_s: float) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as error:  # the loader's class for a worker that died or is late
        message = str(error).strip().splitlines()[0]
        raise RunError(
            f"reading videos failed: {message}. A worker that was killed may lack memory or /dev/shm; "
            f"one that is late, a file system that answers within data.timeout_s={timeout_s:g}"
        ) from error
