"""`flops`: the cost of every point without data, and after an evaluation the cost of every clip and video."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.cost import point_cost, point_macs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest
from videoadapt.routing.assigner import assigner_macs
from videoadapt.runtime.console import say
from videoadapt.runtime.files import write_csv, write_json


def flops(config: Config) -> dict[str, Any]:
    """MACs per part, view and video of every point, from the architecture alone.

    Where the run has been evaluated, also the clip-level report under `report/`: the cost of each clip and video with
    its point, their distribution, and the mix of points, overall and per class; and every policy's cost and accuracy,
    with those on the Pareto front marked.
    """
    views = config.evaluate.temporal_views * config.evaluate.spatial_crops
    points, per_view = [], point_macs(config.model)
    for point, total in per_view.items():
        parts = asdict(point_cost(config.model, point))
        points.append({"point": point, "macs_per_view": total, "macs_per_video": views * total, "parts": parts})
    several = len(points) > 1
    summary: dict[str, Any] = {
        "points": points,
        "views_per_video": views,
        "assigner_macs": assigner_macs(config.assign, len(points)) if several else None,
    }
    evaluated = config.run.dir / "evaluate" / "evaluate.json"
    found = json.loads(evaluated.read_text(encoding="utf-8")) if evaluated.exists() else None
    if found is not None and found["macs_per_view"] != per_view:
        say(
            f"{evaluated}: was made at other points, or with another model; the costs of its clips are left out. Run "
            "`evaluate` again"
        )
    elif found is not None:
        summary["clips"] = clip_report(config, found["policies"])
        summary["policies"] = [_policy_row(name, row) for name, row in found["policies"].items()]
    write_json(config.run.dir / "report" / "flops.json", summary)
    return summary


def _policy_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"policy": name, **{key: row[key] for key in ("macs_per_clip", "macs_per_video", "top1", "pareto")}}


def clip_report(config: Config, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The clip-level report of the assigned policy, else of the first cascade, else of the costliest point.

    Writes its files.
    """
    source, folder = config.run.dir / "evaluate", config.run.dir / "report"
    clips, videos = pd.read_parquet(source / "clips.parquet"), pd.read_parquet(source / "videos.parquet")
    # The assigned policy records its difference to random routing, a cascade its thresholds; the first of them counts.
    adaptive = [name for name, row in rows.items() if {"difference_to_random", "thresholds"} & row.keys()]
    policy = next(iter([*adaptive, *rows]))
    clips = clips[clips["policy"] == policy].drop(columns="policy")
    videos = videos[(videos["policy"] == policy) & ~videos["failed"]].drop(columns="policy")
    names = Manifest.load(config.run.dir / "manifest.parquet").classes
    classes = class_mix(clips, config.model.points, names)
    for name, table in (("clips", clips), ("videos", videos), ("classes", classes)):
        write_csv(folder / f"{name}.csv", table)
    return {
        "policy": policy,
        "macs_per_clip": distribution(clips["macs"]),
        "macs_per_video": distribution(videos["macs"]),
        "mix": {point: float((clips["point"] == point).mean()) for point in config.model.points},
        "classes": classes.to_dict("records"),
        "files": [str(folder / name) for name in ("clips.csv", "videos.csv", "classes.csv")],
    }


def class_mix(clips: pd.DataFrame, points: tuple[str, ...], names: tuple[str, ...]) -> pd.DataFrame:
    """Per class: clips, mean MACs of a clip, and the share of clips at each point."""
    rows = []
    for label, group in clips.groupby("truth"):
        shares = {point: float((group["point"] == point).mean()) for point in points}
        row = {"class": names[label], "clips": len(group), "macs_per_clip": float(group["macs"].mean())}
        rows.append(row | shares)
    return pd.DataFrame(rows)


def distribution(values: pd.Series) -> dict[str, float]:
    """Mean, median and 95th percentile."""
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "p95": float(np.quantile(values, 0.95)),
    }
