"""The figures show the numbers of their tables."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Text
from PIL import Image

from videoadapt.reporting.plots import (
    DPI,
    MOST_PAIRS,
    draw_evaluation,
    heading,
    plot_accuracy_cost,
    plot_confusion,
    plot_curves,
    spread,
)


def policy(macs: float, top1: float, *, pareto: bool) -> dict[str, Any]:
    return {"macs_per_clip": macs, "top1": top1, "top1_low": top1 - 0.04, "top1_high": top1 + 0.03, "pareto": pareto}


POLICIES = {  # not in the order of their costs
    "fixed:14": policy(10e9, 0.80, pareto=True),
    "fixed:7": policy(2e9, 0.60, pareto=True),
    "random": policy(4e9, 0.65, pareto=False),
    "assigned": policy(4e9, 0.75, pareto=True),
}


def legend(axes: Axes) -> list[str]:
    shown = axes.get_legend()
    assert shown is not None
    return [text.get_text() for text in shown.get_texts()]


TITLE = "demo, split val, 70 videos, 2026-11-27"


def test_each_policy_is_marked_with_its_interval() -> None:
    (axes,) = plot_accuracy_cost(POLICIES, TITLE).axes
    assert axes.get_title() == TITLE
    marks = {str(c.get_label()): c for c in axes.containers if isinstance(c, ErrorbarContainer)}
    assert list(marks) == list(POLICIES)
    for name, row in POLICIES.items():
        line, _, (interval,) = marks[name].lines
        assert line is not None
        assert np.array(line.get_data()).ravel() == pytest.approx([row["macs_per_clip"], 100 * row["top1"]])
        (low, high) = interval.get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((100 * row["top1_low"], 100 * row["top1_high"]))
    assert legend(axes) == ["Pareto front", "mixtures of fixed points"]
    assert {text.get_text() for text in axes.texts} == set(POLICIES)


def test_each_mark_of_the_demo_is_the_nearest_to_its_own_name_and_names_cover_nothing() -> None:
    demo = {  # MACs in millions, top-1 and its interval in percent
        "fixed:8": (43.6, 99.5, 98.8, 99.8),
        "fixed:8@0.5": (29.3, 99.4, 98.7, 99.7),
        "fixed:4": (10.3, 64.6, 61.6, 67.5),
        "fixed:4@0.5": (7.3, 64.5, 61.5, 67.4),
        "assigned": (19.2, 99.5, 98.8, 99.8),
        "random": (18.4, 80.9, 78.3, 83.2),
        "oracle": (15.0, 99.7, 99.1, 99.9),
    }
    policies = {
        name: {"macs_per_clip": m * 1e6, "top1": t / 100, "top1_low": a / 100, "top1_high": b / 100, "pareto": True}
        for name, (m, t, a, b) in demo.items()
    }
    figure = plot_accuracy_cost(policies, TITLE)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    marks = {name: axes.transData.transform((m * 1e6, t)) for name, (m, t, *_) in demo.items()}
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert boxes.keys() == demo.keys()
    for name, box in boxes.items():
        away = {other: np.hypot(*(mark - np.clip(mark, box.min, box.max))) for other, mark in marks.items()}
        assert min(away, key=lambda other: away[other]) == name and away[name] > 5  # noqa: PLR2004 - pixels
        assert not any(box.overlaps(other) for text, other in boxes.items() if text != name)


def test_the_names_of_many_policies_cover_neither_marks_nor_one_another() -> None:
    rng = np.random.default_rng(0)
    many = {f"cascade:{n}@0.5,14@0.7:cost=0.4": policy(n * 1e9, rng.uniform(0.6, 0.8), pareto=n < 9) for n in range(20)}
    figure = plot_accuracy_cost(many, TITLE)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # of the text alone, without its line
    assert all(box.x0 > axes.bbox.x1 and box.x1 <= figure.bbox.x1 and box.y1 <= axes.bbox.y1 + 9 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@given(st.lists(st.floats(0, 1), max_size=20).map(sorted))
def test_places_are_spread(places: list[float]) -> None:
    moved = spread(places, 0.045)
    assert all(after - before >= 0.045 - 1e-9 for before, after in itertools.pairwise(moved))
    assert max(moved, default=0) <= 1 and min(moved, default=0) >= 0
    if all(after - before >= 0.045 for before, after in itertools.pairwise(places)):
        assert moved == places


@pytest.mark.parametrize("classes", ["ab", "abcdefghijkl"])
def test_the_title_of_a_matrix_is_in_the_picture(classes: str) -> None:
    rows = [(name, name, 5, 1.0) for name in classes]
    title = "a run of some name, split val, 60 videos, 2026-11-28; policy cascade:4@0.5,7:0.9"
    figure = plot_confusion(pd.DataFrame(rows, columns=["truth", "prediction", "videos", "fraction"]), title)
    figure.canvas.draw()
    (heading,) = [text for text in figure.texts if "split val" in text.get_text().replace("\n", " ")]
    box, page = heading.get_window_extent(), figure.bbox
    assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y1 <= page.y1


def test_confusions_of_few_classes_are_a_matrix_and_of_many_a_list() -> None:
    rows = [("a", "a", 3, 0.75), ("a", "b", 1, 0.25), ("b", "b", 4, 0.8), ("b", "", 1, 0.2)]  # "": NaN
    confusion = pd.DataFrame(rows, columns=["truth", "prediction", "videos", "fraction"])
    axes, _ = plot_confusion(confusion, TITLE).axes
    assert axes.images[0].get_array().tolist() == [[75, 25], [None, 80]]  # type: ignore[union-attr]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (4)", "b (5)"]
    assert [t.get_text() for t in axes.texts] == ["75", "25", "80"]
    classes = [f"class number {n} with a long name of its own" for n in range(400)]
    wrong = [(name, classes[n - 1], n % 50, 0.02 * (n % 50)) for n, name in enumerate(classes) if n % 50]
    (axes,) = plot_confusion(pd.DataFrame(wrong, columns=confusion.columns), TITLE).axes
    assert len(axes.patches) == MOST_PAIRS
    assert (
        axes.get_yticklabels()[0].get_text() == "class number 49 with a long nam…  →  class number 48 with a long nam…"
    )
    assert axes.patches[0].get_width() == 49  # type: ignore[attr-defined]  # noqa: PLR2004


def test_the_line_joins_the_pareto_front_in_the_order_of_cost() -> None:
    (axes,) = plot_accuracy_cost(POLICIES, TITLE).axes
    front = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert np.array(front.get_data()).T == pytest.approx(np.array([[2e9, 60], [4e9, 75], [10e9, 80]]))


def test_without_a_pareto_front_policies_are_still_marked() -> None:
    (axes,) = plot_accuracy_cost({"random": policy(4e9, 0.65, pareto=False)}, TITLE).axes
    assert [text.get_text() for text in axes.texts] == ["random"]


def test_each_figure_is_written_for_light_and_for_dark_pages(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    evaluated = {"policies": POLICIES, "listed": 70, "split": "val", "date": "2026-11-27"}
    (tmp_path / "evaluate" / "evaluate.json").write_text(json.dumps(evaluated))
    rows = [(name, "a", "a", 3, 1.0) for name in POLICIES]
    table = pd.DataFrame(rows, columns=["policy", "truth", "prediction", "videos", "fraction"])
    table.to_csv(tmp_path / "evaluate" / "confusion.csv", index=False)
    files = draw_evaluation(tmp_path)
    names = [f"{name}{dark}.png" for name in ("accuracy_cost", "confusion") for dark in ("", "_dark")]
    assert [file.name for file in files] == names
    for light, dark in zip(files[::2], files[1::2], strict=True):
        with Image.open(light) as a, Image.open(dark) as b:
            assert a.size == b.size and min(a.size) > 2 * DPI
            assert a.convert("L").getpixel((0, 0)) == 255 and b.convert("L").getpixel((0, 0)) < 40  # type: ignore[operator]  # noqa: PLR2004
    assert heading(tmp_path / "demo", evaluated) == TITLE
    assert heading(tmp_path / "demo" / "run", evaluated | {"kind": "images"}) == TITLE.replace("videos", "images")


@pytest.mark.parametrize("validated", [True, False])
def test_curves_show_each_point_by_epoch_and_ring_the_best(validated: bool) -> None:
    steps = pd.DataFrame({"step": range(1, 101), "loss/14": 2.0, "top1/14": 0.25, "loss/7": 1.0, "top1/7": 0.5})
    made = {"epoch": [1, 2], "videos": "val", "read": 9}
    values = {"loss/14": [3.0, 2.0], "top1/14": [0.7, 0.8], "loss/7": [4.0, 5.0], "top1/7": [0.6, 0.5]}
    validations = pd.DataFrame(made | values) if validated else pd.DataFrame()
    best = {"metric": "top1/7", "epoch": 1} if validated else None
    loss, top1 = plot_curves(steps, validations, ("14", "7"), 50, best).axes
    dashed = [line for line in top1.lines if line.get_linestyle() == "--" and len(line.get_xdata())]  # type: ignore[arg-type]
    assert [(line.get_ydata()[0], line.get_xdata()[-1] > 1.7) for line in dashed] == [(25.0, True), (50.0, True)]  # type: ignore[index, operator]
    full = [list(line.get_ydata()) for line in top1.lines if line.get_linestyle() == "-"]  # type: ignore[arg-type]
    assert full == ([[70.0, 80.0], [60.0, 50.0]] if validated else [])
    rings = [line.get_xydata().tolist() for line in top1.lines if line.get_label() == "best checkpoint"]  # type: ignore[union-attr]
    assert rings == ([[[1.0, 60.0]]] if validated else [])
    assert not any(line.get_label() == "best checkpoint" for line in loss.lines)
