"""Batches for training and a stream of videos for evaluation, from worker processes that only read and crop.

Workers deliver clip by clip: the first step is there sooner than if one worker made it whole, a timeout is that of one
clip, and what waits in shared memory does not grow with the number of workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from videoadapt.config.load import Config
from videoadapt.data.clips import token_labels as tokenlabels
from videoadapt.data.clips.datasets import Clip, EvalVideos, Failure, TrainClips, VideoViews
from videoadapt.data.clips.token_labels import TokenLabels
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError, UserError
from videoadapt.runtime.machine import worker_count
from videoadapt.runtime.seeds import seed_of
from videoadapt.runtime.signals import WARNINGS
from videoadapt.runtime.slurm import slurm_job
from videoadapt.training.exchange import ClipExchange

T = TypeVar("T")

_CPU = torch.device("cpu")
_FAILURES_WATCHED = 256  # clips; a run stops if more than half of the last ones failed
_AHEAD_PER_WORKER = 64  # clips at most; each that waits holds a file descriptor of its worker
_LOOK_EVERY_S = 2.0  # while waiting: whether a worker has died
_FILES_NAMED = 4


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
    share: Callable[[int], range] = range,
    exchange: ClipExchange | None = None,
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
    own = share(part_clips)
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


def _read(
    dataset: TrainClips | EvalVideos, keys: Iterable[Any], workers: int, *, ahead: int = 0, pin: bool = False
) -> Iterator[Any]:
    """`dataset[key]` for each key, in order; the workers read at least two items each ahead, and `ahead` together."""
    if not workers:
        yield from map(dataset.__getitem__, keys)
        return
    timeout_s = dataset.config.data.timeout_s
    noted = _Noted(dataset, workers)
    loader: DataLoader[Any] = DataLoader(
        noted,
        batch_size=None,
        sampler=keys,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=min(max(2, -(-ahead // workers)), _AHEAD_PER_WORKER),
        timeout=min(_LOOK_EVERY_S, timeout_s),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader draws a seed: not from the stream that drop path uses
        pin_memory=pin,
    )
    items, processes = _started(loader)
    while (item := _wait(items, timeout_s, lambda: noted.being_read(processes))) is not None:
        yield item


def _wait(items: Iterator[Any], timeout_s: float, being_read: Callable[[], str]) -> Any:
    """The next item, None at the end. The loader looks every `_LOOK_EVERY_S` whether its workers live."""
    late = time.monotonic() + timeout_s
    while True:
        try:
            return next(items, None)
        except (ConnectionError, EOFError):  # the memory of an item comes from its worker, which is about to end
            if time.monotonic() >= late:
                raise
        except RuntimeError as error:  # the loader's class for all that follows
            message = str(error)
            if "exited unexpectedly" in message:
                raise RunError(
                    f"reading videos failed: {message}{being_read()}. It may have lacked memory or /dev/shm; if it "
                    "ends at the same file again, leave that file out"
                ) from error
            if "Too many open files" in message:
                raise RunError(
                    f"reading videos failed: each clip that waits holds an open file, and the limit is "
                    f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}; raise it (ulimit -n), or set train.accumulate"
                ) from error
            if "timed out" not in message:
                raise
            if time.monotonic() >= late:
                raise RunError(
                    f"reading videos failed: nothing came within data.timeout_s={timeout_s:g}{being_read()}. Is the "
                    "file system slow or gone? Raise data.timeout_s, or leave out the file that hangs"
                ) from error


def _started(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """A loader at work, and its processes (among other children of this one).

    Its handler of SIGCHLD is taken away: that raises wherever the main process is when a worker dies, such as in the
    middle of an optimizer's step. The loader looks for itself while it is waited for.
    """
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < most:  # shells give 1,024, and each clip that waits holds an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    before = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return items, multiprocessing.active_children()


class _Noted(Dataset[Any]):
    """A dataset whose workers note what they read, since when and who they are, for the main process to see."""

    def __init__(self, dataset: TrainClips | EvalVideos, workers: int) -> None:
        self.dataset = dataset
        self._notes = torch.full((workers, 3), -1.0, dtype=torch.float64).share_memory_()  # row, since_s, pid

    def __getitem__(self, key: Any) -> Any:
        info = get_worker_info()
        assert info is not None
        row = key[-1] if isinstance(key, tuple) else key
        note = (row, time.monotonic(), multiprocessing.current_process().pid)
        self._notes[info.id] = torch.tensor(note, dtype=torch.float64)
        item = self.dataset[key]
        self._notes[info.id, 0] = -1
        return item

    def being_read(self, processes: Sequence[BaseProcess]) -> str:
        """`; being read: FILE for 3.2 s, ...`: first those whose worker died, then the longest; empty for none."""
        ends = {process.pid: process.exitcode for process in processes}
        now = time.monotonic()
        files = []
        for row, since_s, pid in self._notes.tolist():
            if row >= 0:
                end = ends.get(int(pid))
                died = f" (its worker died{_signal_name(end)})" if end is not None else ""
                path = self.dataset.manifest.row(int(row)).path
                files.append((not died, since_s, f"{path} for {now - since_s:.1f} s{died}"))
        named = ", ".join(text for *_, text in sorted(files)[:_FILES_NAMED])
        return f"; being read: {named}" if named else ""


def _signal_name(exit_code: int) -> str:
    return f" of {signal.Signals(-exit_code).name}" if exit_code < 0 else ""


def _as_is(item: T) -> T:
    return item


def _start_worker(number: int) -> None:
    # Ctrl-C reaches the whole process group: the main process decides what follows. A handler of SIGTERM that it has
    # installed must not keep workers alive.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if slurm_job(os.environ) is not None:  # its signals reach workers too, which must live until the job has saved
        for warning in WARNINGS:
            signal.signal(warning, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_main_process, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_main_process() -> None:
    """Dies of the first SIGTERM from the process that started this one. Those of all others count for nothing."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    signal.raise_signal(signal.SIGTERM)
