"""`flops`: the cost of every point without data, and after an evaluation the cost of every clip and video."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.cost import point_cost, point_macs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest
from videoadapt.routing.assigner import assigner_macs
from videoadapt.runtime.console import say
from videoadapt.runtime.files import write_csv, write_json


@dataclass(frozen=True)
class PointRow:
    """MACs of one point. The names are keys of `flops.json`."""

    point: str
    macs_per_view: int
    macs_per_video: int
    parts: dict[str, int]  # MACs of a view, by part of the model


@dataclass(frozen=True)
class PolicyCost:
    """Mean cost and accuracy of one evaluated policy. The names are keys of `flops.json`."""

    policy: str
    macs_per_clip: float
    macs_per_video: float
    top1: float
    pareto: bool


@dataclass(frozen=True)
class Distribution:
    """Mean, median and 95th percentile of some values."""

    mean: float
    median: float
    p95: float


@dataclass(frozen=True)
class ClipReport:
    """Measured costs of the clips of one policy. The names are keys of `flops.json`."""

    policy: str
    macs_per_clip: Distribution
    macs_per_video: Distribution
    mix: dict[str, float]  # fraction of the clips at each point
    classes: list[dict[str, object]]  # the rows of `class_mix`
    files: list[str]


def flops(config: Config) -> dict[str, Any]:
    """Computes MACs per part, view and video of every point, from the architecture alone.

    If the run has been evaluated, adds the clip-level report (see `clip_report`), and the cost and accuracy of every
    policy. An evaluation at other points is left out with a message. Writes `report/flops.json` in the run folder.

    Args:
        config: The run's config.

    Returns:
        The contents of `flops.json`.
    """
    views = config.evaluate.temporal_views * config.evaluate.spatial_crops
    per_view = point_macs(config.model)
    rows = [
        PointRow(point, total, views * total, asdict(point_cost(config.model, point)))
        for point, total in per_view.items()
    ]
    summary: dict[str, Any] = {
        "points": [asdict(row) for row in rows],
        "views_per_video": views,
        # A model of one point leaves nothing to assign.
        "assigner_macs": assigner_macs(config.assign, len(rows)) if len(rows) > 1 else None,
    }
    evaluated = config.run.dir / "evaluate" / "evaluate.json"
    found = json.loads(evaluated.read_text(encoding="utf-8")) if evaluated.exists() else None
    if found is not None and found["macs_per_view"] != per_view:
        say(
            f"{evaluated}: was made with other points or another model, so the costs of its clips are left out; run "
            "`evaluate` again"
        )
    elif found is not None:
        policies = found["policies"]
        summary["clips"] = asdict(clip_report(config, policies))
        summary["policies"] = [
            asdict(PolicyCost(name, row["macs_per_clip"], row["macs_per_video"], row["top1"], row["pareto"]))
            for name, row in policies.items()
        ]
    write_json(config.run.dir / "report" / "flops.json", summary)
    return summary


def clip_report(config: Config, policies: Mapping[str, Mapping[str, object]]) -> ClipReport:
    """Writes the clip-level report: `clips.csv`, `videos.csv` and `classes.csv` under `report/`.

    The report is about the assigned policy; without one, about the first cascade; without both, about the costliest
    point.

    Args:
        config: The config of an evaluated run.
        policies: The rows of its `evaluate.json`, by policy name.
    """
    source, folder = config.run.dir / "evaluate", config.run.dir / "report"
    clips, videos = pd.read_parquet(source / "clips.parquet"), pd.read_parquet(source / "videos.parquet")
    # The assigned policy has a difference to random routing, a cascade records its thresholds.
    adaptive = [name for name, row in policies.items() if {"difference_to_random", "thresholds"} & row.keys()]
    policy = next(iter([*adaptive, *policies]))
    clips = clips[clips["policy"] == policy].drop(columns="policy")
    videos = videos[(videos["policy"] == policy) & ~videos["failed"]].drop(columns="policy")
    # The manifest has the classes' names; the tables have their numbers.
    names = Manifest.load(config.run.dir / "manifest.parquet").classes
    classes = class_mix(clips, config.model.points, names)
    for name, table in (("clips", clips), ("videos", videos), ("classes", classes)):
        write_csv(folder / f"{name}.csv", table)
    return ClipReport(
        policy=policy,
        macs_per_clip=distribution(clips["macs"]),
        macs_per_video=distribution(videos["macs"]),
        mix={point: float((clips["point"] == point).mean()) for point in config.model.points},
        classes=classes.to_dict("records"),
        files=[str(folder / name) for name in ("clips.csv", "videos.csv", "classes.csv")],
    )


def class_mix(clips: pd.DataFrame, points: tuple[str, ...], names: tuple[str, ...]) -> pd.DataFrame:
    """Returns, per class: number of clips, mean MACs of a clip, and the fraction of clips at each point.

    Args:
        clips: The rows of one policy in `clips.parquet`.
        points: The points of the model; each becomes a column.
        names: Names of all classes.
    """
    rows = []
    for label, group in clips.groupby("truth"):  # classes without clips get no row
        mix = {point: float((group["point"] == point).mean()) for point in points}
        row = {"class": names[label], "clips": len(group), "macs_per_clip": float(group["macs"].mean())}
        rows.append(row | mix)
    return pd.DataFrame(rows)


def distribution(values: pd.Series) -> Distribution:
    """Returns mean, median and 95th percentile."""
    return Distribution(float(values.mean()), float(values.median()), float(np.quantile(values, 0.95)))
