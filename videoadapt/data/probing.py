"""Probing many files at once, in processes that a file may crash; what was found is kept for the next time."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from videoadapt.data.probe import VideoInfo, cause_of, probe
from videoadapt.errors import VideoError
from videoadapt.log import Bar

Finding = VideoInfo | str  # what a file holds, or why it cannot be read

_CHUNK = 16  # files per task: one takes a few ms
_CRASHED = "a process crashed on reading it"


def probe_files(paths: Sequence[str], *, cache: Path, workers: int) -> dict[str, Finding]:
    """What each of the files holds. Files that `cache` knows with this size and time are not opened.

    New findings are added to `cache` as they come, so that an interrupted call goes on where it stopped.
    """
    known = _read_cache(cache)
    stamps = {path: _stamp(path) for path in paths}
    found: dict[str, Finding] = {p: known[s] for p, s in stamps.items() if s in known}
    todo = [path for path in paths if path not in found]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with (
        cache.open("a", encoding="utf-8") as file,
        Bar("index", total=len(paths), unit="videos", start=len(found)) as bar,
    ):
        for path, finding in _probe_in_processes(todo, max(workers, 1)):
            found[path] = finding
            if isinstance(finding, VideoInfo):  # what failed may be mended, or the fault was the network's
                file.write(json.dumps({"stamp": stamps[path], "info": asdict(finding)}) + "\n")
                file.flush()
            bar.step()
    return found


def _stamp(path: str) -> str:
    """Changes when the file does."""
    try:
        stat = Path(path).stat()
    except OSError:  # gone in the meantime: probing says so
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns} {path}"


def _read_cache(cache: Path) -> dict[str, VideoInfo]:
    known = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").splitlines() if cache.exists() else ():
        try:
            entry = json.loads(line)
            known[entry["stamp"]] = VideoInfo(**entry["info"])
        except (ValueError, TypeError, KeyError):
            continue  # torn by an interruption, or written by another version
    return known


def _probe_in_processes(paths: Sequence[str], workers: int) -> Iterator[tuple[str, Finding]]:
    chunks = deque(paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK))
    workers = min(workers, len(chunks))
    while chunks:
        running: dict[Future[list[Finding]], Sequence[str]] = {}
        try:
            with ProcessPoolExecutor(workers) as pool:
                while chunks or running:
                    while chunks and len(running) < 2 * workers:
                        running[pool.submit(_probe_chunk, chunks[0])] = chunks[0]
                        chunks.popleft()  # only now: submitting fails if the pool is broken
                    for task in wait(running, return_when=FIRST_COMPLETED).done:
                        findings = task.result()
                        yield from zip(running.pop(task), findings, strict=True)
        except BrokenProcessPool:
            # One of these files did it, and took the whole pool with it.
            yield from ((path, _probe_alone(path)) for path in chain.from_iterable(running.values()))


def _probe_alone(path: str) -> Finding:
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(_probe_chunk, [path]).result()[0]
        except BrokenProcessPool:
            return _CRASHED


def _probe_chunk(paths: Sequence[str]) -> list[Finding]:
    return [_probe_one(path) for path in paths]


def _probe_one(path: str) -> Finding:
    try:
        return probe(path)
    except VideoError as error:
        return cause_of(path, error)
