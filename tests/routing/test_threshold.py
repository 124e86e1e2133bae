"""What few clips prove about an assigner."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from videoadapt.config.cascade import NEVER
from videoadapt.routing.label_rules import Bools, Floats, cheapest_sufficient
from videoadapt.routing.threshold import (
    clips_needed,
    difference,
    fixed_points,
    largest_loss,
    over_random,
    separation,
    supported_threshold,
)

COSTS = np.array([10.0, 5.0, 2.0])


def clips(count: int, *, skill: float, seed: int = 0) -> tuple[Floats, Bools]:
    """Clips of which half are easy; with skill 1 an assigner knows which, with 0 it guesses."""
    rng = np.random.default_rng(seed)
    easy = rng.random(count) < 0.5
    knows = np.where(easy, 0.99, 0.01)
    cheap = skill * knows + (1 - skill) * rng.random(count)
    right = np.stack([rng.random(count) < 0.97, np.ones(count, bool), easy], axis=1)
    right[:, 1] = right[:, 0]
    return np.stack([1 - cheap, np.zeros(count), cheap], axis=1), right


def test_many_clips_prove_a_threshold() -> None:
    probabilities, right = clips(2000, skill=1.0)
    found = supported_threshold(probabilities, right, COSTS, assigner_cost=0.1, tolerance=0.005, delta=0.1)
    assert found.rule == "proven"
    choice = cheapest_sufficient(probabilities, found.value)
    assert COSTS[choice].mean() < 7
    assert largest_loss(right, choice, 0.1) <= 0.005


def test_too_few_clips_for_a_proof_give_an_estimate() -> None:
    probabilities, right = clips(390, skill=1.0)
    found = supported_threshold(probabilities, right, COSTS, assigner_cost=0.1, tolerance=0.005, delta=0.1)
    assert found.rule == "estimated"
    assert COSTS[cheapest_sufficient(probabilities, found.value)].mean() < 7


def test_one_clip_may_be_lost_where_a_clip_is_more_than_the_tolerance() -> None:
    probabilities, right = clips(98, skill=1.0)
    right[np.flatnonzero(right[:, 2] & right[:, 0])[0], 2] = False  # the assigner takes one hard clip for an easy one
    found = supported_threshold(probabilities, right, COSTS, assigner_cost=0.1, tolerance=0.005, delta=0.1)
    assert found.rule == "estimated"
    choice = cheapest_sufficient(probabilities, found.value)
    assert (right[:, 0] & ~right[np.arange(98), choice]).sum() == 1


@pytest.mark.parametrize(("count", "skill"), [(40, 1.0), (98, 0.0), (390, 0.0)])
def test_few_clips_and_a_guessing_assigner_support_nothing(count: int, skill: float) -> None:
    probabilities, right = clips(count, skill=skill)
    found = supported_threshold(probabilities, right, COSTS, assigner_cost=0.1, tolerance=0.005, delta=0.1)
    assert (found.value, found.rule) == (NEVER, "none")


def test_an_assigner_that_costs_more_than_it_saves_is_not_supported() -> None:
    probabilities, right = clips(2000, skill=1.0)
    found = supported_threshold(probabilities, right, COSTS, assigner_cost=6.0, tolerance=0.005, delta=0.1)
    assert found.rule == "none"


def test_the_units_of_a_proof_are_sources() -> None:
    sources = np.repeat(np.arange(30), 20)  # 20 copies of each clip
    probabilities, right = clips(30, skill=1.0)
    probabilities, right = probabilities[sources], right[sources]
    supported = partial(supported_threshold, probabilities, right, COSTS, assigner_cost=0.1, tolerance=0.005, delta=0.1)
    assert supported().rule == "proven"
    found = supported(sources=sources)
    assert found.rule == "estimated"
    choice = cheapest_sufficient(probabilities, found.value)
    assert largest_loss(right, choice, 0.1) < 0.005
    once = largest_loss(right[::20], choice[::20], 0.1)
    assert largest_loss(right, choice, 0.1, sources) == pytest.approx(once, abs=1e-3)  # as many units as sources


def test_the_clips_that_a_proof_needs_are_those_of_enough_sources() -> None:
    assert clips_needed(0.01, 0.1, np.arange(50)) == 230
    assert clips_needed(0.01, 0.1, np.repeat(np.arange(10), 5)) == 5 * 230
    assert clips_needed(0.0, 0.1, np.arange(50)) is None
    for units, proven in ((230, True), (229, False)):
        sources = np.repeat(np.arange(units), 5)
        assert (largest_loss(np.ones((len(sources), 2), bool), np.ones_like(sources), 0.1, sources) <= 0.01) is proven


def test_the_interval_of_the_separation_covers_the_true_one() -> None:
    """Scores of easy and hard clips from two normal distributions, whose AUC is known."""
    rng, true, covered = np.random.default_rng(0), 0.7602, 0  # Phi(1 / sqrt(2))
    for _ in range(400):
        easy = np.arange(60) < 20
        score = rng.normal(easy * 1.0, 1.0)
        _, low, high = separation(np.stack([-score, score], axis=1), np.stack([easy, easy], axis=1))
        covered += low <= true <= high
    assert covered / 400 > 0.92


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_separation_has_an_interval(sign: int) -> None:
    easy = np.arange(30) < 10
    value, low, high = separation(sign * np.stack([~easy, easy], axis=1).astype(float), np.stack([easy] * 2, axis=1))
    assert value == (sign > 0)
    assert high - low > 0.05
    assert separation(np.ones((3, 2)), np.ones((3, 2), bool)) == (0.5, 0.0, 1.0)


def test_an_assigner_that_guesses_is_rarely_proven_where_clips_of_a_source_are_alike() -> None:
    rng, sources = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    proven = 0
    for _ in range(200):
        easy, score = (rng.random(30) < 0.5)[sources], rng.normal(size=30)[sources]
        proven += separation(np.stack([-score, score], 1), np.stack([easy, easy], 1), sources)[1] > 0.5
    assert proven / 200 < 0.05


def test_the_chance_of_a_loss_counts_sources() -> None:
    right = np.ones((200, 2), bool)
    right[:30, 1] = False  # of 3 sources of 10
    found = fixed_points(right, np.array([2.0, 1.0]), ("14", "7"), np.arange(200) // 10)
    assert found["7"].p_value == pytest.approx(0.25)
    assert fixed_points(right, np.array([2.0, 1.0]), ("14", "7"), np.arange(200))["7"].p_value < 1e-6


def test_differences_have_intervals_that_cover() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(500):
        costliest = rng.random(80) < 0.9
        right = np.where(rng.random(80) < 0.1, ~costliest, costliest)  # true difference: 0.1 * (0.1 - 0.9)
        _, low, high = difference(right, costliest, np.arange(80))
        covered += low <= -0.08 <= high
    assert covered / 500 > 0.92


def test_intervals_of_clips_draw_whole_sources() -> None:
    rng, sources = np.random.default_rng(1), np.repeat(np.arange(60), 5)
    once, covered = np.arange(60), 0
    for _ in range(400):  # all clips of a source are alike
        costliest = rng.random(60) < 0.9
        right = np.where(rng.random(60) < 0.2, ~costliest, costliest)  # true difference: 0.2 * (0.1 - 0.9)
        _, low, high = difference(right[sources], costliest[sources], sources)
        covered += low <= -0.16 <= high
    assert covered / 400 > 0.92
    assert difference(right[sources], costliest[sources], sources) == pytest.approx(difference(right, costliest, once))
    both, choice = np.stack([costliest, right], axis=1), rng.integers(0, 2, 60)
    assert over_random(both[sources], choice[sources], sources) == pytest.approx(over_random(both, choice, once))


def test_fixed_points_and_random_routing_are_compared() -> None:
    probabilities, right = clips(400, skill=1.0)
    found = fixed_points(right, COSTS, ("14", "10", "7"), np.arange(400))
    assert list(found) == ["10", "7"]
    assert found["10"].difference[0] == 0
    assert found["10"].p_value == 1.0
    assert found["7"].macs_saved == pytest.approx(0.8)
    assert found["7"].p_value < 1e-6
    choice = cheapest_sufficient(probabilities, 0.9)
    value, low, _ = over_random(right, choice, np.arange(400))
    assert value > low > 0.1
    assert largest_loss(right, np.zeros(400, np.int64), 0.1) == 0.0
    value, low, high = over_random(np.ones((400, 3), dtype=bool), choice, np.arange(400))
    assert low < value == 0 < high  # no point, although nothing differed here
