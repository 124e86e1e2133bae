"""Looking at many files at once, in processes that a file may crash or hang; findings are kept for the next time."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from videoadapt.data.probe import VideoInfo, cause_of, probe, reason
from videoadapt.data.verify import verify
from videoadapt.errors import RunError, VideoError
from videoadapt.log import Bar

Found = TypeVar("Found")
Finding = VideoInfo | str | None  # what a file holds, or why it cannot be read; none = there is no such file

_TASKS_PER_WORKER = 8  # in flight, so that 240,000 files are not all in the queue at once
_PRELOADED = ["av", "videoadapt.data.probing"]  # by the server that workers are forked from: neither imports torch


def probe_files(paths: Sequence[str], *, full: bool, cache: Path, workers: int, timeout_s: float) -> dict[str, Finding]:
    """What each of the files holds: with `full` from decoding every frame, else from `probe`.

    Files that `cache` knows with this size and time are not opened, and new findings are added to it as they come, so
    that an interrupted call goes on where it stopped. A full finding serves a quick call, but not the other way round.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    known = _read_cache(cache, full=full)
    stamps = {path: _stamp(path) for path in paths}
    found: dict[str, Finding] = {path: known.get(text) for path, text in stamps.items() if text in known or not text}
    todo = [path for path in stamps if path not in found]
    with (
        cache.open("a", encoding="utf-8") as file,
        Bar("index", total=len(stamps), unit="videos", start=len(found)) as bar,
        closing(look_at(todo, verify if full else probe, workers=workers, timeout_s=timeout_s)) as findings,
    ):
        for path, finding in findings:
            found[path] = finding
            if isinstance(finding, VideoInfo):  # what failed may be mended, or the fault was the network's
                # On a line of its own even after one that was torn.
                file.write("\n" + json.dumps({"stamp": stamps[path], "info": asdict(finding)}))
                file.flush()
            bar.step()
    return found


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
            for path in islice(waiting, _TASKS_PER_WORKER * workers - len(running)):
                running[pool.schedule(partial(_finding, look), args=(path,), timeout=timeout_s)] = path
            if not running:
                return
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(task), _result(task, timeout_s)
    finally:
        pool.stop()
        pool.join()


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


def exists(path: str) -> bool:
    """Whether there is such a file, perhaps one that cannot be read."""
    return bool(_stamp(path))


def _stamp(path: str) -> str:
    """Text that changes when the file does; empty if there is no such file."""
    try:
        stat = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError):  # it may be there, and looking at it says what is wrong
        return f"unknown {path}"
    return f"{stat.st_size} {stat.st_mtime_ns} {path}"


def _read_cache(cache: Path, *, full: bool) -> dict[str, VideoInfo]:
    """What is known by stamp; with `full`, only from files that were decoded whole."""
    known = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").splitlines() if cache.exists() else ():
        try:
            entry = json.loads(line)
            info = VideoInfo(**entry["info"])
            if not (full and info.damage is None):
                known[entry["stamp"]] = info
        except (ValueError, TypeError, KeyError):
            continue  # torn by an interruption, or written by another version
    return known
