"""A policy is worth its cost only above the line between the fixed points, and an equally good fixed point is named."""

from __future__ import annotations

import numpy as np
import pytest

from videoadapt.evaluation.against_fixed import Measured, against_fixed
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


def test_outside_the_fixed_points() -> None:
    dear = against_fixed(measured("assigned", 104.0, (800, True), (200, False)), [LONG, SHORT])
    assert dear and dear.mixture == {"fixed:14": 1.0}
    assert dear.difference_to_mixture[0] == 0 and dear.cheaper_fixed == "fixed:14"
    assert against_fixed(measured("assigned", 10.0, (1000, True)), [LONG, SHORT]) is None
