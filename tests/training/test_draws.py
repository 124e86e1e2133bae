"""Draws of points: the four of SuperViT, equally likely, the same on every rank."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videoadapt.config.load import Config, make_config
from videoadapt.config.points import Point
from videoadapt.training.draws import drawn_points, point_probabilities, possible_draws, teacher_of

POINTS = ("14", "12", "14@0.7", "14@0.5", "12@0.7", "12@0.5", "10", "10@0.7")
grids = st.lists(st.tuples(st.integers(4, 9), st.sampled_from([0.3, 0.5, 0.7])), min_size=1, max_size=8, unique=True)


def config(draw: str, seed: int = 0) -> Config:
    return make_config({"model": {"points": list(POINTS)}, "train": {"draw": draw}, "run": {"seed": seed}})


def test_all_draws_all() -> None:
    assert possible_draws(POINTS, "all") == {POINTS: 1.0}
    assert drawn_points(config("all"), 3) == config("all").model.points


@given(grids, st.sets(st.integers(4, 9), max_size=2))
def test_a_sample_has_two_lengths_each_with_all_tokens_and_at_one_lower_keep(
    keeps: list[tuple[int, float]], alone: set[int]
) -> None:
    lengths = {length for length, _ in keeps} | alone
    points = [Point(length) for length in sorted(lengths, reverse=True)] + [Point(n, keep) for n, keep in keeps]
    draws = possible_draws([str(point) for point in points], "sampled")
    assert sum(draws.values()) == pytest.approx(1)
    for draw in draws:
        parsed = [Point.parse(point) for point in draw]
        drawn = [point.length for point in parsed if point.keep == 1]
        assert len(drawn) == min(2, len(lengths))
        assert max(lengths) in drawn
        for length in drawn:
            lower = [keep for n, keep in keeps if n == length]
            assert sum(point.length == length for point in parsed) == 1 + bool(lower)


def test_the_probabilities_are_those_of_the_paper() -> None:
    probabilities = point_probabilities(config("sampled"))
    assert probabilities == pytest.approx(
        {"14": 1, "14@0.7": 1 / 2, "14@0.5": 1 / 2, "12": 1 / 2, "12@0.7": 1 / 4, "12@0.5": 1 / 4}
        | {"10": 1 / 2, "10@0.7": 1 / 2}
    )
    counts = Counter(point for step in range(600) for point in drawn_points(config("sampled"), step))
    for point, probability in probabilities.items():
        assert counts[point] / 600 == pytest.approx(probability, abs=0.05)


def test_a_draw_depends_on_the_seed_and_the_step_only() -> None:
    first = [drawn_points(config("sampled"), step) for step in range(50)]
    assert first == [drawn_points(config("sampled"), step) for step in range(50)]
    assert first != [drawn_points(config("sampled", seed=1), step) for step in range(50)]
    order = config("sampled").model.points
    assert all(list(draw) == sorted(draw, key=order.index) for draw in first)  # costliest first


def test_draws_of_one_length_and_of_points_without_keeps() -> None:
    assert possible_draws(("14", "14@0.7", "14@0.5"), "sampled") == {("14", "14@0.7"): 0.5, ("14", "14@0.5"): 0.5}
    assert possible_draws(("14", "10", "7"), "sampled") == {("14", "10"): 0.5, ("14", "7"): 0.5}
    assert possible_draws(("14",), "sampled") == {("14",): 1.0}


def test_teachers() -> None:
    assert [teacher_of(point, "14") for point in ("14", "14@0.7", "12", "12@0.5")] == [None, "14", "14", "12"]
