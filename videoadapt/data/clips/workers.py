"""Worker processes that read clips: a timeout for each clip, and errors that name the file."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from videoadapt.data.clips.datasets import EvalVideos, TrainClips
from videoadapt.errors import RunError
from videoadapt.runtime.signals import WARNINGS
from videoadapt.runtime.slurm import slurm_job

T = TypeVar("T")


_AHEAD_PER_WORKER = 64  # clips at most; each that waits holds a file descriptor of its worker


_LOOK_EVERY_S = 2.0  # while waiting: whether a worker has died


_FILES_NAMED = 4


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
