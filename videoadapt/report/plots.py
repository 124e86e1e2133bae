"""Figures of a run: the curves of its training, the cost of clips, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure  # without pyplot, which keeps every figure and picks a display for the process
from matplotlib.ticker import EngFormatter, MaxNLocator

from videoadapt.runtime.console import macs
from videoadapt.runtime.files import read_json, replacing

MOST_CLASSES = 40  # more names than this overlap on the axis
DPI = 110
CURVE_BINS = 20  # points of a training curve
MARKERS = {"assigned": "*", "random": "x", "oracle": "^", "cascade": "s"}  # by the kind of policy; a dot for others


def draw_costs(run: Path, summary: Mapping[str, Any]) -> list[Path]:
    """Draws the clip-level cost report of an evaluated run from its tables.

    Args:
        run: The run folder, with the files of `evaluate` and of `evaluation.costs.flops`.
        summary: The result of `flops` for this run.

    Returns:
        The PNG files written, none where the run has no evaluation at the points of `summary`.
    """
    if "clips" not in summary:
        return []
    report = run / "report"
    clips = pd.read_csv(report / "clips.csv", dtype={"point": str})  # a point such as 14 is a name, not a number
    classes = pd.read_csv(report / "classes.csv", dtype={"class": str})
    evaluated = read_json(run / "evaluate" / "evaluate.json", "run `videoadapt evaluate` first", ["policies"])
    points, policy = tuple(summary["clips"]["mix"]), summary["clips"]["policy"]
    save_figure(report / "clips.png", plot_clip_costs(clips, classes, points, policy))
    save_figure(report / "accuracy_cost.png", plot_accuracy_cost(evaluated["policies"]))
    return [report / "clips.png", report / "accuracy_cost.png"]


def plot_clip_costs(clips: pd.DataFrame, classes: pd.DataFrame, points: tuple[str, ...], policy: str) -> Figure:
    """Plots the points that one policy gave to clips.

    Args:
        clips: A row per clip: `point`, and `macs` of all its crops with the assigner.
        classes: A row per class: `class`, `macs_per_clip`, and per point the fraction of clips that got it.
        points: The points of the model, costliest first.
        policy: The name of the policy.

    Returns:
        On the left how many clips got each point, on the right the mix of points in the `MOST_CLASSES` costliest
        classes.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [i / max(len(points) - 1, 1) for i in range(len(points))]  # 0 for the costliest point, 1 for the cheapest
    colours = dict(zip(points, matplotlib.colormaps["viridis"](steps), strict=True))
    for point in points:
        costs = clips.loc[clips["point"] == point, "macs"]
        if len(costs):
            left.bar(f"{point}\n{macs(costs.mean())}", len(costs), color=colours[point])
    left.axhline(0, color="black", linewidth=0.5)
    left.set(xlabel="point, MACs of a clip (all crops, assigner included)", ylabel="clips", title=f"policy {policy}")
    shown = classes.sort_values("macs_per_clip", ascending=False).head(MOST_CLASSES)
    bottom = pd.Series(0.0, index=shown.index)  # the bars of a class stand on one another, costliest point at the foot
    for point in points:
        right.bar(shown["class"].astype(str), shown[point], bottom=bottom, color=colours[point], label=point)
        bottom += shown[point]
    right.set(xlabel="class, costliest first", ylabel="fraction of clips", ylim=(0, 1), title="mix of points per class")
    right.tick_params(axis="x", labelsize=7, rotation=90)
    right.legend(title="point", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_accuracy_cost(policies: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plots accuracy against cost, one mark per policy.

    Args:
        policies: For each policy's name: `macs_per_clip`, `top1` with its 95 % interval `top1_low` and `top1_high`
            (between 0 and 1), and `pareto`: whether no other policy is both cheaper and more accurate.

    Returns:
        Top-1 in percent, with its interval, against the mean MACs of a clip. A line joins the Pareto front.
    """
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    front = sorted((row["macs_per_clip"], 100 * row["top1"]) for row in policies.values() if row["pareto"])
    axes.plot(*zip(*front, strict=True), color="0.7", zorder=1, label="Pareto front")
    for name, row in policies.items():
        below, above = 100 * (row["top1"] - row["top1_low"]), 100 * (row["top1_high"] - row["top1"])
        marker = MARKERS.get(name.partition(":")[0], "o")
        size = 12 if marker == "*" else 7  # a star looks smaller than a disc of its size
        axes.errorbar(
            row["macs_per_clip"],
            100 * row["top1"],
            [[below], [above]],
            fmt=marker,
            markersize=size,
            capsize=3,
            label=name,
        )
    axes.set(xlabel="mean MACs of a clip (all crops, assigner included)", ylabel="top-1 %, 95 % interval")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as a PNG file, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def draw_curves(run: Path) -> Path:
    """Draws `curves.png` into the folder of a finished training, from its metrics and validations."""
    summary = read_json(run / "train.json", "run `videoadapt train` again", ["points", "steps", "epochs"])
    metrics = pd.read_json(run / "metrics.jsonl", lines=True)
    path, curves = run / "validation.jsonl", run / "curves.png"
    validations = pd.read_json(path, lines=True) if path.exists() and path.stat().st_size else pd.DataFrame()
    per_epoch = summary["steps"] / summary["epochs"]
    if len(validations):  # a run that stopped early has fewer epochs than its config
        per_epoch = validations["step"].iloc[-1] / validations["epoch"].iloc[-1]
    figure = plot_curves(metrics, validations, tuple(summary["points"]), per_epoch, summary.get("best"))
    figure.suptitle(f"run {run.name}, {summary['clips']} training videos, {datetime.now():%Y-%m-%d}", fontsize=10)
    save_figure(curves, figure)
    return curves


def plot_curves(
    metrics: pd.DataFrame,
    validations: pd.DataFrame,
    points: tuple[str, ...],
    per_epoch: float,
    best: Mapping[str, Any] | None = None,
) -> Figure:
    """Plots loss and top-1 of each point while training.

    Args:
        metrics: A row per step: `step`, and `loss/POINT` and `top1/POINT` on the clips of the step.
        validations: A row per validation: `epoch`, `videos`, `read`, and the same columns; may be empty.
        points: The points of the model, costliest first.
        per_epoch: Steps of an epoch.
        best: `metric` and `epoch` of the best checkpoint, which gets a ring.

    Returns:
        Dashed lines for the training clips, full lines for validations. Training sees augmented clips, and the loss of
        its students includes distillation, so that the two kinds of lines differ at the same accuracy.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained", facecolor="white")
    panels = zip(figure.subplots(1, 2), (("loss", 1, "loss"), ("top1", 100, "top-1 %")), strict=True)
    width = max(1, len(metrics) // CURVE_BINS)  # single steps have few clips, so their values jump
    binned = metrics.groupby((metrics["step"] - metrics["step"].iloc[0]) // width).mean()
    shades = matplotlib.colormaps["viridis"]([0.85 * i / max(len(points) - 1, 1) for i in range(len(points))])
    for axes, (name, factor, label) in panels:
        for point, colour in zip(points, shades, strict=True):
            column = f"{name}/{point}"
            if column in binned:  # a point may never have been drawn
                axes.plot(binned["step"] / per_epoch, factor * binned[column], "--", color=colour, lw=1, alpha=0.6)
            if len(validations):
                axes.plot(validations["epoch"], factor * validations[column], "o-", color=colour, ms=3, label=point)
            else:
                axes.plot([], [], "--", color=colour, label=point)
        if best is not None and best["metric"].startswith(f"{name}/"):  # a mean over points has no line
            value = factor * validations.loc[validations["epoch"] == best["epoch"], best["metric"]]
            axes.plot([best["epoch"]], value, "o", ms=11, mfc="none", mec="black", label="best checkpoint")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    kinds = "dashed: training clips"
    if len(validations):
        kinds += f"; full: {validations['read'].iloc[-1]} videos of {validations['videos'].iloc[-1]}"
    axes.legend(title="point", loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.supxlabel(kinds, fontsize=9)
    return figure
