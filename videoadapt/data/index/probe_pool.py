"""Probes many files in worker processes, and keeps the results in a cache.

A file that crashes or hangs its process fails alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from stat import S_ISDIR
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool
from pydantic import TypeAdapter

from videoadapt.data.index.fork_server import fork_server
from videoadapt.data.video.files import cause_of, reason
from videoadapt.data.video.limits import DEFAULT_LIMITS, Limits
from videoadapt.data.video.probe import PROBE_VERSION, VideoInfo, probe
from videoadapt.data.video.verify import verify
from videoadapt.errors import RunError, VideoError, few, plural
from videoadapt.runtime.console import Bar, say
from videoadapt.runtime.signals import JOB_SIGNALS, WARNINGS, StopRequest

Result = TypeVar("Result")
T = TypeVar("T")


class Crashed(str):
    """The message of a file whose process crashed."""

    __slots__ = ()


class NotProbed(str):
    """The message of a file whose process was killed, so that the result is unknown. The file may be sound."""

    __slots__ = ()


ProbeResult = VideoInfo | str | None  # info of a file, or the reason of a failure; None: the file does not exist

# A process that ends so has crashed by itself. Other signals come from outside: SIGKILL, if the memory is full.
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP})
_FORK_SERVER_DIED = 255  # exit code that multiprocessing gives to the processes of a dead fork server
_EXIT_S = 5.0  # time in which a process ends after its last result, or after it was killed
_POLL_S = 5.0  # time between two looks whether a pool without results still works
_TASKS_PER_WORKER = 8  # tasks in the queue: Kinetics has 240,000 files, too many to queue at once
_INFO = TypeAdapter(VideoInfo)
# Imported once by the fork server, so that its workers start with them. Neither imports torch, which takes seconds.
_PRELOADED = ["av", "videoadapt.data.index.probe_pool"]


def probe_files(
    paths: Sequence[str],
    *,
    full: bool,
    cache: Path,
    workers: int,
    timeout_s: float,
    limits: Limits = DEFAULT_LIMITS,
) -> dict[str, ProbeResult]:
    """Probes files, or takes their results from the cache.

    The cache holds one JSON object a line. A cached result is used if size and time of the file, the version of
    `probe` and the version of PyAV are unchanged. New results are appended as they arrive, so an interrupted call
    continues where it stopped. Failures are not cached.

    Args:
        paths: The files.
        full: Decode every frame with `verify`. Otherwise `probe` decodes one. A cached full result also serves a call
            without `full`, but not the reverse.
        cache: File of the cache. It is created if it does not exist.
        workers: Number of processes.
        timeout_s: Time limit of each file in seconds.
        limits: The largest video that is read.

    Returns:
        The result by path.

    Raises:
        Stopped: The job was asked to stop. Raised after the next result.
        KeyboardInterrupt: Ctrl-C. Raised at once.
        RunError: The worker processes cannot be started, or end at once.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    writer = f"probe {PROBE_VERSION}, PyAV {version('av')}"
    cached = _read_cache(cache, writer, limits, full=full)
    with StopRequest(JOB_SIGNALS) as stop:
        stamps = {path: _stamp(path) for path in _until_stopped(stop, paths)}
    results: dict[str, ProbeResult] = {
        path: cached.get(stamp) for path, stamp in stamps.items() if stamp in cached or not stamp
    }
    todo = [path for path in stamps if path not in results]
    function = partial(verify if full else probe, limits=limits)
    with (
        StopRequest(JOB_SIGNALS) as stop,
        cache.open("a", encoding="utf-8") as file,
        Bar("index", total=len(stamps), unit="files", start=len(results)) as bar,
        closing(run_on_files(todo, function, workers=workers, timeout_s=timeout_s)) as finished,
    ):
        for path, result in _until_stopped(stop, finished):
            results[path] = result
            # Failures are not cached: the file may be repaired, or the network may have failed.
            if isinstance(result, VideoInfo):
                # The line break comes first: an interrupted call may have left an unfinished line.
                file.write("\n" + json.dumps({"by": writer, "stamp": stamps[path], "info": asdict(result)}))
                file.flush()
            bar.step()
    if not cache.stat().st_size:
        cache.unlink()  # no file could be read
    return results


def readable_files(paths: Sequence[str], *, workers: int, timeout_s: float) -> set[str]:
    """Returns the files that `probe` can read. Nothing is cached: few files have a suffix that says nothing.

    Args:
        paths: The files.
        workers: Number of processes.
        timeout_s: Time limit of each file in seconds.

    Raises:
        RunError: The worker processes cannot be started, or end at once.
    """
    with closing(run_on_files(paths, partial(probe, content=False), workers=workers, timeout_s=timeout_s)) as finished:
        return {path for path, result in finished if isinstance(result, VideoInfo)}


def _until_stopped(stop: StopRequest, items: Iterable[T]) -> Iterator[T]:
    """Iterates over `items`. Raises `Stopped` after the current item when a stop is requested."""
    try:
        for item in items:
            yield item
            if stop.requested:
                stop.stop()
    except RunError:
        # The signal goes to all processes of the job. It may kill the workers before this process handles it, and
        # the pool then reports that it is broken.
        if stop.requested:
            stop.stop()
        raise


def run_on_files(
    paths: Sequence[str], function: Callable[[str], Result], *, workers: int, timeout_s: float
) -> Generator[tuple[str, Result | str], None, None]:
    """Calls a function for each file in worker processes.

    A file whose process was killed or crashed is tried again at the end, alone: the memory that several files need
    together may suffice for one. Closing the generator ends the processes at once.

    Args:
        paths: The files.
        function: Called with a path. It is pickled, so it must be importable in the workers.
        workers: Number of processes.
        timeout_s: Time limit of each file in seconds.

    Yields:
        A path and the function's result, in the order in which they finish. The result is a message if the function
        raised an exception, crashed its process, or exceeded the time limit, and a `NotProbed` if its process was
        killed twice.

    Raises:
        RunError: The processes cannot be started, or end at once. The message names the files in work.
    """
    ended = {}
    with closing(_run_pool(paths, function, workers=workers, timeout_s=timeout_s)) as finished:
        for path, result in finished:
            if isinstance(result, Crashed | NotProbed):
                ended[path] = result
            else:
                yield path, result
    for cause, count in Counter(result for result in ended.values() if isinstance(result, NotProbed)).items():
        say(f"{cause}; {plural(count, 'file')} to read again, each alone")
    for path in ended:
        yield path, run_alone(path, function, timeout_s)


def run_alone(
    path: str,
    function: Callable[[str], Result],
    timeout_s: float,
    *,
    preload: Sequence[str] = (),
    stop: Connection | None = None,
) -> Result | str:
    """Calls a function for a file in a process of its own, which ends with it; see `run_on_files`.

    Not in a pool: pebble reports a broken pool if its only process dies at once.

    Args:
        path: The file.
        function: As in `run_on_files`.
        timeout_s: Time limit in seconds.
        preload: Further modules that the fork server imports, if this process has not started it yet.
        stop: Ends the process as soon as this connection can be read, or its other end is closed.
    """
    context: Any = fork_server(function, [*_PRELOADED, *preload])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call_and_send, args=(sender, function, path), daemon=True)
    try:
        with _warning_signals_blocked():
            process.start()
        sender.close()  # so that `recv` ends with the process
        ready = wait_for_any([receiver, *([stop] if stop is not None else [])], timeout_s)
        if receiver not in ready:
            return NotProbed("reading it was stopped") if ready else _too_slow(timeout_s)
        result: Result | str = receiver.recv()
        return result
    except (EOFError, OSError) as error:
        if process.pid is None:
            return NotProbed(f"the process that reads it cannot be started: {reason(error)}")
        process.join(_EXIT_S)
        return _how_ended(process.exitcode or 0)
    finally:
        if process.pid is not None:
            process.kill()
            process.join(_EXIT_S)
        receiver.close()
        sender.close()


def _call_and_send(sender: Connection, function: Callable[[str], Result], path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends this one
    sender.send(_call(function, path))


def _run_pool(
    paths: Sequence[str], function: Callable[[str], Result], *, workers: int, timeout_s: float
) -> Generator[tuple[str, Result | str], None, None]:
    """Calls a function for each file once; see `run_on_files`.

    A new pool goes on with the files of a broken one. The second pool in a row that breaks before its first result is
    an error.
    """
    waiting, queue = iter(paths), deque[str]()
    workers = min(max(workers, 1), len(paths))
    fruitless = 0  # pools in a row without a result
    while paths:
        finished = 0
        try:
            with closing(_run_one_pool(waiting, queue, function, workers=workers, timeout_s=timeout_s)) as results:
                for result in results:
                    finished += 1
                    yield result
            return
        except BrokenProcessPool as error:
            fruitless = 0 if finished else fruitless + 1
            if fruitless > 1:
                raise RunError(
                    "the processes that read videos cannot be started, or end at once: their fork server was killed, "
                    f"or the memory is full; fewer data.workers need less. The files in work were {few(queue)}"
                ) from error
            say(f"the processes that read videos broke down; new ones read on, with {few(queue)}")


def _run_one_pool(
    waiting: Iterator[str],
    queue: deque[str],
    function: Callable[[str], Result],
    *,
    workers: int,
    timeout_s: float,
) -> Generator[tuple[str, Result | str], None, None]:
    """Calls a function for each file of `queue`, and then of `waiting`.

    Raises:
        BrokenProcessPool: The pool has lost its processes, or cannot start them. `queue` has the files in work.
    """
    pool = ProcessPool(max_workers=workers, context=fork_server(function, _PRELOADED))
    running: dict[Future[Result | str], str] = {}
    try:
        while True:
            queue.extend(islice(waiting, _TASKS_PER_WORKER * workers - len(running) - len(queue)))
            with _warning_signals_blocked():
                while queue:
                    # The path stays in the queue if this raises.
                    running[pool.schedule(partial(_call, function), args=(queue[0],), timeout=timeout_s)] = queue[0]
                    queue.popleft()
            if not running:
                return
            done = wait(running, _POLL_S, return_when=FIRST_COMPLETED).done
            if not done and not pool.active:  # it may leave tasks without a result
                raise BrokenProcessPool
            for task in done:
                result = _result_of(task, timeout_s)
                yield running.pop(task), result
    except RuntimeError as error:
        if not isinstance(error, BrokenProcessPool) and pool.active:
            raise
        queue.extendleft(reversed(running.values()))
        raise BrokenProcessPool from error  # `schedule` of a broken pool raises another RuntimeError
    finally:
        pool.stop()
        pool.join()


@contextmanager
def _warning_signals_blocked() -> Iterator[None]:
    """Blocks SIGUSR1 and SIGUSR2 in the calling thread, and permanently in threads and processes started meanwhile.

    SLURM sends these signals to all processes of a job. The workers have no handler, so the signal would kill them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(function: Callable[[str], Result], path: str) -> Result | str:
    """Calls the function in a worker. Returns a message if it raises an exception."""
    try:
        return function(path)
    except VideoError as error:
        return cause_of(path, error)
    except MemoryError:
        return NotProbed("the process that read it had no memory left")
    except Exception as error:  # any exception of a library: one bad file must not end the work on the others
        return f"reading it raised {type(error).__name__}: {reason(error)}"


def _result_of(task: Future[Result | str], timeout_s: float) -> Result | str:
    """Returns what to report of a file. Raises `BrokenProcessPool`."""
    try:
        return task.result()
    except TimeoutError:
        return _too_slow(timeout_s)
    except ProcessExpired as error:
        return _how_ended(error.exitcode)


def _too_slow(timeout_s: float) -> str:
    return f"reading it took longer than {timeout_s:g} s"


def _how_ended(exit_code: int) -> Crashed | NotProbed:
    """Returns what to report of a file whose process ended with this exit code; a signal is a negative number."""
    if exit_code == _FORK_SERVER_DIED:
        return NotProbed("the fork server, which starts the processes that read videos, died")
    if exit_code < 0 and -exit_code not in _CRASHES:
        name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else str(-exit_code)
        lack = "; the memory may be full" if name == "SIGKILL" else ""
        return NotProbed(f"the process that read it was killed ({name}{lack})")
    return Crashed("the process that read it crashed")


def _stamp(path: str) -> str:
    """Returns text that changes when a file, or a file in a folder, changes. Empty if there is no such file."""
    try:
        stat = os.stat(path)
        state = _folder_state(path) if S_ISDIR(stat.st_mode) else f"{stat.st_size} {stat.st_mtime_ns}"
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError):  # not readable; the file may exist, and `probe` reports the cause
        state = "unknown"
    return f"{state} {path}"


def _folder_state(folder: str) -> str:
    """Returns a hash of names, sizes and times of the files in a folder.

    The folder's own time is not enough: it does not change when a file in it is overwritten.
    """
    with os.scandir(folder) as entries:
        states = sorted((entry.name, stat.st_size, stat.st_mtime_ns) for entry in entries for stat in [_stat(entry)])
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a symbolic link whose target does not exist
        return entry.stat(follow_symlinks=False)


def _read_cache(cache: Path, writer: str, limits: Limits, *, full: bool) -> dict[str, VideoInfo]:
    """Returns cached results by stamp. With `full`, unverified ones are skipped, as are those beyond the limits."""
    known = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").splitlines() if cache.exists() else ():
        try:
            entry = json.loads(line)
            info = _INFO.validate_json(json.dumps(entry["info"]), strict=True)  # as text, a number would end in Arrow
            finite = math.isfinite(info.fps + info.duration_s)
            within = finite and info.width * info.height <= limits.max_pixels and info.frames <= limits.max_frames
            if entry["by"] == writer and within and not (full and info.damage is None):
                known[entry["stamp"]] = info
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # a damaged, empty or unfinished line, or a line of another version
    return known
