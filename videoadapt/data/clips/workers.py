"""Worker processes that read clips: every clip has a timeout, and an error names the file."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from videoadapt.data.clips.datasets import EvalVideos, TrainClips
from videoadapt.errors import RunError
from videoadapt.runtime.signals import WARNINGS
from videoadapt.runtime.slurm import slurm_job

T = TypeVar("T")

_MIN_PREFETCH = 2  # items per worker: one waits while the next is decoded
_MAX_PREFETCH = 64  # items per worker: each waiting item holds one open file
_POLL_S = 2.0  # while the main process waits: time between two checks of DataLoader that its workers are alive
_MAX_FILES_IN_MESSAGE = 4


def read_items(
    dataset: TrainClips | EvalVideos, keys: Iterable[Any], workers: int, *, ahead: int = 0, pin: bool = False
) -> Iterator[Any]:
    """Yields `dataset[key]` for each key, in the order of the keys.

    Args:
        dataset: Its `config.data.timeout_s` limits the wait for each item.
        keys: Read lazily. Workers start as soon as the first item is requested.
        workers: Number of processes; with 0 the calling process reads.
        ahead: Number of items that all workers together prefetch. Each worker prefetches between 2 and 64.
        pin: Copy the tensors of each item to page-locked memory, for asynchronous copies to a GPU.

    Raises:
        RunError: A worker died, an item took longer than `timeout_s`, or too many files are open. The message names
            the files in progress.
    """
    if not workers:
        yield from map(dataset.__getitem__, keys)
        return
    timeout_s = dataset.config.data.timeout_s
    tracked = _TrackedDataset(dataset, workers)
    per_worker = -(-ahead // workers)  # rounded up
    loader: DataLoader[Any] = DataLoader(
        tracked,
        batch_size=None,  # item by item: see `loader.py`
        sampler=keys,
        collate_fn=_unchanged,  # the default would turn arrays into tensors, which hold open files
        num_workers=workers,
        prefetch_factor=min(max(_MIN_PREFETCH, per_worker), _MAX_PREFETCH),
        timeout=min(_POLL_S, timeout_s),
        worker_init_fn=_set_up_worker,
        generator=torch.Generator(),  # DataLoader draws a seed; from the global generator this would shift drop path
        pin_memory=pin,
    )
    with _process_ready_for_workers():
        items = iter(loader)  # starts the workers
    processes = multiprocessing.active_children()  # may include other children of this process
    while (item := _next_item(items, timeout_s, lambda: tracked.in_progress(processes))) is not None:
        yield item


@contextmanager
def _process_ready_for_workers() -> Iterator[None]:
    """Makes all changes that reading with workers needs in the state of the main process.

    On entry, the soft limit of open files is raised to the hard limit, because each waiting clip holds an open file
    and shells often set 1,024. The limit stays raised: another loader may still be open when this one ends, and a lower
    limit would break it.

    On exit, the handler of SIGCHLD is restored. DataLoader installs one that raises in the main process, at any line,
    when a worker dies, even in the middle of an optimizer step. It is not needed, because DataLoader also checks its
    workers every `_POLL_S` seconds while `_next_item` waits.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # Python forbids `signal.signal` in other threads
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)  # None: the handler was not set by Python


def _next_item(items: Iterator[Any], timeout_s: float, in_progress: Callable[[], str]) -> Any:
    """Returns the next item, None at the end. DataLoader raises every `_POLL_S` s; this waits up to `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return next(items, None)
        except (ConnectionError, EOFError):
            # The main process fetches the tensors of an item from the worker that made it. A dying worker refuses,
            # and the next poll reports its death.
            if time.monotonic() >= deadline:
                raise
        except RuntimeError as error:  # DataLoader has one class for all failures; only the text differs
            text = str(error)
            if "timed out" in text and time.monotonic() < deadline:
                continue
            explanation = _explain(text, timeout_s, in_progress())
            if explanation is None:
                raise
            raise RunError(f"reading videos failed: {explanation}") from error


def _explain(error: str, timeout_s: float, in_progress: str) -> str | None:
    """Explains an error of DataLoader, with advice. Returns None for an unknown error."""
    if "exited unexpectedly" in error:
        return (
            f"{error}{in_progress}. The worker may have run out of memory or of space in /dev/shm; if it dies at the "
            "same file again, remove that file from the list"
        )
    if "Too many open files" in error:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"each waiting clip holds an open file, and the limit is {limit}; raise it (ulimit -n), or set "
            "train.accumulate"
        )
    if "timed out" in error:
        return (
            f"no clip arrived within data.timeout_s={timeout_s:g}{in_progress}. Check the file system; raise "
            "data.timeout_s if it is slow, or remove the file that hangs from the list"
        )
    return None


class _TrackedDataset(Dataset[Any]):
    """Wraps a dataset so that the main process can see which file each worker reads, and since when."""

    def __init__(self, dataset: TrainClips | EvalVideos, workers: int) -> None:
        self.dataset = dataset
        # (workers, 3): manifest row or -1, start time in s, process id. Shared memory, so that it outlives a worker.
        self._reading = torch.full((workers, 3), -1.0, dtype=torch.float64).share_memory_()

    def __getitem__(self, key: Any) -> Any:
        info = get_worker_info()
        assert info is not None
        row = key[-1] if isinstance(key, tuple) else key  # TrainClips: (epoch, row); EvalVideos: row
        # Monotonic time is the same in all processes of a machine.
        entry = (row, time.monotonic(), multiprocessing.current_process().pid)
        self._reading[info.id] = torch.tensor(entry, dtype=torch.float64)
        item = self.dataset[key]
        self._reading[info.id, 0] = -1
        return item

    def in_progress(self, processes: Sequence[BaseProcess]) -> str:
        """Returns `; being read: FILE for 3.2 s, ...`, or an empty text.

        Files of dead workers come first, then files with the longest time, so that the list starts with the likeliest
        cause.
        """
        exit_codes = {process.pid: process.exitcode for process in processes}
        now = time.monotonic()
        files = []
        for row, since_s, pid in self._reading.tolist():
            if row >= 0:
                exit_code = exit_codes.get(int(pid))
                died = f" (its worker died{_signal_name(exit_code)})" if exit_code is not None else ""
                path = self.dataset.manifest.row(int(row)).path
                files.append((not died, since_s, f"{path} for {now - since_s:.1f} s{died}"))
        named = ", ".join(text for *_, text in sorted(files)[:_MAX_FILES_IN_MESSAGE])
        return f"; being read: {named}" if named else ""


def _signal_name(exit_code: int) -> str:
    # For a killed process, multiprocessing returns minus the number of the signal.
    return f" of {signal.Signals(-exit_code).name}" if exit_code < 0 else ""


def _unchanged(item: T) -> T:
    return item


def _set_up_worker(number: int) -> None:
    """Sets signal handlers and the thread count of a worker. DataLoader calls it with the worker's number."""
    # Ctrl-C reaches the whole process group. Only the main process acts on it, and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked worker inherits the main process's handler, which would keep it alive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if slurm_job(os.environ) is not None:
        # SLURM sends its signals to every process of a step, but workers must live until the main process has saved.
        for warning in WARNINGS:
            signal.signal(warning, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # blocked, so that `sigwaitinfo` receives it
        threading.Thread(target=_obey_only_main_process, daemon=True).start()
    torch.set_num_threads(1)  # the workers are the parallelism; more threads per worker cost more CPU in total


def _obey_only_main_process() -> None:
    """Ends this worker at the first SIGTERM that the main process sends. SIGTERM of other senders is ignored."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    signal.raise_signal(signal.SIGTERM)
