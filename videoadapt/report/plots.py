"""Figures: costs of clips, and accuracy against cost. Drawn without a display."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import EngFormatter

from videoadapt.runtime.console import macs
from videoadapt.runtime.files import replacing

MOST_CLASSES = 40


def draw_costs(run: Path, summary: Mapping[str, Any]) -> list[Path]:
    """Draws the clip-level cost report of an evaluated run from its tables.

    Args:
        run: The run folder, with the files of `evaluate` and of `evaluation.costs.flops`.
        summary: What `flops` returned for this run.

    Returns:
        The PNG files written, none where the run has no evaluation at the points of `summary`.
    """
    if "clips" not in summary:
        return []
    report = run / "report"
    clips = pd.read_csv(report / "clips.csv", dtype={"point": str})
    classes = pd.read_csv(report / "classes.csv", dtype={"class": str})
    evaluated = json.loads((run / "evaluate" / "evaluate.json").read_text(encoding="utf-8"))
    drawn = [report / "clips.png", report / "accuracy_cost.png"]
    points, policy = tuple(summary["clips"]["mix"]), summary["clips"]["policy"]
    draw_clip_costs(drawn[0], clips, classes, points, policy)
    draw_accuracy_cost(drawn[1], evaluated["policies"])
    return drawn


def draw_clip_costs(
    path: Path, clips: pd.DataFrame, classes: pd.DataFrame, points: tuple[str, ...], policy: str
) -> None:
    """Left: how many clips cost how much. Right: the mix of points per class, dearest classes first."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    colours = dict(
        zip(points, plt.get_cmap("viridis")([i / max(len(points) - 1, 1) for i in range(len(points))]), strict=True)
    )
    for point in points:
        costs = clips.loc[clips["point"] == point, "macs"]
        if len(costs):
            left.bar(f"{point}\n{macs(costs.mean())}", len(costs), color=colours[point])
    left.axhline(0, color="black", linewidth=0.5)
    left.set(xlabel="point, MACs of a clip (all crops, assigner included)", ylabel="clips", title=f"policy {policy}")
    shown = classes.sort_values("macs_per_clip", ascending=False).head(MOST_CLASSES)
    bottom = pd.Series(0.0, index=shown.index)
    for point in points:
        right.bar(shown["class"].astype(str), shown[point], bottom=bottom, color=colours[point], label=point)
        bottom += shown[point]
    right.set(xlabel="class, costliest first", ylabel="share of clips", ylim=(0, 1), title="mix of points per class")
    right.tick_params(axis="x", labelsize=7, rotation=90)
    right.legend(title="point", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def draw_accuracy_cost(path: Path, policies: Mapping[str, Mapping[str, Any]]) -> None:
    """Top-1 with its 95 % interval against mean MACs of a clip, one mark per policy; the Pareto front joined."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    front = sorted((p["macs_per_clip"], 100 * p["top1"]) for p in policies.values() if p["pareto"])
    axes.plot(*zip(*front, strict=True), color="0.7", zorder=1, label="Pareto front")
    for name, p in policies.items():
        below, above = 100 * (p["top1"] - p["top1_low"]), 100 * (p["top1_high"] - p["top1"])
        marker = {"assigned": "*", "random": "x", "oracle": "^", "cascade": "s"}.get(name.partition(":")[0], "o")
        x, y = p["macs_per_clip"], 100 * p["top1"]
        axes.errorbar(
            x, y, [[below], [above]], fmt=marker, markersize=12 if marker == "*" else 7, capsize=3, label=name
        )
    axes.set(xlabel="mean MACs of a clip (all crops, assigner included)", ylabel="top-1 %, 95 % interval")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
