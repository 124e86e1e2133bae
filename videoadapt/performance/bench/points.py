"""`videoadapt bench points`: measures the speed of each point of a model and compares it with the ratio of MACs.

The points take turns, so that noise on the machine meets all of them. The speed of a point is relative to the costliest
point in the same round. Clips are random uint8 on the device: normalising and resizing are measured, decoding and
routing are not. A second table has each point at its own best batch, as the router runs it.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, parse_settings
from videoadapt.config.sections import Count, Section
from videoadapt.data.clips.views import preprocess
from videoadapt.evaluation.intervals import median_interval
from videoadapt.model.timesformer import TimeSformer
from videoadapt.performance.bench.results import markdown_table, measured_with, print_machine, with_interval
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import Summary, replacing, write_json
from videoadapt.runtime.machine import now, pick_device, precision_dtype

BEST = "Each point at its own best batch"
TARGET = 0.85  # least fraction of the speed that the MACs promise, for a point that counts as fast


class Settings(Section):
    """The settings of the benchmark."""

    dir: Path = Path("runs/bench")
    rounds: Count = 15
    batches: tuple[Count, ...] = (1, 8)  # clips of a forward pass


@dataclass(frozen=True)
class PointRow:
    """One point at one batch size in `points.json`. Lists are a median over rounds and its 95 % interval, or its range.

    In the rows of `best`, the costliest point of the comparison runs at its own best batch, too.
    """

    point: str
    batch: int
    macs: int  # MACs of one clip
    clips_per_s: float
    seconds: list[float]  # times of a forward pass
    speed: list[float]  # relative to the costliest point in the same round
    promised: float  # MACs of the costliest point / MACs of this point
    kept: list[float]  # speed / promised; the target is `TARGET` or more


def bench_points(config: Config, words: Sequence[str] = ()) -> Summary:
    """Measures every point at every batch size, and writes `points.json` and `points.md`.

    Args:
        config: Gives the model, the device, the precision and the seed.
        words: Settings as `key=value`.

    Returns:
        The content of `points.json`.

    Raises:
        ConfigError: A setting is wrong, or `run.device` is not available.
    """
    settings = parse_settings(Settings, "bench points", words)
    device = pick_device(config.run.device)
    torch.manual_seed(config.run.seed)  # random weights: the time of a pass does not depend on them
    model = TimeSformer(config.model).to(device, precision_dtype(config.run.precision)).eval()
    rounds: dict[int, list[dict[str, float]]] = {batch: [] for batch in settings.batches}
    with Bar("bench points", total=len(rounds) * (1 + settings.rounds), unit="rounds") as bar:
        for number in range(1 + settings.rounds):  # batch sizes take turns as well, for the rows of `best`
            for batch, measured in rounds.items():
                measured.append(_round(model, batch, number))
                bar.step(note=f"{batch} clips")
    counted = {batch: measured[1:] for batch, measured in rounds.items()}  # the first round is a warm-up
    macs = point_macs(config.model)
    rows = [row for batch, measured in counted.items() for row in speeds(measured, macs, dict.fromkeys(macs, batch))]
    best = at_best_batches(counted, macs)
    result = measured_with(settings, ("torch", "timm"), config) | {
        "device": device.type,
        "target": TARGET,
        "rows": [dataclasses.asdict(row) for row in rows],
        "best": [dataclasses.asdict(row) for row in best],
    }
    write_json(settings.dir / "points.json", result)
    tables = (markdown(rows, settings.rounds), f"{BEST}:\n", markdown(best, settings.rounds))
    with replacing(settings.dir / "points.md") as temporary:
        temporary.write_text("\n".join(tables), encoding="utf-8")
    return result


def _round(model: TimeSformer, batch: int, number: int) -> dict[str, float]:
    """Measures the seconds of a forward pass by point."""
    config, device = model.config, model.head.weight.device
    shape = (batch, 3, config.num_frames, config.size, config.size)  # B C T H W
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    # Another order in each round: a point profits from the caches and suffers from the heat of the one before it.
    order = random.Random(number).sample(config.points, len(config.points))
    return {point: _seconds(model, clips, point) for point in order}


@torch.inference_mode()
def _seconds(model: TimeSformer, clips: Tensor, point: str) -> float:
    begin = now(clips.device)
    model(preprocess(model, clips, point), point)
    return now(clips.device) - begin


def at_best_batches(rounds: Mapping[int, Sequence[Mapping[str, float]]], macs: Mapping[str, int]) -> list[PointRow]:
    """Returns the row of each point at the batch of its highest median of clips per second, costliest point first.

    Args:
        rounds: Seconds of a forward pass by point, for each round, by batch; round n is measured at all batches.
        macs: As in `speeds`.
    """
    best = {
        point: min(rounds, key=lambda batch: statistics.median(by[point] for by in rounds[batch]) / batch)
        for point in macs
    }
    count = len(next(iter(rounds.values())))
    return speeds([{p: rounds[batch][n][p] for p, batch in best.items()} for n in range(count)], macs, best)


def speeds(
    rounds: Sequence[Mapping[str, float]], macs: Mapping[str, int], batches: Mapping[str, int]
) -> list[PointRow]:
    """Returns a row for each point, costliest first.

    Args:
        rounds: Seconds of a forward pass by point, for each round.
        macs: MACs of a clip by point, costliest first.
        batches: Clips of a forward pass by point.
    """
    costliest = next(iter(macs))
    rows = []
    for point, cost in macs.items():
        promised = macs[costliest] / cost
        # Ratios are taken within a round and not between medians: noise that slows a round down cancels out.
        seconds = median_interval([by_point[point] for by_point in rounds])
        clips = batches[point] / batches[costliest]
        speed = median_interval([clips * by_point[costliest] / by_point[point] for by_point in rounds])
        rows.append(
            PointRow(
                point=point,
                batch=batches[point],
                macs=cost,
                clips_per_s=batches[point] / seconds[0],
                seconds=list(seconds),
                speed=list(speed),
                promised=promised,
                kept=[value / promised for value in speed],
            )
        )
    return rows


_COLUMNS = (
    "point",
    "batch",
    "GMACs",
    "clips/s",
    "ms ({level})",
    "speed ({level})",
    "by MACs",
    "speed / by MACs ({level})",
    "target",
)


def markdown(rows: Sequence[PointRow], rounds: int) -> str:
    """Returns the rows, measured in so many rounds, as a markdown table."""
    return markdown_table(_COLUMNS, [_cells(row) for row in rows], rounds)


def _cells(row: PointRow) -> tuple[str, ...]:
    return (
        row.point,
        str(row.batch),
        f"{row.macs / 1e9:.2f}",
        f"{row.clips_per_s:.1f}",
        with_interval(row.seconds, 1000, 1),
        with_interval(row.speed),
        f"{row.promised:.2f}",
        with_interval(row.kept),
        "met" if row.kept[0] >= TARGET else "missed",
    )


def print_bench_points(result: Mapping[str, Any]) -> None:
    """Prints the machine and the table of a content of `points.json`."""
    print_machine(result)
    print(
        f"{result['config']['run']['precision']}, {result['machine']['threads']} threads, load "
        f"{result['machine']['load']:.1f}, medians of {result['settings']['rounds']} rounds; speed is relative to the "
        f"costliest point; the target is {result['target']:g} of the speed that the MACs promise\n"
    )
    rounds = result["settings"]["rounds"]
    print(markdown([PointRow(**row) for row in result["rows"]], rounds))
    print(f"{BEST}:\n\n{markdown([PointRow(**row) for row in result['best']], rounds)}")
