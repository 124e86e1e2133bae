"""The figures show the numbers of their tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from PIL import Image

from videoadapt.report.plots import (
    DPI,
    MOST_CLASSES,
    draw_costs,
    plot_accuracy_cost,
    plot_clip_costs,
    plot_curves,
    save_figure,
)

POINTS = ("14", "10", "7")
CLIPS = pd.DataFrame({"point": ["7"] * 5 + ["14"] * 2, "macs": [2e9] * 5 + [9.8e9, 10.2e9]})
CLASSES = pd.DataFrame(
    {
        "class": ["bowling", "archery", "juggling"],
        "macs_per_clip": [3e9, 8e9, 5e9],
        "14": [0.0, 0.75, 0.25],
        "10": [0.0, 0.0, 0.0],
        "7": [1.0, 0.25, 0.75],
    }
)


def policy(macs: float, top1: float, *, pareto: bool) -> dict[str, Any]:
    return {"macs_per_clip": macs, "top1": top1, "top1_low": top1 - 0.04, "top1_high": top1 + 0.03, "pareto": pareto}


POLICIES = {  # not in the order of their costs
    "fixed:14": policy(10e9, 0.80, pareto=True),
    "fixed:7": policy(2e9, 0.60, pareto=True),
    "random": policy(4e9, 0.65, pareto=False),
    "assigned": policy(4e9, 0.75, pareto=True),
}


def bars(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Height and foot of each bar, from left to right, by colour."""
    found: dict[str, list[tuple[float, float]]] = {}
    for patch in axes.patches:
        found.setdefault(to_hex(patch.get_facecolor()), []).append((patch.get_height(), patch.get_y()))  # type: ignore[attr-defined]
    return found


def tick_labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def legend(axes: Axes) -> list[str]:
    shown = axes.get_legend()
    assert shown is not None
    return [text.get_text() for text in shown.get_texts()]


def test_a_bar_counts_the_clips_of_each_point_that_was_used() -> None:
    left, _ = plot_clip_costs(CLIPS, CLASSES, POINTS, "assigned").axes
    assert [height for ((height, _),) in bars(left).values()] == [2, 5]
    assert tick_labels(left) == ["14\n10 G", "7\n2 G"]
    assert left.get_title() == "policy assigned"


def test_the_mix_of_a_class_stacks_its_points_costliest_class_first() -> None:
    left, right = plot_clip_costs(CLIPS, CLASSES, POINTS, "assigned").axes
    assert tick_labels(right) == ["archery", "juggling", "bowling"]
    by_point = dict(zip(POINTS, bars(right).values(), strict=True))
    assert by_point["14"] == [(0.75, 0), (0.25, 0), (0, 0)]
    assert by_point["10"] == [(0, 0.75), (0, 0.25), (0, 0)]
    assert by_point["7"] == [(0.25, 0.75), (0.75, 0.25), (1, 0)]
    assert legend(right) == list(POINTS)
    colours = list(bars(right))  # a point has the same colour on both sides
    assert list(bars(left)) == [colours[0], colours[2]]


def test_of_many_classes_the_costliest_are_shown() -> None:
    count = MOST_CLASSES + 5
    classes = pd.DataFrame({"class": range(count), "macs_per_clip": np.arange(count) * 1e9, "14": 0.5, "7": 0.5})
    _, right = plot_clip_costs(CLIPS, classes, ("14", "7"), "assigned").axes
    assert tick_labels(right) == [str(number) for number in range(count - 1, 4, -1)]


def test_each_policy_is_marked_with_its_interval() -> None:
    (axes,) = plot_accuracy_cost(POLICIES).axes
    marks = {str(c.get_label()): c for c in axes.containers if isinstance(c, ErrorbarContainer)}
    assert list(marks) == list(POLICIES)
    for name, row in POLICIES.items():
        line, _, (interval,) = marks[name].lines
        assert line is not None
        assert np.array(line.get_data()).ravel() == pytest.approx([row["macs_per_clip"], 100 * row["top1"]])
        (low, high) = interval.get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((100 * row["top1_low"], 100 * row["top1_high"]))
    assert {"Pareto front", *POLICIES} == set(legend(axes))


def test_the_line_joins_the_pareto_front_in_the_order_of_cost() -> None:
    (axes,) = plot_accuracy_cost(POLICIES).axes
    front = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert np.array(front.get_data()).T == pytest.approx(np.array([[2e9, 60], [4e9, 75], [10e9, 80]]))


def test_without_a_pareto_front_policies_are_still_marked() -> None:
    (axes,) = plot_accuracy_cost({"random": policy(4e9, 0.65, pareto=False)}).axes
    assert legend(axes) == ["random"]


def test_a_run_gets_both_figures_of_full_size(tmp_path: Path) -> None:
    for name, table in (("clips", CLIPS), ("classes", CLASSES)):
        (tmp_path / "report").mkdir(exist_ok=True)
        table.to_csv(tmp_path / "report" / f"{name}.csv", index=False)
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "evaluate.json").write_text(json.dumps({"policies": POLICIES}))
    summary = {"clips": {"mix": {"14": 2 / 7, "10": 0.0, "7": 5 / 7}, "policy": "assigned"}}
    clips, accuracy = draw_costs(tmp_path, summary)
    assert (clips, accuracy) == (tmp_path / "report" / "clips.png", tmp_path / "report" / "accuracy_cost.png")
    save_figure(tmp_path / "clips.png", plot_clip_costs(CLIPS, CLASSES, POINTS, "assigned"))
    save_figure(tmp_path / "accuracy_cost.png", plot_accuracy_cost(POLICIES))
    for path, inches in ((clips, (11, 4.5)), (accuracy, (8.5, 4.8))):
        with Image.open(path) as image, Image.open(tmp_path / path.name) as expected:
            assert image.size == tuple(int(DPI * side) for side in inches)
            assert np.array_equal(np.asarray(image), np.asarray(expected))  # the same tables


def test_a_run_without_an_evaluation_gets_no_figures(tmp_path: Path) -> None:
    assert draw_costs(tmp_path, {"points": []}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("validated", [True, False])
def test_curves_show_each_point_by_epoch_and_ring_the_best(validated: bool) -> None:
    steps = pd.DataFrame({"step": range(1, 101), "loss/14": 2.0, "top1/14": 0.25, "loss/7": 1.0, "top1/7": 0.5})
    made = {"epoch": [1, 2], "videos": "val", "read": 9}
    values = {"loss/14": [3.0, 2.0], "top1/14": [0.7, 0.8], "loss/7": [4.0, 5.0], "top1/7": [0.6, 0.5]}
    validations = pd.DataFrame(made | values) if validated else pd.DataFrame()
    best = {"metric": "top1/7", "epoch": 1} if validated else None
    loss, top1 = plot_curves(steps, validations, ("14", "7"), 50, best).axes
    dashed = [line for line in top1.lines if line.get_linestyle() == "--" and len(line.get_xdata())]  # type: ignore[arg-type]
    assert [(line.get_ydata()[0], line.get_xdata()[-1] > 1.9) for line in dashed] == [(25.0, True), (50.0, True)]  # type: ignore[index, operator]
    full = [list(line.get_ydata()) for line in top1.lines if line.get_linestyle() == "-"]  # type: ignore[arg-type]
    assert full == ([[70.0, 80.0], [60.0, 50.0]] if validated else [])
    rings = [line.get_xydata().tolist() for line in top1.lines if line.get_label() == "best checkpoint"]  # type: ignore[union-attr]
    assert rings == ([[[1.0, 60.0]]] if validated else [])
    assert not any(line.get_label() == "best checkpoint" for line in loss.lines)
