"""Looking at many files at once, in processes that a file may crash or hang; findings are kept for the next time."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from stat import S_ISDIR
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from videoadapt.data.video.files import cause_of, reason
from videoadapt.data.video.probe import PROBE_VERSION, VideoInfo, probe
from videoadapt.data.video.verify import verify
from videoadapt.errors import RunError, VideoError
from videoadapt.runtime.console import Bar
from videoadapt.runtime.signals import JOB_SIGNALS, WARNINGS, StopRequest

Found = TypeVar("Found")
T = TypeVar("T")
Finding = VideoInfo | str | None  # what a file holds, or why it cannot be read; none = there is no such file

_TASKS_PER_WORKER = 8  # in flight, so that 240,000 files are not all in the queue at once
_PRELOADED = [
    "av",
    "videoadapt.data.index.probe_pool",
]  # by the server that workers are forked from: neither imports torch


def probe_files(paths: Sequence[str], *, full: bool, cache: Path, workers: int, timeout_s: float) -> dict[str, Finding]:
    """What each of the files holds: with `full` from decoding every frame, else from `probe`.

    Files that `cache` knows with this size and time, from this version of `probe` and of PyAV, are not opened, and new
    findings are added to it as they come, so that an interrupted call goes on where it stopped. A full finding serves a
    quick call, but not the other way round. A signal to a job interrupts it at the next finding, Ctrl-C at once.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    by = f"probe {PROBE_VERSION}, PyAV {version('av')}"
    known = _read_cache(cache, by, full=full)
    with StopRequest(JOB_SIGNALS) as stop:
        stamps = {path: _stamp(path) for path in _until(stop, paths)}
    found: dict[str, Finding] = {path: known.get(text) for path, text in stamps.items() if text in known or not text}
    todo = [path for path in stamps if path not in found]
    with (
        StopRequest(JOB_SIGNALS) as stop,
        cache.open("a", encoding="utf-8") as file,
        Bar("index", total=len(stamps), unit="files", start=len(found)) as bar,
        closing(look_at(todo, verify if full else probe, workers=workers, timeout_s=timeout_s)) as findings,
    ):
        for path, finding in _until(stop, findings):
            found[path] = finding
            if isinstance(finding, VideoInfo):  # what failed may be mended, or the fault was the network's
                # On a line of its own even after one that was torn.
                file.write("\n" + json.dumps({"by": by, "stamp": stamps[path], "info": asdict(finding)}))
                file.flush()
            bar.step()
    return found


def _until(stop: StopRequest, items: Iterable[T]) -> Iterator[T]:
    """The same items. Raises `Stopped` after the one in hand when a stop was requested."""
    try:
        for item in items:
            yield item
            if stop.requested:
                stop.stop()
    except RunError:
        if stop.requested:  # the signal went to all processes of the job, and killed those that look at files
            stop.stop()
        raise


def look_at(
    paths: Sequence[str], look: Callable[[str], Found], *, workers: int, timeout_s: float
) -> Generator[tuple[str, Found | str], None, None]:
    """Each path with what `look` returns for it, or why it failed, as they come; `look` runs in other processes.

    A file that crashes its process, or takes longer than `timeout_s`, fails alone. Closing the iterator stops the
    processes at once. Raises `RunError` if they cannot be started.
    """
    if not paths:
        return
    # Forking this process is not safe while it has threads: torch's, pyarrow's, those of the pool.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    workers = min(max(workers, 1), len(paths))
    pool = ProcessPool(max_workers=workers, context=context)
    waiting = iter(paths)
    running: dict[Future[Found | str], str] = {}
    try:
        while True:
            with _warnings_held_back():
                for path in islice(waiting, _TASKS_PER_WORKER * workers - len(running)):
                    running[pool.schedule(partial(_finding, look), args=(path,), timeout=timeout_s)] = path
            if not running:
                return
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(task), _result(task, timeout_s)
    finally:
        pool.stop()
        pool.join()


@contextmanager
def _warnings_held_back() -> Iterator[None]:
    """While entered, SIGUSR1 and SIGUSR2 wait; in threads and processes that are started meanwhile, for ever.

    A cluster sends them to all processes of a job, and those of the pool have no handlers: they would die of them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _finding(look: Callable[[str], Found], path: str) -> Found | str:
    try:
        return look(path)
    except VideoError as error:
        return cause_of(path, error)
    except Exception as error:  # whatever one file of many brings out must not end the work on the others
        return f"reading it raised {type(error).__name__}: {reason(error)}"


def _result(task: Future[Found | str], timeout_s: float) -> Found | str:
    try:
        return task.result()
    except TimeoutError:
        return f"took longer than {timeout_s:g} s to read"
    except ProcessExpired:
        return "a process crashed on reading it"
    except BrokenProcessPool:
        raise RunError(
            "the processes that read videos cannot be started; a script that calls videoadapt must do so below "
            "`if __name__ == '__main__':`"
        ) from None


def _stamp(path: str) -> str:
    """Text that changes when a file does, or a file in a folder; empty if there is no such file."""
    try:
        stat = os.stat(path)
        state = _folder_state(path) if S_ISDIR(stat.st_mode) else f"{stat.st_size} {stat.st_mtime_ns}"
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError):  # it may be there, and looking at it says what is wrong
        state = "unknown"
    return f"{state} {path}"


def _folder_state(folder: str) -> str:
    """A hash of names, sizes and times in a folder: its own time does not change when a file in it is written over."""
    with os.scandir(folder) as entries:
        states = sorted((entry.name, stat.st_size, stat.st_mtime_ns) for entry in entries for stat in [_stat(entry)])
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a link to nowhere
        return entry.stat(follow_symlinks=False)


def _read_cache(cache: Path, by: str, *, full: bool) -> dict[str, VideoInfo]:
    """What is known by stamp, of lines that the same versions wrote; with `full`, only of files decoded whole."""
    known = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").splitlines() if cache.exists() else ():
        try:
            entry = json.loads(line)
            info = VideoInfo(**entry["info"])
            if entry["by"] == by and not (full and info.damage is None):
                known[entry["stamp"]] = info
        except (ValueError, TypeError, KeyError):
            continue  # torn by an interruption, or written by another version
    return known
