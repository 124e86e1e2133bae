"""`videoadapt bench data`: clips per CPU-second and memory of our loaders and of others', on the same clips."""

from __future__ import annotations

import datetime
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pebble import ProcessPool
from pydantic import Field, model_validator

from videoadapt.bench.files import generate
from videoadapt.bench.loaders import (
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
    start,
)
from videoadapt.bench.machine import machine, print_machine, versions
from videoadapt.bench.settings import parse_settings
from videoadapt.config import Count, Section, make_config
from videoadapt.data.manifest import index
from videoadapt.data.probe import reason
from videoadapt.errors import ConfigError, RunError, UserError
from videoadapt.log import Bar, print_table, write_json

_TIMEOUT_S = 600.0  # of a turn
_PACKAGES = ("torch", "torchvision", "decord", "av", "pytorchvideo", "torchcodec")
_PEERS = {OURS_AUTO: PEER_DECORD, OURS_PYAV: PEER_PYAV}
_MIB = 1 << 20


class Settings(Section):
    """What is measured, and how often; the clip is TimeSformer-B's."""

    dir: Path = Path("runs/bench")
    rounds: Count = 5  # loaders take turns, so that all meet the same noise
    clips: Count = 3  # in a turn
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

    A loader that is not installed or fails is named with the cause. Raises `UserError` if no video can be read,
    `RunError` if our two readers give different frames.
    """
    settings = parse_settings(Settings, "bench data", overrides)
    kinds = {"given": [Path(video) for video in videos]} if videos else generate(settings.dir / "data")
    works = {kind: _work(kind, paths, settings) for kind, paths in kinds.items()}
    with Bar("bench data", total=len(works) * len(LOADERS) * (1 + settings.rounds), unit="turns") as bar:
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
    manifest = index(config)
    readable = np.flatnonzero(manifest["status"] == "ok").tolist()
    if not readable:
        first = manifest.row(0)
        raise UserError(f"bench data: not one of the {len(manifest)} videos can be read; {first.path}: {first.cause}")
    turns_of_all = (divmod(number, len(readable)) for number in range(settings.clips))
    return Work(manifest, config, [(epoch, readable[place]) for epoch, place in turns_of_all])


def _measure_kind(kind: str, work: Work, rounds: int, bar: Bar) -> dict[str, Any]:
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_own_process()) for name in LOADERS}

        def ask(task: Callable[[str, Work], Any], name: str) -> Any:
            bar.step(note=f"{kind}: {name}")
            if name not in left_out:
                try:
                    return processes[name].schedule(task, args=[name, work], timeout=_TIMEOUT_S).result()
                except Exception as error:  # whatever a library throws, or a crash of its process: the table says so
                    left_out[name] = reason(error)
            return None

        imported = {name: ask(start, name) for name in LOADERS}
        turns = [{name: ask(measure, name) for name in LOADERS} for _ in range(rounds)]
    rows = {name: _row(imported[name], [turn[name] for turn in turns]) for name in LOADERS if name not in left_out}
    require_equal_frames(kind, work, turns[0])
    add_ratios(rows)
    unread = work.manifest.table[work.manifest["status"] != "ok"]
    return {
        "files": len(work.manifest) - len(unread),
        "unread": dict(zip(unread["path"], unread["cause"], strict=True)),
        "auto_reads_with": sorted({row.reader for row, _ in work.clips()}),
        "loaders": rows,
        "left_out": left_out,
    }


@contextmanager
def _own_process() -> Iterator[ProcessPool]:
    """A fresh process for one loader; it may crash, and is stopped on the way out whatever it is at."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(1, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL), context=context)
    try:
        yield pool
    finally:
        pool.stop()
        pool.join()


def _row(imported_bytes: int, turns: Sequence[Turn]) -> dict[str, Any]:
    speeds = [turn.clips_per_cpu_s for turn in turns]
    return {
        "clips_per_cpu_s": statistics.median(speeds),
        "rounds": speeds,
        "peak_bytes": turns[-1].peak_bytes,
        "imported_bytes": imported_bytes,
    }


def require_equal_frames(kind: str, work: Work, turns: dict[str, Turn | None]) -> None:
    """Raises `RunError` if our two readers gave different frames in a round: their figures are worth nothing then."""
    digests = [turn.digests for turn in map(turns.get, OURS) if turn]
    different = [row.path for (row, _), *pair in zip(work.clips(), *digests, strict=True) if len(set(pair)) > 1]
    if different:
        raise RunError(
            f"bench data: {kind}: our readers auto and pyav gave different frames in {len(different)} of "
            f"{len(work.keys)} clips, the first of {different[0]}; nothing was written"
        )


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """How many times faster each loader is than pytorchvideo's with the same decoder, and than its better one."""
    speeds = {name: row["clips_per_cpu_s"] for name, row in rows.items()}
    best = max((speeds[peer] for peer in _PEERS.values() if peer in speeds), default=None)
    for name, row in rows.items():
        same = speeds.get(_PEERS.get(name, ""))
        row["times_same_decoder"] = same and speeds[name] / same
        row["times_best_pytorchvideo"] = best and speeds[name] / best


def print_bench_data(result: dict[str, Any]) -> None:
    """One table for each kind of file, and what is missing in it."""
    settings = result["settings"]
    print_machine(result)
    print(
        f"A clip: {settings['num_frames']} frames, stride {settings['stride_frames']}, short side "
        f"{settings['short_side']}, crop {settings['size']}; {settings['clips']} clips a turn, "
        f"{settings['rounds']} rounds; each loader in its own process, on one core"
    )
    for kind, table in result["kinds"].items():
        title = f"{kind}: {table['files']} files; auto reads with {', '.join(table['auto_reads_with'])}"
        print_table(title, _COLUMNS, [_cells(name, row) for name, row in table["loaders"].items()])
        for name, cause in (table["left_out"] | table["unread"]).items():
            print(f"left out: {name}: {cause}")


_COLUMNS = (
    "loader",
    "clips / CPU-s",
    "min .. max",
    "x pytorchvideo, same decoder",
    "x best pytorchvideo",
    "peak MiB",
    "of it after imports",
)


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    times = (row["times_same_decoder"], row["times_best_pytorchvideo"])
    # ffmpeg's memory is that of another process.
    memory = (row["peak_bytes"], row["peak_bytes"] - row["imported_bytes"]) if name != FFMPEG else (None, None)
    return (
        name,
        f"{row['clips_per_cpu_s']:.2f}",
        f"{min(row['rounds']):.2f} .. {max(row['rounds']):.2f}",
        *(f"{value:.1f}" if value else "-" for value in times),
        *(f"{value / _MIB:.0f}" if value else "-" for value in memory),
    )
