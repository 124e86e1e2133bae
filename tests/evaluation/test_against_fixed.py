"""A policy is worth its cost only above the line between the fixed points, and an equally good fixed point is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from videoadapt.evaluation.against_fixed import (
    Measured,
    against_fixed,
    favoured_policy,
    proven_policy,
    sufficient_fixed,
)
from videoadapt.evaluation.intervals import paired_difference


def measured(name: str, macs: float, *blocks: tuple[int, bool]) -> Measured:
    """A policy that is right or wrong on blocks of videos."""
    return Measured(name, macs, np.repeat([right for _, right in blocks], [videos for videos, _ in blocks]))


LONG = measured("fixed:14", 100.0, (800, True), (200, False))
MIDDLE = measured("fixed:10", 50.0, (600, True), (400, False))  # below the line: its cost buys nothing
SHORT = measured("fixed:7", 20.0, (600, True), (400, False))


def test_the_mixture_is_the_most_accurate_one_of_the_same_cost() -> None:
    found = against_fixed(measured("assigned", 60.0, (750, True), (250, False)), [LONG, MIDDLE, SHORT])
    assert found and found.mixture == pytest.approx({"fixed:14": 0.5, "fixed:7": 0.5})
    difference, low, high = found.difference_to_mixture
    assert difference == pytest.approx(0.75 - (0.8 + 0.6) / 2)
    # By hand: on 600 videos no gain, on 150 one of 1/2, on 50 of -1/2.
    error = np.sqrt((150 * 0.25 + 50 * 0.25) / 1000 - 0.05**2) / np.sqrt(1000)
    assert (low, high) == pytest.approx((0.05 - 1.96 * error, 0.05 + 1.96 * error), abs=0.002)
    assert found.cheaper_fixed is None  # both cheaper points are significantly worse


def test_a_cheaper_point_that_is_as_good_is_named() -> None:
    policy = measured("assigned", 60.0, (590, True), (395, False), (15, True))
    found = against_fixed(policy, [LONG, MIDDLE, SHORT])
    assert found and found.cheaper_fixed == "fixed:7"  # as right as 10, and cheaper
    assert found.difference_to_cheaper_fixed == paired_difference(policy.right, SHORT.right)


FIXED = {"fixed:14": {"macs_per_video": 100.0}, "fixed:7": {"macs_per_video": 20.0}}


def row(**changes: Any) -> dict[str, Any]:
    """The row of a policy that an evaluation favours over the fixed points."""
    favourable = {"mixture": {"fixed:14": 0.4, "fixed:7": 0.6}, "difference_to_mixture": (0.1, 0.05, 0.15)}
    kept = {
        "cheaper_fixed": None,
        "difference_to_costliest": (0.0, -0.01, 0.01),
        "macs_per_video": 50.0,
        "macs_saved": 0.5,
    }
    return favourable | kept | changes


@pytest.mark.parametrize(
    ("changes", "point", "words"),
    [
        ({}, None, ""),
        (
            {"cheaper_fixed": "fixed:7", "difference_to_cheaper_fixed": (0.001, -0.02, 0.02)},
            "fixed:7",
            "costs 60.0 % less and is not significantly less accurate (assigned minus fixed:7: +0.1 points",
        ),
        ({"difference_to_mixture": (-0.01, -0.05, 0.03)}, "fixed:7", "below the line between the fixed points (-1.0"),
        ({"difference_to_costliest": (-0.03, -0.05, -0.01)}, "fixed:14", "significantly less accurate (-3.0 points"),
    ],
)
def test_the_fixed_point_that_an_evaluation_favours(changes: dict[str, Any], point: str | None, words: str) -> None:
    found = favoured_policy(FIXED | {"assigned": row(**changes)}, "assigned")
    assert (found and found[0]) == point and words in (found[1] if found else "")
    assert favoured_policy(FIXED | {"assigned": row()}, "fixed:7") is None


@pytest.mark.parametrize(("low", "favoured"), [(0.01, "leap:7:cost=0.5"), (-0.01, "fixed:7")])
def test_the_policy_of_the_page_is_favoured_if_its_gain_is_proven(low: float, favoured: str) -> None:
    assigned = row(difference_to_mixture=(-0.01, -0.05, 0.03), macs_saved=-0.1)
    leap = row(difference_to_mixture=(0.02, low, 0.04), macs_saved=0.43)
    policies = FIXED | {"assigned": assigned, "leap:7:cost=0.5": leap}
    found = favoured_policy(policies, "assigned")
    assert found and found[0] == favoured
    assert proven_policy(policies) == (favoured if "leap" in favoured else None)
    assert favoured_policy(policies, "leap:7:cost=0.5") is None
    if "leap" in favoured:
        assert "it saves 43.0 %" in found[1] and "gains +2.0 points (+1.0 to +4.0) over mixtures" in found[1]


def test_the_cheapest_fixed_point_that_is_not_significantly_worse_is_named() -> None:
    costliest = {"difference_to_costliest": (0.0, 0.0, 0.0), "macs_saved": 0.0}
    good = {"difference_to_costliest": (-0.016, -0.036, 0.005), "macs_saved": 0.485}
    bad = {"difference_to_costliest": (-0.1, -0.13, -0.07), "macs_saved": 0.7}
    policies = {"fixed:7": costliest, "fixed:5": good, "fixed:4": bad, "leap:4:cost=0.5": good | {"macs_saved": 0.6}}
    assert sufficient_fixed(policies) == "fixed:5"
    assert sufficient_fixed({"fixed:7": costliest, "fixed:4": bad}) is None


def test_outside_the_fixed_points() -> None:
    dear = against_fixed(measured("assigned", 104.0, (800, True), (200, False)), [LONG, SHORT])
    assert dear and dear.mixture == {"fixed:14": 1.0}
    assert dear.difference_to_mixture[0] == 0 and dear.cheaper_fixed == "fixed:14"
    assert against_fixed(measured("assigned", 10.0, (1000, True)), [LONG, SHORT]) is None
