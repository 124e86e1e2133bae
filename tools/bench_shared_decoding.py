"""Groups that decode for themselves against shared decoding, on gloo ranks: `python tools/bench_shared_decoding.py`.

Two and three ranks, a group of one rank for each length, read real H.264 files of 340x256: loading alone, a step of a
tiny model (reading is the larger part of it) and one of TimeSformer-S in bf16. Each rank is pinned to a core (three
ranks on two cores share) and reads in its main process, so that reading and training take turns on that core as they
would with workers. Both forms take turns within a round; relations are those within a round. Seven rounds are measured:
between the least and the greatest lies the median of all rounds with a confidence of 98 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rank_processes import Turn, started
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, make_config
from videoadapt.data.clips.datasets import Clip, Failure
from videoadapt.data.clips.loader import Batch, train_batches
from videoadapt.data.index.manifest import load_or_index
from videoadapt.performance.bench.files import SIZES, generate
from videoadapt.performance.bench.machine import machine, versions
from videoadapt.runtime.console import print_table
from videoadapt.runtime.ranks import rank, wait_for_all, world_size
from videoadapt.training.exchange import ClipExchange
from videoadapt.training.groups import make_plan
from videoadapt.training.state import State
from videoadapt.training.train import RankRole, train_step

COPIES = 8  # of each file: an epoch of 48 clips
LENGTHS = {2: (14, 7), 3: (14, 10, 7)}  # by the number of ranks
TINY = {"width": 48, "depth": 1, "heads": 2}
SMALL = {"width": 384, "depth": 12, "heads": 6}
FORMS = ("own", "shared")


@dataclass(frozen=True)
class Taken:
    """What one rank took for some steps of one form."""

    seconds: float
    cpu_s: float  # of all threads, those of gloo too
    packed_s: float = 0.0
    waited_s: float = 0.0  # for the clips of others, which may still have been reading
    bytes_sent: int = 0  # to other ranks


class WatchedExchange(ClipExchange):
    """Notes the time for packing and waiting, and the bytes."""

    packed_s = waited_s = 0.0
    bytes_sent = 0

    def _send(self, clips: Iterable[Clip | Failure]) -> tuple[Tensor, Any]:
        items = list(clips)  # reading is not packing
        begin = time.perf_counter()
        received, work = super()._send(items)
        self.packed_s += time.perf_counter() - begin
        others = (len(positions) for number, positions in enumerate(self._sent) if number != rank())
        self.bytes_sent += sum(others) * self._row_bytes
        return received, _WatchedWork(self, work)


class _WatchedWork:
    def __init__(self, exchange: WatchedExchange, work: dist.Work) -> None:
        self._exchange, self._work = exchange, work

    def wait(self) -> None:
        begin = time.perf_counter()
        self._work.wait()
        self._exchange.waited_s += time.perf_counter() - begin


def both_forms(config: Config, steps: int, trains: bool) -> Turn:
    """A turn: so many steps of each form, by form; the one that goes first changes from turn to turn."""
    manifest = load_or_index(config)
    plan = make_plan(config, world_size(), point_macs(config.model))
    exchange = WatchedExchange(manifest, config, plan)
    share = partial(plan.group(rank()).positions, rank())
    state = State.start(config, manifest) if trains else None
    seat = RankRole.take(config, state.model, plan) if state is not None else None
    runs = {
        "own": train_batches(manifest, config, positions=share),
        "shared": train_batches(manifest, config, positions=share, exchange=exchange),
    }

    def taken(batches: Iterator[list[Batch]]) -> Taken:
        before = (exchange.packed_s, exchange.waited_s, exchange.bytes_sent)
        wait_for_all()
        begin, cpu_s = time.perf_counter(), time.process_time()
        for step in islice(batches, steps):
            if state is not None and seat is not None:
                train_step(state, seat, step)
        cpu_s = time.process_time() - cpu_s
        wait_for_all()
        after = (exchange.packed_s, exchange.waited_s, exchange.bytes_sent)
        packed_s, waited_s, sent = (b - a for a, b in zip(before, after, strict=True))
        return Taken(time.perf_counter() - begin, cpu_s, packed_s, waited_s, int(sent))

    order = list(FORMS)

    def turn() -> dict[str, Taken]:
        order.reverse()
        return {form: taken(runs[form]) for form in order}

    return turn


def transfer(config: Config) -> Turn:
    """A turn: seconds for packing and sending the clips of a step that lie ready, and CPU seconds of the rank."""
    manifest = load_or_index(config)
    exchange = ClipExchange(manifest, config, make_plan(config, world_size(), point_macs(config.model)))
    model = config.model
    frames = torch.zeros((3, model.num_frames, model.size, model.size), dtype=torch.uint8)
    clips = [Clip(frames, 0, 0) for _ in exchange.read]

    def turn() -> Taken:
        wait_for_all()
        begin, cpu_s = time.perf_counter(), time.process_time()
        exchange._send(clips)[1].wait()
        return Taken(time.perf_counter() - begin, time.process_time() - cpu_s)

    return turn


def make_videos(folder: Path) -> Path:
    """A list of links to the files that `bench data` measures loaders on, of 340x256."""
    kinds = generate(folder / "data", sizes=SIZES[:1])
    lines = []
    for number, path in enumerate(path for paths in kinds.values() for path in paths):
        for copy in range(COPIES):
            link = folder / "data" / f"{number}_{copy}.mp4"
            if not link.exists():
                link.hardlink_to(path)
            lines.append(f"{link.absolute()} 0\n")
    (folder / "videos.txt").write_text("".join(lines), encoding="utf-8")
    return folder / "videos.txt"


def config_of(folder: Path, ranks: int, batch: int, model: dict[str, int], precision: str) -> Config:
    """A group of one rank for each length."""
    lengths = LENGTHS[ranks]
    return make_config(
        {
            "run": {"dir": folder / "run", "device": "cpu", "precision": precision},
            "data": {"train": {"annotations": folder / "videos.txt"}, "workers": 0, "short_side": [256, 256]},
            "model": {**model, "points": [str(length) for length in lengths]},
            "train": {"epochs": 10_000, "batch": batch},
            "parallel": {"groups": {str(length): 1 for length in lengths}},
        }
    )


def measured(config: Config, ranks: int, rounds: int, prepare: Callable[..., Turn], *args: Any) -> list[Any]:
    """The turns of all ranks, round by round; a round that does not count comes first."""
    with started(ranks, prepare, config, *args) as processes:
        processes.ready()
        return [processes.turn() for _ in range(1 + rounds)][1:]


def row_of(name: str, turns: Sequence[Sequence[dict[str, Taken]]], clips: int) -> tuple[str, ...]:
    """A line of the table: both forms over so many clips a turn, and their relation within rounds."""
    seconds = {form: [max(taken[form].seconds for taken in turn) for turn in turns] for form in FORMS}
    cpu_s = {form: [sum(taken[form].cpu_s for taken in turn) for turn in turns] for form in FORMS}
    shared = [[taken["shared"] for taken in turn] for turn in turns]
    faster = [own / one for own, one in zip(seconds["own"], seconds["shared"], strict=True)]
    return (
        name,
        *(f"{clips / statistics.median(seconds[form]):.2f}" for form in FORMS),
        f"{statistics.median(faster):.2f}",
        f"{min(faster):.2f} .. {max(faster):.2f}",
        *(f"{1000 * statistics.median(cpu_s[form]) / clips:.0f}" for form in FORMS),
        f"{statistics.median(sum(t.bytes_sent for t in turn) for turn in shared) / clips / 1e6:.2f}",
        f"{1000 * statistics.median(sum(t.packed_s for t in turn) for turn in shared) / clips:.1f}",
        f"{1000 * statistics.median(sum(t.waited_s for t in turn) for turn in shared) / clips:.1f}",
    )


COLUMNS = (
    *("what", "own clips/s", "shared clips/s", "faster by", "min .. max", "own CPU-ms/clip", "shared"),
    *("MB sent/clip", "packing ms/clip", "waiting ms/clip"),
)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/bench_shared_decoding"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], choices=LENGTHS)
    given = parser.parse_args()
    make_videos(given.dir)
    load_or_index(config_of(given.dir, 2, 12, TINY, "fp32"))  # once: the ranks find it made
    cases = {  # model, precision, clips a step, steps a turn, whether it trains
        "loading": (TINY, "fp32", 12, 2, False),
        "a tiny model": (TINY, "fp32", 12, 1, True),
        "TimeSformer-S": (SMALL, "bf16", 3, 1, True),
    }
    print(machine(), versions(["torch"]))
    for ranks in given.ranks:
        rows = []
        for name, (model, precision, batch, steps, trains) in cases.items():
            config = config_of(given.dir, ranks, batch, model, precision)
            turns = measured(config, ranks, given.rounds, both_forms, steps, trains)
            rows.append(row_of(name, turns, batch * steps))
        print_table(f"{ranks} ranks, lengths {LENGTHS[ranks]}, {given.rounds} rounds", COLUMNS, rows)
        config = config_of(given.dir, ranks, 12, TINY, "fp32")
        sent = measured(config, ranks, 3 * given.rounds, transfer)
        slowest = [max(taken.seconds for taken in turn) for turn in sent]
        cpu_s = [sum(taken.cpu_s for taken in turn) for turn in sent]
        print(
            f"12 clips that lie ready, packed and sent: median {1000 * statistics.median(slowest):.1f} ms "
            f"({1000 * min(slowest):.1f} .. {1000 * max(slowest):.1f}), {1000 * statistics.median(cpu_s) / 12:.2f} "
            f"CPU-ms a clip over all ranks. Load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
