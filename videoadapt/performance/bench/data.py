"""`videoadapt bench data`: compares the speed and memory of our loaders and other libraries' on the same clips.

Each loader has its own process on one core. The loaders take turns, so that noise on the machine meets all of them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
from videoadapt.performance.bench.memory import ProcessMemory, worker_memory
from videoadapt.performance.bench.results import measured_with, print_machine
from videoadapt.runtime.console import Bar, print_table
from videoadapt.runtime.files import Summary, write_json

_TIMEOUT_S = 600.0  # limit of a turn; a library that hangs must not stop the benchmark
_PACKAGES = ("torch", "torchvision", "decord", "av", "pytorchvideo", "torchcodec")
_PEERS = {"decord": PEER_DECORD, "pyav": PEER_PYAV}
_CLIPS_MIN = 3  # clips of a turn: fewer are too short for the CPU clock
_KIB, _MIB = 1 << 10, 1 << 20


T = TypeVar("T")


class Settings(Section):
    """The settings of the benchmark. The default clip has the size of TimeSformer-B's clips."""

    dir: Path = Path("runs/bench")
    rounds: Count = 5
    clips: Count | None = None  # clips of a turn; None: one of each file, but at least three
    num_frames: Count = 8
    stride_frames: Count = 32
    short_side: Count = 256
    size: Annotated[int, Field(ge=16)] = 224  # side of the crop, in pixels
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        if self.size > self.short_side:
            raise ConfigError(f"size: expected at most short_side ({self.short_side}), got {self.size}")
        return self


@dataclass(frozen=True)
class LoaderRow:
    """One loader in `data.json`."""

    clips_per_cpu_s: float  # the median over rounds
    rounds: list[float]
    peak_bytes: int  # peak memory of the loader's process
    imported_bytes: int  # memory of the process after the imports
    worker_uss_bytes: int | None  # memory of the training loader's workers; None for the loaders of others
    worker_pss_bytes: int | None
    times_same_decoder: float | None = None  # speed relative to pytorchvideo with the same decoder
    times_best_pytorchvideo: float | None = None  # speed relative to pytorchvideo with its faster decoder


@dataclass(frozen=True)
class KindTable:
    """All loaders on one kind of files, in `data.json`."""

    files: int
    files_read: int
    clips: int  # clips of a turn
    unread: dict[str, str]  # the cause by path
    auto_reads_with: list[str]  # the readers that `data.reader: auto` chose
    loaders: dict[str, LoaderRow]
    left_out: dict[str, str]  # the cause by loader


def bench_data(overrides: Sequence[str] = (), videos: Sequence[str] = ()) -> Summary:
    """Measures all loaders and writes `data.json`.

    A loader that is not installed, or fails, is left out. So is a file that cannot be read, or of which our two readers
    give different frames. The result names both with the cause.

    Args:
        overrides: Settings as `key=value`.
        videos: Paths of videos; if empty, videos are generated.

    Returns:
        The content of `data.json`.

    Raises:
        ConfigError: A setting is wrong.
        UserError: None of the files can be used.
    """
    settings = parse_settings(Settings, "bench data", overrides)
    kinds = {"given": [Path(video) for video in videos]} if videos else generate(settings.dir / "data")
    works = {kind: _work(kind, paths, settings) for kind, paths in kinds.items()}
    turns = len(works) * (len(LOADERS) * (1 + settings.rounds) + len(OURS))
    with Bar("bench data", total=turns, unit="turns") as bar:
        tables = {kind: _measure_kind(kind, work, settings.rounds, bar) for kind, work in works.items()}
    result = measured_with(settings, _PACKAGES) | {
        "kinds": {kind: dataclasses.asdict(table) for kind, table in tables.items()},
    }
    result["versions"] |= ffmpeg_version()
    write_json(settings.dir / "data.json", result)
    return result


def _work(kind: str, paths: Sequence[Path], settings: Settings) -> Work:
    """Returns the clips of a turn, spread evenly over the files, at random positions in the files."""
    folder = settings.dir / "lists" / kind.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    videos = folder / "videos.txt"
    videos.write_text("".join(f"{path.absolute()} 0\n" for path in paths), encoding="utf-8")
    # Only reading is configured: the model never runs, and without flips a loader's work does not depend on chance.
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
    return _without_unfit(_with_keys(index(config), config, settings.clips), settings.clips)


def _with_keys(manifest: Manifest, config: Config, clips: int | None) -> Work:
    """Returns the work on the readable files of a manifest. Each file gives one clip before any gives a second."""
    readable = manifest.readable_rows().tolist()
    if not readable:
        first = manifest.row(0)
        raise UserError(f"bench data: none of the {len(manifest)} videos can be used; {first.path}: {first.cause}")
    numbers = range(clips or max(_CLIPS_MIN, len(readable)))
    turns_of_all = (divmod(number, len(readable)) for number in numbers)  # (epoch, index)
    return Work(manifest, config, [(epoch, readable[index]) for epoch, index in turns_of_all])


def _without_unfit(work: Work, clips: int | None) -> Work:
    """Returns the work without the files that our readers cannot read; its manifest marks them as broken."""
    with _own_process() as process:
        # With fewer files the others give more clips, which can turn out to be unfit too: hence the loop.
        while unfit := _result(process, unfit_files, work):
            work = _with_keys(broken(work.manifest, unfit), work.config, clips)
    return work


def broken(manifest: Manifest, causes: Mapping[str, str]) -> Manifest:
    """Returns the manifest with some files marked as broken, given the cause by path."""
    table = manifest.table
    unfit = table["path"].isin(list(causes))
    table.loc[unfit, "status"] = "broken"
    table.loc[unfit, "cause"] = table.loc[unfit, "path"].map(causes)
    return Manifest(table, manifest.classes, manifest.fingerprint)


def _measure_kind(kind: str, work: Work, rounds: int, bar: Bar) -> KindTable:
    left_out: dict[str, str] = {}

    def attempt(name: str, task: Callable[[], T]) -> T | None:
        """Runs a task for a loader and returns its result; returns None after the loader's first error."""
        bar.step(note=f"{kind}: {name}")
        if name not in left_out:
            try:
                return task()
            except Exception as error:  # a library may raise anything, and its process may crash
                left_out[name] = reason(error)
        return None

    with ExitStack() as stack:
        processes = {name: stack.enter_context(_own_process()) for name in LOADERS}

        def run(task: Callable[[str, Work], T], name: str) -> T | None:
            return attempt(name, lambda: _result(processes[name], task, name, work))

        # All processes stay alive during all rounds: a new one would have to import and warm up again.
        imported = {name: run(start, name) for name in LOADERS}
        turns = [{name: run(measure, name) for name in LOADERS} for _ in range(rounds)]
        readers = [] if OURS_AUTO in left_out else _result(processes[OURS_AUTO], readers_of_auto, work)
    clips = len(work.keys) * rounds
    # After the turns, so that the workers do not disturb them.
    workers = {name: attempt(name, partial(worker_memory, work, reader, clips)) for name, reader in OURS.items()}
    rows = {}
    for name in LOADERS:
        measured = [turn for turn in (each[name] for each in turns) if turn is not None]
        imported_bytes = imported[name]
        if name not in left_out and imported_bytes is not None:
            rows[name] = _row(imported_bytes, measured, workers.get(name))
    unread = work.manifest.table[work.manifest["status"] != "ok"]
    return KindTable(
        files=len(work.manifest),
        files_read=len({row for _, row in work.keys}),
        clips=len(work.keys),
        unread=dict(zip(unread["path"], unread["cause"], strict=True)),
        auto_reads_with=readers,
        loaders=with_ratios(rows, peers(readers)),
        left_out=left_out,
    )


@contextmanager
def _own_process() -> Iterator[ProcessPool]:
    """Starts a process for one loader. It may crash, and is stopped at the end, also in the middle of a task."""
    pool = ProcessPool(1, initializer=_isolate, context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.stop()
        pool.join()


def _result(process: ProcessPool, task: Callable[..., T], *args: Any) -> T:
    return process.schedule(task, args=args, timeout=_TIMEOUT_S).result()


def _isolate() -> None:
    """Makes the process end at Ctrl-C, and drops its output.

    Errors come back as exceptions. The C++ code of some libraries also writes to the terminal.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # the process's descriptors: C++ code does not use sys.stdout
        os.dup2(nothing, descriptor)
    os.close(nothing)


def _row(imported_bytes: int, turns: Sequence[Turn], worker: ProcessMemory | None) -> LoaderRow:
    speeds = [turn.clips_per_cpu_s for turn in turns]
    return LoaderRow(
        clips_per_cpu_s=statistics.median(speeds),
        rounds=speeds,
        peak_bytes=turns[-1].peak_bytes,
        imported_bytes=imported_bytes,
        worker_uss_bytes=None if worker is None else worker.uss * _KIB,
        worker_pss_bytes=None if worker is None else worker.pss * _KIB,
    )


def peers(auto_reads_with: Sequence[str]) -> dict[str, str]:
    """Returns, for each of our loaders, the loader of pytorchvideo that decodes with the same library.

    The loader `auto` has no peer if it reads some of the files with another library than others.
    """
    same = {OURS_PYAV: PEER_PYAV}
    # With several libraries the speed of `auto` is a mixture, which no peer can match.
    if len(auto_reads_with) == 1 and auto_reads_with[0] in _PEERS:
        same[OURS_AUTO] = _PEERS[auto_reads_with[0]]
    return same


def with_ratios(rows: Mapping[str, LoaderRow], peers: Mapping[str, str]) -> dict[str, LoaderRow]:
    """Returns the rows with the speed relative to the loader's peer, and to the faster loader of pytorchvideo."""
    speeds = {name: row.clips_per_cpu_s for name, row in rows.items()}
    # None if pytorchvideo is not installed, or was left out.
    best = max((speeds[peer] for peer in _PEERS.values() if peer in speeds), default=None)
    with_both = {}
    for name, row in rows.items():
        same = speeds.get(peers.get(name, ""))
        with_both[name] = dataclasses.replace(
            row,
            times_same_decoder=same and speeds[name] / same,
            times_best_pytorchvideo=best and speeds[name] / best,
        )
    return with_both


def print_bench_data(result: Mapping[str, Any]) -> None:
    """Prints a content of `data.json`: a table for each kind of files, and the loaders and files left out."""
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
        print_table(title, _COLUMNS, [_cells(name, LoaderRow(**row)) for name, row in table["loaders"].items()])
        for name, cause in (table["left_out"] | table["unread"]).items():
            print(f"left out: {name}: {cause}")
    print(
        "RSS counts pages that processes share, such as libraries, in full. PSS divides them by the number of "
        "processes. USS leaves them out. Workers are the training loader's."
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


def _cells(name: str, row: LoaderRow) -> tuple[str, ...]:
    times = (row.times_same_decoder, row.times_best_pytorchvideo)
    # ffmpeg runs in a separate process, whose memory is not measured.
    process = (row.peak_bytes, row.peak_bytes - row.imported_bytes) if name != FFMPEG else (None, None)
    memory = (*process, row.worker_pss_bytes, row.worker_uss_bytes)
    return (
        name,
        f"{row.clips_per_cpu_s:.2f}",
        f"{min(row.rounds):.2f} .. {max(row.rounds):.2f}",
        *(f"{value:.1f}" if value else "-" for value in times),
        *(f"{value / _MIB:.0f}" if value else "-" for value in memory),
    )
