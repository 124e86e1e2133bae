"""`videoadapt bench data`: clips per CPU-second and memory of our loaders and of others', on the same clips."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pebble import ProcessPool
from pydantic import Field, model_validator

from videoadapt.config.load import Config, make_config, parse_settings
from videoadapt.config.sections import Count, Section
from videoadapt.data.index.manifest import Manifest, index
from videoadapt.data.video.files import reason
from videoadapt.errors import ConfigError, UserError
from videoadapt.performance.bench.files import generate
from videoadapt.performance.bench.loaders import (
    FFMPEG,
    LOADERS,
    OURS,
    OURS_AUTO,
    OURS_PYAV,
    PEER_DECORD,
    PEER_PYAV,
    Turn,
    Work,
    ffmpeg_version,
    measure,
    readers_of_auto,
    start,
    unfit_files,
)
from videoadapt.performance.bench.machine import machine, print_machine, versions
from videoadapt.performance.bench.memory import Memory, worker_memory
from videoadapt.runtime.console import Bar, print_table
from videoadapt.runtime.files import write_json

_TIMEOUT_S = 600.0  # of a turn
_PACKAGES = ("torch", "torchvision", "decord", "av", "pytorchvideo", "torchcodec")
_PEERS = {"decord": PEER_DECORD, "pyav": PEER_PYAV}
_CLIPS_MIN = 3  # in a turn
_KIB, _MIB = 1 << 10, 1 << 20


class Settings(Section):
    """What is measured, and how often; the clip is TimeSformer-B's."""

    dir: Path = Path("runs/bench")
    rounds: Count = 5  # loaders take turns, so that all meet the same noise
    clips: Count | None = None  # in a turn; none = one of each file, three at least
    num_frames: Count = 8
    stride_frames: Count = 32
    short_side: Count = 256
    size: Annotated[int, Field(ge=16)] = 224  # of the crop
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        if self.size > self.short_side:
            raise ConfigError(f"size: {self.size} is more than short_side {self.short_side}")
        return self


def bench_data(overrides: Sequence[str] = (), videos: Sequence[str] = ()) -> dict[str, Any]:
    """Measures all loaders on `videos`, or on files that it makes; returns what `data.json` in the folder holds.

    A loader that is not installed or fails is named with the cause, and so is a file that cannot be read, or of which
    our two readers give different frames; the others are measured. Raises `UserError` if no file is left.
    """
    settings = parse_settings(Settings, "bench data", overrides)
    kinds = {"given": [Path(video) for video in videos]} if videos else generate(settings.dir / "data")
    works = {kind: _work(kind, paths, settings) for kind, paths in kinds.items()}
    with Bar("bench data", total=len(works) * (len(LOADERS) * (1 + settings.rounds) + len(OURS)), unit="turns") as bar:
        tables = {kind: _measure_kind(kind, work, settings.rounds, bar) for kind, work in works.items()}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(_PACKAGES) | ffmpeg_version(),
        "settings": settings.model_dump(mode="json"),
        "kinds": tables,
    }
    write_json(settings.dir / "data.json", result)
    return result


def _work(kind: str, paths: Sequence[Path], settings: Settings) -> Work:
    """The clips of a turn: as many of one file as of another, at random places."""
    folder = settings.dir / "lists" / kind.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    videos = folder / "videos.txt"
    videos.write_text("".join(f"{path.absolute()} 0\n" for path in paths), encoding="utf-8")
    config = make_config(
        {
            "run": {"dir": folder, "seed": settings.seed},
            "data": {"train": {"annotations": videos}, "short_side": [settings.short_side] * 2, "flip": 0.0},
            "model": {
                "size": settings.size,
                "num_frames": settings.num_frames,
                "stride_frames": settings.stride_frames,
                "num_classes": 1,
                "points": ["1"],
            },
            "assign": {"frames": 1},
        }
    )
    return _without_unfit(_plan(index(config), config, settings.clips), settings.clips)


def _plan(manifest: Manifest, config: Config, clips: int | None) -> Work:
    readable = np.flatnonzero(manifest["status"] == "ok").tolist()
    if not readable:
        first = manifest.row(0)
        raise UserError(f"bench data: not one of the {len(manifest)} videos can be read; {first.path}: {first.cause}")
    turns_of_all = (divmod(number, len(readable)) for number in range(clips or max(_CLIPS_MIN, len(readable))))
    return Work(manifest, config, [(epoch, readable[place]) for epoch, place in turns_of_all])


def _without_unfit(work: Work, clips: int | None) -> Work:
    """The same without the files that our readers fail at, which its manifest then calls broken."""
    with _own_process() as process:
        while unfit := _result(process, unfit_files, work):
            work = _plan(broken(work.manifest, unfit), work.config, clips)
    return work


def broken(manifest: Manifest, causes: Mapping[str, str]) -> Manifest:
    """The same manifest in which the files of some paths are broken, with a cause."""
    table = manifest.table
    unfit = table["path"].isin(list(causes))
    table.loc[unfit, "status"] = "broken"
    table.loc[unfit, "cause"] = table.loc[unfit, "path"].map(causes)
    return Manifest(table, manifest.classes, manifest.fingerprint)


def _measure_kind(kind: str, work: Work, rounds: int, bar: Bar) -> dict[str, Any]:
    left_out: dict[str, str] = {}

    def attempt(name: str, task: Callable[[], Any]) -> Any:
        bar.step(note=f"{kind}: {name}")
        if name not in left_out:
            try:
                return task()
            except Exception as error:  # whatever a library throws, or a crash of its process: the table says so
                left_out[name] = reason(error)
        return None

    with ExitStack() as stack:
        processes = {name: stack.enter_context(_own_process()) for name in LOADERS}

        def ask(task: Callable[[str, Work], Any], name: str) -> Any:
            return attempt(name, lambda: _result(processes[name], task, name, work))

        imported = {name: ask(start, name) for name in LOADERS}
        turns = [{name: ask(measure, name) for name in LOADERS} for _ in range(rounds)]
        readers = [] if OURS_AUTO in left_out else _result(processes[OURS_AUTO], readers_of_auto, work)
    clips = len(work.keys) * rounds
    workers = {name: attempt(name, partial(worker_memory, work, reader, clips)) for name, reader in OURS.items()}
    rows = {
        name: _row(imported[name], [turn[name] for turn in turns], workers.get(name))
        for name in LOADERS
        if name not in left_out
    }
    add_ratios(rows, peers(readers))
    unread = work.manifest.table[work.manifest["status"] != "ok"]
    return {
        "files": len(work.manifest),
        "files_read": len({row for _, row in work.keys}),
        "clips": len(work.keys),
        "unread": dict(zip(unread["path"], unread["cause"], strict=True)),
        "auto_reads_with": readers,
        "loaders": rows,
        "left_out": left_out,
    }


@contextmanager
def _own_process() -> Iterator[ProcessPool]:
    """A fresh process for one loader; it may crash, and is stopped on the way out whatever it is at."""
    pool = ProcessPool(1, initializer=_alone, context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.stop()
        pool.join()


def _result(process: ProcessPool, task: Callable[..., Any], *args: Any) -> Any:
    return process.schedule(task, args=args, timeout=_TIMEOUT_S).result()


def _alone() -> None:
    """Makes this process end at Ctrl-C, and mute: what fails comes back as an exception, and C++ code talks besides."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def _row(imported_bytes: int, turns: Sequence[Turn], worker: Memory | None) -> dict[str, Any]:
    speeds = [turn.clips_per_cpu_s for turn in turns]
    return {
        "clips_per_cpu_s": statistics.median(speeds),
        "rounds": speeds,
        "peak_bytes": turns[-1].peak_bytes,
        "imported_bytes": imported_bytes,
        "worker_uss_bytes": worker and worker.uss * _KIB,
        "worker_pss_bytes": worker and worker.pss * _KIB,
    }


def peers(auto_reads_with: Sequence[str]) -> dict[str, str]:
    """The loader of pytorchvideo that decodes with the same library as each of ours; none if ours takes several."""
    same = {OURS_PYAV: PEER_PYAV}
    if len(auto_reads_with) == 1 and auto_reads_with[0] in _PEERS:
        same[OURS_AUTO] = _PEERS[auto_reads_with[0]]
    return same


def add_ratios(rows: dict[str, dict[str, Any]], peers: Mapping[str, str]) -> None:
    """How many times faster each loader is than its peer, and than pytorchvideo's better one."""
    speeds = {name: row["clips_per_cpu_s"] for name, row in rows.items()}
    best = max((speeds[peer] for peer in _PEERS.values() if peer in speeds), default=None)
    for name, row in rows.items():
        same = speeds.get(peers.get(name, ""))
        row["times_same_decoder"] = same and speeds[name] / same
        row["times_best_pytorchvideo"] = best and speeds[name] / best


def print_bench_data(result: dict[str, Any]) -> None:
    """One table for each kind of file, and what is missing in it."""
    settings = result["settings"]
    print_machine(result)
    print(
        f"A clip: {settings['num_frames']} frames, stride {settings['stride_frames']}, short side "
        f"{settings['short_side']}, crop {settings['size']}; {settings['rounds']} rounds; each loader in its own "
        "process, on one core"
    )
    for kind, table in result["kinds"].items():
        title = (
            f"{kind}: {table['clips']} clips a round, of {table['files_read']} of {table['files']} files; "
            f"auto reads with {', '.join(table['auto_reads_with'])}"
        )
        print_table(title, _COLUMNS, [_cells(name, row) for name, row in table["loaders"].items()])
        for name, cause in (table["left_out"] | table["unread"]).items():
            print(f"left out: {name}: {cause}")
    print(
        "RSS counts the pages that processes share, such as libraries, in full; PSS counts a process's part of them, "
        "USS only what it has for itself. Workers are those of the training loader."
    )


_COLUMNS = (
    "loader",
    "clips / CPU-s",
    "min .. max",
    "x pytorchvideo, same decoder",
    "x best pytorchvideo",
    "process: peak RSS, MiB",
    "after imports",
    "worker: peak PSS, MiB",
    "USS",
)


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    times = (row["times_same_decoder"], row["times_best_pytorchvideo"])
    # ffmpeg's memory is that of another process.
    process = (row["peak_bytes"], row["peak_bytes"] - row["imported_bytes"]) if name != FFMPEG else (None, None)
    memory = (*process, row["worker_pss_bytes"], row["worker_uss_bytes"])
    return (
        name,
        f"{row['clips_per_cpu_s']:.2f}",
        f"{min(row['rounds']):.2f} .. {max(row['rounds']):.2f}",
        *(f"{value:.1f}" if value else "-" for value in times),
        *(f"{value / _MIB:.0f}" if value else "-" for value in memory),
    )
