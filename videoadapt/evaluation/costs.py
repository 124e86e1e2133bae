"""`flops`: the cost of every point without data, and after an evaluation the cost of every clip and video."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.cost import point_cost, point_macs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest
from videoadapt.routing.assigner import assigner_macs
from videoadapt.runtime.console import macs, percent, print_table, say
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
        summary["clips"] = clip_report(config)
        summary["policies"] = [_policy_row(name, row) for name, row in found["policies"].items()]
    write_json(config.run.dir / "report" / "flops.json", summary)
    return summary


def _policy_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"policy": name, **{key: row[key] for key in ("macs_per_clip", "macs_per_video", "top1", "pareto")}}


def clip_report(config: Config) -> dict[str, Any]:
    """The clip-level report of the assigned policy, else of the first cascade, else of the costliest point.

    Writes its files.
    """
    source, folder = config.run.dir / "evaluate", config.run.dir / "report"
    clips, videos = pd.read_parquet(source / "clips.parquet"), pd.read_parquet(source / "videos.parquet")
    policies = clips["policy"].unique().tolist()
    adaptive = [name for name in policies if name == "assigned" or name.startswith("cascade:")]
    policy = (adaptive or policies)[0]
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


def print_flops(summary: dict[str, Any]) -> None:
    """The costs as tables."""
    rows = []
    for point in summary["points"]:
        parts = [macs(v) for v in point["parts"].values()]
        rows.append((point["point"], *parts, macs(point["macs_per_view"]), macs(point["macs_per_video"])))
    columns = ("point", "embedding", "temporal", "spatial", "MLP", "head", "per view", "per video")
    print_table(f"MACs (multiply-adds; the papers' FLOPs), {summary['views_per_video']} views a video", columns, rows)
    if summary["assigner_macs"] is not None:
        share = summary["assigner_macs"] / summary["points"][0]["macs_per_view"]
        say(
            f"assigner: {macs(summary['assigner_macs'])} MACs a clip, "
            f"{100 * share:.2f} % of a view at the costliest point"
        )
    if "clips" in summary:
        _print_clips(summary["clips"])
        rows = [
            (p["policy"], macs(p["macs_per_clip"]), macs(p["macs_per_video"]), percent(p["top1"]), "*" * p["pareto"])
            for p in sorted(summary["policies"], key=lambda p: -p["macs_per_clip"])
        ]
        print_table("Policies, costliest first", ("policy", "MACs/clip", "MACs/video", "top-1 %", "Pareto front"), rows)


def _print_clips(report: dict[str, Any]) -> None:
    rows = [
        (name, *(macs(report[f"macs_per_{name}"][key]) for key in ("mean", "median", "p95")))
        for name in ("clip", "video")
    ]
    print_table(
        f"Measured costs, policy {report['policy']} (MACs, all crops)", ("per", "mean", "median", "95th %"), rows
    )
    points = list(report["mix"])
    overall = ("all", "", "", *(percent(v) for v in report["mix"].values()))
    by_cost = sorted(report["classes"], key=lambda row: -row["macs_per_clip"])
    shown = by_cost if len(by_cost) <= SHOWN else [*by_cost[: SHOWN // 2], *by_cost[-SHOWN // 2 :]]
    lines = [
        (row["class"], row["clips"], macs(row["macs_per_clip"]), *(percent(row[p]) for p in points)) for row in shown
    ]
    title = "Mix of points, % of clips" + (
        "" if len(shown) == len(by_cost) else " (the costliest and cheapest classes)"
    )
    print_table(title, ("class", "clips", "MACs/clip", *points), [overall, *lines])
    say("files: " + ", ".join(str(Path(name)) for name in report["files"]))


SHOWN = 20
