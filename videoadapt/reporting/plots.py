"""Figures of a run: the curves of its training, accuracy against cost, and confusions.

Each figure is written twice: `NAME.png` for light pages and `NAME_dark.png` for dark ones. Both have a background of
their own, so that either is readable everywhere.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure  # without pyplot, which keeps every figure and picks a display for the process
from matplotlib.ticker import EngFormatter, MaxNLocator

from videoadapt.evaluation.evaluated import read_evaluation, reported_policy
from videoadapt.routing.candidates import upper_hull
from videoadapt.runtime.files import read_json, replacing
from videoadapt.runtime.run_config import run_name

Box = npt.NDArray[np.float64]  # (2, 2): the lower left corner, and the upper right one

MOST_PAIRS = 25  # bars of confused classes
_PER_INCH = 11  # letters of a title
MATRIX_CLASSES = 30  # with more classes, the cells of a matrix are too small to read
DPI = 110
CURVE_BINS = 20  # points of a training curve
_STEPS_AVERAGED = 50  # of the training curves, at most, in short runs
_VIRIDIS = (0.2, 0.9)  # the part of this colour map that can be told from both backgrounds
_FEW = 8  # policies whose names stand at their marks
_MARK = 7.0  # half of a mark's size, in points
_NAME_HEIGHT = 0.045  # of the axes: the distance of two names beside them
_NAME_LENGTH = 32  # characters of a class name on an axis
_BACKGROUND, _TEXT, _LINE = "#15181d", "#e4e7eb", "#8b949e"
_DARK: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), _BACKGROUND),
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), _TEXT
    ),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color", "legend.edgecolor"), _LINE),
}
# Marker and colour by the kind of policy. The colours have a contrast of 3 or more on both backgrounds.
_KINDS = {
    "fixed": ("o", "#3f8fd2"),
    "cascade": ("s", "#c9781f"),
    "leap": ("P", "#1a8f9c"),
    "assigned": ("D", "#dc4a4a"),
    "random": ("X", "#868e96"),
    "oracle": ("^", "#3c9a5f"),
}
_FIXED = _KINDS["fixed"]
_OTHER_KIND = ("v", "#9a6fd0")


def draw_evaluation(run: Path) -> list[Path]:
    """Draws accuracy against cost, and the confusions, of an evaluated run.

    Args:
        run: The run folder, with the files of `evaluate`.

    Returns:
        The PNG files written, in `evaluate/` of the run folder.
    """
    folder = run / "evaluate"
    evaluated = read_evaluation(run, ["listed"])
    policies, title = evaluated["policies"], heading(run, evaluated)
    policy = reported_policy(policies)
    confusion = pd.read_csv(folder / "confusion.csv", dtype={"truth": str, "prediction": str}, keep_default_na=False)
    confusion = confusion[confusion["policy"] == policy]
    return [
        *save_figure(folder / "accuracy_cost.png", lambda: plot_accuracy_cost(policies, title)),
        *save_figure(folder / "confusion.png", lambda: plot_confusion(confusion, f"{title}; policy {policy}")),
    ]


def heading(run: Path, evaluated: Mapping[str, Any]) -> str:
    """Returns the title of a figure: run, split, number of videos and date, as far as `evaluate.json` has them."""
    split = f"split {evaluated.get('split', 'val')}"
    count = f"{evaluated['listed']} {evaluated.get('kind', 'videos')}" if "listed" in evaluated else ""
    return ", ".join(filter(None, [run_name(run), split, count, evaluated.get("date", "")]))


def plot_accuracy_cost(policies: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Plots accuracy against cost, one mark per policy.

    Args:
        policies: For each policy's name: `macs_per_clip`, `top1` with its 95 % interval `top1_low` and `top1_high`
            (between 0 and 1), and `pareto`: whether no other policy is both cheaper and more accurate.
        title: The title of the figure.

    Returns:
        Top-1 in percent, with its interval, against the mean MACs of a clip. A line joins the Pareto front, a dashed
        one the best random mixtures of two fixed points.
    """
    figure = Figure(figsize=(8.5, max(4.8, 2 + 0.21 * len(policies))), layout="constrained")
    axes = figure.subplots()
    front = sorted((row["macs_per_clip"], 100 * row["top1"]) for row in policies.values() if row["pareto"])
    axes.plot(*zip(*front, strict=True), color=_LINE, zorder=1, label="Pareto front")
    fixed = {n: (row["macs_per_clip"], 100 * row["top1"]) for n, row in policies.items() if _kind(n) == _FIXED}
    mixed = [fixed[name] for name in upper_hull(fixed)]
    axes.plot(*zip(*mixed, strict=True), "--", color=_FIXED[1], lw=1, zorder=1, label="mixtures of fixed points")
    for name, row in policies.items():
        marker, colour = _kind(name)
        below, above = 100 * (row["top1"] - row["top1_low"]), 100 * (row["top1_high"] - row["top1"])
        axes.errorbar(
            row["macs_per_clip"],
            100 * row["top1"],
            [[below], [above]],
            fmt=marker,
            color=colour,
            markersize=7,
            capsize=3,
            elinewidth=1,
            label=name,
        )
    axes.set(title=title, xlabel="mean MACs of a clip (all crops, assigner included)", ylabel="top-1 %, 95 % interval")
    axes.title.set_fontsize(11)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.margins(x=0.15, y=0.12)  # room for a name at either side of a mark
    axes.grid(alpha=0.3)
    if len(policies) <= _FEW:
        axes.legend(handles=axes.lines[:2], loc="best", fontsize=8, frameon=False)
        _name_marks(figure, axes, policies)
    else:
        axes.legend(handles=axes.lines[:2], loc="lower left", bbox_to_anchor=(1.03, -0.16), fontsize=8, frameon=False)
        _label_marks(axes, policies)
    return figure


def _name_marks(figure: Figure, axes: Axes, policies: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the names of a few policies at their marks, each at the corner where it covers least."""
    low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
    figure.draw_without_rendering()  # the layout gives the axes their size
    size = np.array(axes.bbox.size) * 72 / figure.dpi  # in points

    def place(row: Mapping[str, Any], key: str) -> Box:
        return (np.array([row["macs_per_clip"], 100 * row[key]]) - low) / (high - low) * size

    marks = {name: place(row, "top1") for name, row in policies.items()}
    taken = [np.array([mark - _MARK, mark + _MARK]) for mark in marks.values()]
    taken += [np.array([place(row, "top1_low") - 1, place(row, "top1_high") + 1]) for row in policies.values()]
    for name, mark in marks.items():
        extent = np.array([0.6 * 8 * len(_label(name)), 10.0])  # of a text of size 8
        boxes = []
        for up, right in itertools.product((8.0, -18.0, 20.0, -30.0), (True, False)):  # the nearest first
            corner = mark + (8.0 if right else -8.0 - extent[0], up)
            boxes.append(np.array([corner, corner + extent]))
        covered = [sum(_overlap(box, other) for other in taken) + _outside(box, size) for box in boxes]
        box = boxes[int(np.argmin(covered))]
        taken.append(box)
        axes.annotate(
            _label(name),
            (policies[name]["macs_per_clip"], 100 * policies[name]["top1"]),
            tuple(box[0] - mark),
            textcoords="offset points",
            fontsize=8,
            color=_kind(name)[1],
        )


def _overlap(a: Box, b: Box) -> float:
    """Returns the area that two boxes share."""
    return float(np.prod(np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None)))


def _outside(box: Box, size: Box) -> float:
    """Returns the area of a box outside the axes."""
    return float(np.prod(box[1] - box[0])) - _overlap(box, np.array([np.zeros(2), size]))


def _label_marks(axes: Axes, policies: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the names of the policies beside the axes, the most accurate at the top, and joins them to their marks.

    Beside the marks, the names of many policies would cover marks and one another.
    """
    low, high = axes.get_ylim()
    order = sorted(policies, key=lambda name: (policies[name]["top1"], policies[name]["macs_per_clip"]))
    places = spread([(100 * policies[name]["top1"] - low) / (high - low) for name in order], _NAME_HEIGHT)
    for name, place in zip(order, places, strict=True):
        axes.annotate(
            _label(name),
            (policies[name]["macs_per_clip"], 100 * policies[name]["top1"]),
            (1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=_kind(name)[1],
            arrowprops={
                **{"arrowstyle": "-", "color": _LINE, "linewidth": 0.5, "alpha": 0.7},
                **{"relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 6},  # from the left end of the name
            },
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves ascending places apart: neighbours are at least `gap` apart, and the last is at most 1.

    Args:
        places: Places between 0 and 1, ascending.
        gap: The smallest distance of two neighbours.

    Returns:
        The new places. Places that are far enough from one another stay, apart from those that made room.
    """
    moved = list(places)
    for number in range(1, len(moved)):
        moved[number] = max(moved[number], moved[number - 1] + gap)
    ceiling = 1.0
    for number in reversed(range(len(moved))):
        moved[number] = ceiling = min(moved[number], ceiling)
        ceiling -= gap
    return moved


def _kind(policy: str) -> tuple[str, str]:
    """Returns the marker and the colour of a policy."""
    return _KINDS.get(policy.partition(":")[0], _OTHER_KIND)


def plot_confusion(confusion: pd.DataFrame, title: str) -> Figure:
    """Plots which classes one policy confuses.

    Args:
        confusion: The rows of one policy in `confusion.csv`.
        title: The title of the figure.

    Returns:
        The matrix of classes, up to `MATRIX_CLASSES` of them. With more, the `MOST_PAIRS` most frequent confusions.
    """
    classes = sorted({*confusion["truth"], *confusion["prediction"]} - {""})
    return _matrix(confusion, classes, title) if len(classes) <= MATRIX_CLASSES else _pairs(confusion, classes, title)


def _matrix(confusion: pd.DataFrame, classes: list[str], title: str) -> Figure:
    # A video with NaN probabilities has no prediction: it is missing in its row, whose sum is then below 100 %.
    matrix = confusion.pivot(index="truth", columns="prediction", values="fraction")
    cells = 100 * matrix.reindex(index=classes, columns=classes).fillna(0.0).to_numpy()  # (truth, prediction)
    side = 2.8 + 0.36 * len(classes)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    # The root spreads the colours of confusions, most of which are below 15 %; a cell without any stays empty.
    scale = PowerNorm(0.5, 0, 100)
    image = axes.imshow(np.ma.masked_equal(cells, 0.0), cmap="viridis", norm=scale)
    figure.colorbar(image, ax=axes, label="% of the row's class", shrink=0.8, ticks=[1, 5, 10, 25, 50, 100])
    counts = confusion.groupby("truth")["videos"].sum().reindex(classes, fill_value=0)
    names = [_label(name) for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8)
    axes.set_yticks(
        range(len(classes)), [f"{name} ({count})" for name, count in zip(names, counts, strict=True)], fontsize=8
    )
    for row, column in np.argwhere(cells >= 0.5):  # noqa: PLR2004 - smaller ones would be shown as 0
        value = cells[row, column]
        colour = "black" if scale(value) > 0.6 else "white"  # noqa: PLR2004 - the colour map ends in yellow
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="prediction", ylabel="true class (how many)")
    figure.suptitle(textwrap.fill(title, round(_PER_INCH * figure.get_figwidth())), fontsize=11)
    return figure


def _pairs(confusion: pd.DataFrame, classes: list[str], title: str) -> Figure:
    wrong = confusion[confusion["truth"] != confusion["prediction"]]
    shown = wrong.sort_values(["videos", "fraction"], ascending=False, kind="stable").head(MOST_PAIRS)
    figure = Figure(figsize=(9.5, 2 + 0.24 * max(len(shown), 4)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    bars = axes.barh(places, shown["videos"], color=_KINDS["fixed"][1])
    axes.bar_label(bars, [f"{100 * fraction:.0f} %" for fraction in shown["fraction"]], padding=3, fontsize=8)
    names = [
        f"{_label(truth)}  →  {_label(answer) if answer else 'NaN'}"
        for truth, answer in zip(shown["truth"], shown["prediction"], strict=True)
    ]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    count = f"{len(shown)} most frequent of {len(wrong)} confusions among {len(classes)} classes"
    axes.set(xlabel="videos, and % of the videos of the class", title=f"class → prediction: the {count}")
    axes.title.set_fontsize(9)
    figure.suptitle(title, fontsize=11)
    return figure


def _label(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"


def draw_curves(run: Path) -> Path:
    """Draws `curves.png` into the folder of a training, from its metrics and validations.

    A training that is not finished, and has no `train.json` yet, needs a validation.
    """
    metrics = pd.read_json(run / "metrics.jsonl", lines=True)
    summary: dict[str, Any] = {}
    if (run / "train.json").exists():
        summary = read_json(run / "train.json", "run `videoadapt train` again", ["points", "steps", "epochs"])
    if summary.get("steps") != metrics["step"].iloc[-1]:  # not finished, or going on after an early stop
        points = [name.removeprefix("loss/") for name in metrics if name.startswith("loss/")]
        summary = {"points": points, "steps": len(metrics), "epochs": 1}
    path, curves = run / "validation.jsonl", run / "curves.png"
    validations = pd.read_json(path, lines=True) if path.exists() and path.stat().st_size else pd.DataFrame()
    per_epoch = summary["steps"] / summary["epochs"]
    if len(validations):  # a run that stopped early has fewer epochs than its config
        per_epoch = validations["step"].iloc[-1] / validations["epoch"].iloc[-1]
    population = f"{summary['clips']} training clips" if "clips" in summary else f"step {metrics['step'].iloc[-1]}"
    title = f"{run_name(run)}, {population}, {datetime.now():%Y-%m-%d}"

    def plot() -> Figure:
        figure = plot_curves(metrics, validations, tuple(summary["points"]), per_epoch, summary.get("best"))
        figure.suptitle(title, fontsize=11)
        return figure

    return save_figure(curves, plot)[0]


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
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = zip(figure.subplots(1, 2), (("loss", 1, "loss"), ("top1", 100, "top-1 %")), strict=True)
    # Single steps have few clips, so their values jump.
    width = max(1, len(metrics) // CURVE_BINS, min(int(per_epoch / 2), _STEPS_AVERAGED))
    # Steps that are left over join the last group: the mean of one step would end the line in a jump.
    groups = ((metrics["step"] - metrics["step"].iloc[0]) // width).clip(upper=max(0, len(metrics) // width - 1))
    binned = metrics.groupby(groups).mean()
    shades = matplotlib.colormaps["viridis"](np.linspace(*_VIRIDIS, len(points)))
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
            axes.plot(
                [best["epoch"]],
                value,
                "o",
                ms=11,
                mfc="none",
                mec=matplotlib.rcParams["text.color"],
                label="best checkpoint",
            )
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    kinds = (
        "dashed: training clips, augmented; their loss includes smoothing, class weights, and distillation at all "
        "points but the costliest:\nnever compare dashed losses of two points, or with full lines"
    )
    if len(validations):
        kinds += f"; full: {validations['read'].iloc[-1]} clips, {validations['videos'].iloc[-1]}"
    # One legend for both panels: the best checkpoint is marked in one of them.
    labelled = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {label: handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)}
    axes.legend(entries.values(), entries, title="point", loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.supxlabel(kinds, fontsize=9)
    return figure


def save_figure(path: Path, plot: Callable[[], Figure]) -> list[Path]:
    """Writes a figure as PNG files, one for light and one for dark pages, each whole or not at all.

    Args:
        path: The file for light pages. `_dark` is added to the name of the other.
        plot: Makes the figure. It is called once for each file, since colours are chosen when a figure is made.

    Returns:
        Both files.
    """
    files = [path, path.with_stem(f"{path.stem}_dark")]
    # matplotlib's own defaults: a `matplotlibrc` of the user would change sizes and colours. `rc_context` does not
    # restore the backend, which is that of the user's notebook.
    light: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    for file, colours in zip(files, (light, light | _DARK), strict=True):
        with matplotlib.rc_context(colours), replacing(file) as temporary:
            plot().savefig(temporary, format="png", dpi=DPI)
    return files
