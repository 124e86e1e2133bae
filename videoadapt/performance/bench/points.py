"""`videoadapt bench points`: how fast each point of a model really runs, beside what its MACs promise.

Points take turns, so that all meet the same noise; a point's speed is relative to the costliest point's in the same
round. Clips are made up and lie ready: decoding, normalising and routing are not part of it.
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, parse_settings
from videoadapt.config.sections import Count, Section
from videoadapt.evaluation.intervals import median_interval
from videoadapt.model.timesformer import TimeSformer
from videoadapt.performance.bench.machine import machine, print_machine, versions
from videoadapt.performance.timing import now
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import replacing, write_json
from videoadapt.runtime.machine import pick_device, precision_dtype

TARGET = 0.85  # of the speed that the MACs promise


class Settings(Section):
    """What is measured, and how often."""

    dir: Path = Path("runs/bench")
    rounds: Count = 15
    batches: tuple[Count, ...] = (1, 8)  # clips of a forward pass


def bench_points(config: Config, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measures every point at every batch size; returns what `points.json` holds, and writes `points.md` beside it.

    Of each point: seconds of a forward pass, the speed relative to the costliest point, what the MACs promise, and
    their quotient, each a median over rounds with its 95 % interval. Raises `ConfigError` for settings that cannot be.
    """
    settings = parse_settings(Settings, "bench points", words)
    device = pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    model = TimeSformer(config.model).to(device, precision_dtype(config.run.precision)).eval()
    rows = []
    total = len(settings.batches) * (1 + settings.rounds)
    with Bar("bench points", total=total, unit="rounds") as bar:
        for batch in settings.batches:
            rounds = []
            for number in range(1 + settings.rounds):
                rounds.append(_round(model, batch, number))
                bar.step(note=f"{batch} clips")
            rows += speeds(rounds[1:], point_macs(config.model), batch)  # the first one warms up
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine() | {"device": device.type, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "versions": versions(("torch", "timm")),
        "settings": settings.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "target": TARGET,
        "rows": rows,
    }
    write_json(settings.dir / "points.json", result)
    with replacing(settings.dir / "points.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    return result


def _round(model: TimeSformer, batch: int, number: int) -> dict[str, float]:
    """Seconds of a forward pass at each point, in another order each round."""
    config, weight = model.config, model.head.weight
    shape = (batch, 3, config.num_frames, config.size, config.size)
    clips = torch.randn(shape, dtype=weight.dtype, device=weight.device)
    order = random.Random(number).sample(config.points, len(config.points))
    return {point: _seconds(model, clips, point) for point in order}


@torch.inference_mode()
def _seconds(model: TimeSformer, clips: Tensor, point: str) -> float:
    begin = now(clips.device)
    model(clips, point)
    return now(clips.device) - begin


def speeds(rounds: Sequence[Mapping[str, float]], macs: Mapping[str, int], batch: int) -> list[dict[str, Any]]:
    """A row for each point, costliest first, from the seconds of each round."""
    costliest = next(iter(macs))
    rows = []
    for point, cost in macs.items():
        promised = macs[costliest] / cost
        seconds = median_interval([taken[point] for taken in rounds])
        speed = median_interval([taken[costliest] / taken[point] for taken in rounds])
        rows.append(
            {
                "point": point,
                "batch": batch,
                "macs": cost,
                "clips_per_s": batch / seconds[0],
                "seconds": list(seconds),
                "speed": list(speed),
                "promised": promised,
                "kept": [value / promised for value in speed],  # the target is `TARGET` or more
            }
        )
    return rows


_COLUMNS = ("point", "batch", "GMACs", "clips/s", "ms (95 %)", "speed (95 %)", "by MACs", "of it (95 %)", "target")


def markdown(result: Mapping[str, Any]) -> str:
    """The rows as a table."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *(_cells(row, result["target"]) for row in result["rows"])]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Mapping[str, Any], target: float) -> tuple[str, ...]:
    return (
        row["point"],
        str(row["batch"]),
        f"{row['macs'] / 1e9:.2f}",
        f"{row['clips_per_s']:.1f}",
        _interval(row["seconds"], 1000, 1),
        _interval(row["speed"], 1, 2),
        f"{row['promised']:.2f}",
        _interval(row["kept"], 1, 2),
        "met" if row["kept"][0] >= target else "missed",
    )


def _interval(values: Sequence[float], unit: float, digits: int) -> str:
    middle, low, high = (f"{value * unit:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def print_bench_points(result: dict[str, Any]) -> None:
    """Where it ran, and the table."""
    print_machine(result)
    print(
        f"{result['config']['run']['precision']}, {result['machine']['threads']} threads, load "
        f"{result['machine']['load']:.1f}, medians of {result['settings']['rounds']} rounds; speed is relative to the "
        f"costliest point, and should be {result['target']:g} of what the MACs promise\n"
    )
    print(markdown(result))
