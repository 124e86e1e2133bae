"""Compares groups that decode for themselves with shared decoding: `python tools/bench_shared_decoding.py`.

Two and three gloo ranks, one per length, read real H.264 files of 340x256. Three cases are measured: loading alone, a
step of a tiny model (mostly reading), and a step of TimeSformer-S in bf16. Each rank is pinned to a core; three ranks
share two cores on a smaller machine. A rank reads in its main process, so that reading and training share its core as
they would with workers. Both forms take turns within a round, and ratios are those within a round. With seven rounds,
the interval from the smallest to the largest ratio covers the true median with a confidence of 98 %.
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
from videoadapt.runtime.console import print_table
from videoadapt.runtime.machine import machine, versions
from videoadapt.runtime.ranks import rank, wait_for_all, world_size
from videoadapt.training.exchange import ClipExchange
from videoadapt.training.groups import make_plan
from videoadapt.training.state import State
from videoadapt.training.step import RankRole, train_step

COPIES = 8  # copies of each file: an epoch of 48 clips
LENGTHS = {2: (14, 7), 3: (14, 10, 7)}  # by number of ranks
TINY = {"width": 48, "depth": 1, "heads": 2}
SMALL = {"width": 384, "depth": 12, "heads": 6}
FORMS = ("own", "shared")


@dataclass(frozen=True)
class TurnTime:
    """One turn of one form on one rank."""

    seconds: float
    cpu_s: float  # CPU time of all threads, gloo's threads included
    packed_s: float = 0.0
    waited_s: float = 0.0  # wait for the clips of other ranks, which may still be reading
    bytes_sent: int = 0  # to other ranks


class TimedExchange(ClipExchange):
    """Measures the time for packing and waiting, and counts the bytes."""

    packed_s = waited_s = 0.0
    bytes_sent = 0

    def _send(self, clips: Iterable[Clip | Failure]) -> tuple[Tensor, Any]:
        items = list(clips)  # reads the clips before the clock of packing starts
        begin = time.perf_counter()
        received, work = super()._send(items)
        self.packed_s += time.perf_counter() - begin
        others = (len(positions) for number, positions in enumerate(self._sent) if number != rank())
        self.bytes_sent += sum(others) * self._row_bytes
        return received, _TimedWork(self, work)


class _TimedWork:
    def __init__(self, exchange: TimedExchange, work: dist.Work) -> None:
        self._exchange, self._work = exchange, work

    def wait(self) -> None:
        begin = time.perf_counter()
        self._work.wait()
        self._exchange.waited_s += time.perf_counter() - begin


def both_forms(config: Config, steps: int, trains: bool) -> Turn:
    """Prepares both forms; a turn runs `steps` steps of each and returns a `TurnTime` by form."""
    manifest = load_or_index(config)
    plan = make_plan(config, world_size(), point_macs(config.model))
    exchange = TimedExchange(manifest, config, plan)
    positions = partial(plan.group(rank()).positions, rank())
    state = State.start(config, manifest) if trains else None
    role = RankRole.from_plan(config, state.model, plan) if state is not None else None
    steps_of = {
        "own": train_batches(manifest, config, positions=positions),
        "shared": train_batches(manifest, config, positions=positions, exchange=exchange),
    }

    def measure(batches: Iterator[list[Batch]]) -> TurnTime:
        before = (exchange.packed_s, exchange.waited_s, exchange.bytes_sent)
        wait_for_all()
        begin, cpu_s = time.perf_counter(), time.process_time()
        for step in islice(batches, steps):
            if state is not None and role is not None:
                train_step(state, role, step)
        cpu_s = time.process_time() - cpu_s  # before the barrier, in which a rank may spin
        wait_for_all()
        after = (exchange.packed_s, exchange.waited_s, exchange.bytes_sent)
        packed_s, waited_s, sent = (b - a for a, b in zip(before, after, strict=True))
        return TurnTime(time.perf_counter() - begin, cpu_s, packed_s, waited_s, int(sent))

    order = list(FORMS)

    def turn() -> dict[str, TurnTime]:
        order.reverse()  # the form that runs first changes from turn to turn
        return {form: measure(steps_of[form]) for form in order}

    return turn


def transfer(config: Config) -> Turn:
    """Prepares the exchange of clips that are already read; a turn packs and sends the clips of a step."""
    manifest = load_or_index(config)
    exchange = ClipExchange(manifest, config, make_plan(config, world_size(), point_macs(config.model)))
    model = config.model
    frames = torch.zeros((3, model.num_frames, model.size, model.size), dtype=torch.uint8)  # C T H W
    clips = [Clip(frames, 0, 0) for _ in exchange.read]

    def turn() -> TurnTime:
        wait_for_all()
        begin, cpu_s = time.perf_counter(), time.process_time()
        exchange._send(clips)[1].wait()
        return TurnTime(time.perf_counter() - begin, time.process_time() - cpu_s)

    return turn


def make_videos(folder: Path) -> Path:
    """Generates the 340x256 videos of `bench data`. Returns the path of a list that names `COPIES` links to each."""
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
    """Returns a config with a group of one rank for each length."""
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
    """Returns the turns of all ranks for each round, without a first round as warm-up."""
    with started(ranks, prepare, config, *args) as processes:
        processes.ready()
        return [processes.turn() for _ in range(1 + rounds)][1:]


def row_of(name: str, turns: Sequence[Sequence[dict[str, TurnTime]]], clips: int) -> tuple[str, ...]:
    """Returns the cells of a case.

    Args:
        name: The first cell.
        turns: The times by form, for each round and rank.
        clips: Clips of a turn.
    """
    # The slowest rank decides how long a turn takes; CPU time is added up.
    seconds = {form: [max(rank_times[form].seconds for rank_times in turn) for turn in turns] for form in FORMS}
    cpu_s = {form: [sum(rank_times[form].cpu_s for rank_times in turn) for turn in turns] for form in FORMS}
    shared = [[rank_times["shared"] for rank_times in turn] for turn in turns]
    faster = [own / with_others for own, with_others in zip(seconds["own"], seconds["shared"], strict=True)]
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
    *("case", "own clips/s", "shared clips/s", "faster by", "min .. max", "own CPU-ms/clip", "shared"),
    *("MB sent/clip", "packing ms/clip", "waiting ms/clip"),
)


def main() -> None:
    """Measures all cases and prints a table for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/bench_shared_decoding"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], choices=LENGTHS)
    given = parser.parse_args()
    make_videos(given.dir)
    load_or_index(config_of(given.dir, 2, 12, TINY, "fp32"))  # here, because the ranks would all index at once
    cases = {  # model, precision, clips per step, steps per turn, whether it trains
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
        slowest = [max(rank_time.seconds for rank_time in turn) for turn in sent]
        cpu_s = [sum(rank_time.cpu_s for rank_time in turn) for turn in sent]
        print(
            f"Packing and sending 12 clips in memory: median {1000 * statistics.median(slowest):.1f} ms "
            f"({1000 * min(slowest):.1f} .. {1000 * max(slowest):.1f}), {1000 * statistics.median(cpu_s) / 12:.2f} "
            f"CPU-ms per clip over all ranks. Load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
