"""The tests of a calibration: p-values are exact or above exact ones, orders end at the first failure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from videoadapt.routing.learn_then_test import (
    POWER,
    loss_p_values,
    loss_upper,
    mean_p_values,
    mean_upper,
    most_losses,
    provable_loss,
    split_delta,
    valid_in_order,
    valid_policies,
    videos_needed,
)


@given(st.integers(1, 400), st.floats(0.001, 0.5), st.data())
def test_p_values_of_losses_are_those_of_the_exact_binomial_test(videos: int, eps: float, data: st.DataObject) -> None:
    losses = data.draw(st.integers(0, videos))
    expected = stats.binomtest(losses, videos, eps, alternative="less").pvalue
    assert loss_p_values(np.array([losses]), videos, eps)[0] == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("bound", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("values", [(0.0, 1.0), (0.1, 0.3, 1.0), (0.4, 0.6)])
def test_a_bound_of_the_cost_is_broken_no_more_often_than_delta(bound: float, values: tuple[float, ...]) -> None:
    """Costs whose true mean is just the bound: their p-value is below delta in at most delta of the draws."""
    low, *_, high = values
    chance = (bound - low) / (high - low)
    if not 0 <= chance <= 1:
        chance, bound = 0.5, (low + high) / 2
    rng = np.random.default_rng(0)
    means = np.where(rng.random((20_000, 60)) < chance, high, low).mean(1)
    p_values = mean_p_values(means, np.ones(len(means)), 60, bound)
    for delta in (0.05, 0.2):
        assert (p_values <= delta).mean() <= delta + 3 * np.sqrt(delta / len(means))


def test_p_values_of_costs_are_scaled_by_the_largest_cost() -> None:
    means, most = np.array([0.3, 0.6, 0.1, 0.5, 0.55]), np.array([1.0, 2.0, 1.3, 1.0, 0.6])
    p_values = mean_p_values(means, most, 300, 0.6)
    assert p_values[4] == 0.0  # no video can cost more than the bound
    assert p_values[0] < 1e-10
    assert p_values[2] < p_values[3] < 0.01 < p_values[1]


@given(st.floats(0.0, 1.5), st.integers(5, 2000), st.sampled_from([0.05, 0.1]))
def test_the_upper_end_of_a_cost_is_where_its_test_succeeds(mean: float, videos: int, delta: float) -> None:
    upper = mean_upper(mean, 1.5, videos, delta)
    assert mean - 1e-9 <= upper <= 1.5
    if upper < 1.5 - 1e-3:
        above, below = (mean_p_values(np.array([mean]), np.array([1.5]), videos, upper + d)[0] for d in (2e-4, -2e-4))
        assert above <= delta * 1.01
        assert below > delta * 0.9 or mean >= upper - 1e-3


def test_the_upper_end_of_a_loss_covers_it() -> None:
    losses = np.random.default_rng(1).binomial(200, 0.03, 20_000)
    assert (loss_upper(losses, 200, 0.1) < 0.03).mean() <= 0.1 + 0.01
    assert loss_upper(np.array([200]), 200, 0.1)[0] == 1.0


def test_an_order_ends_at_its_first_failure() -> None:
    p_values = np.array([0.01, 0.05, 0.2, 0.0, 0.04])
    assert valid_in_order(p_values, 0.05).tolist() == [True, True, False, False, False]
    orders = [np.array([0, 1, 2]), np.array([3, 4])]
    assert valid_policies(p_values, orders, [0.02, 0.03]).tolist() == [True, False, False, True, False]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6), st.floats(0.01, 0.5))
def test_the_parts_of_delta_sum_to_it_and_favour_the_cheapest(predicted: list[float], delta: float) -> None:
    parts = split_delta(delta, predicted)
    assert sum(parts) == pytest.approx(delta)
    for cost, part in zip(predicted, parts, strict=True):
        assert all(part >= other for other_cost, other in zip(predicted, parts, strict=True) if cost < other_cost)
        assert all(part == other for other_cost, other in zip(predicted, parts, strict=True) if cost == other_cost)


@pytest.mark.parametrize(("loss", "eps", "delta"), [(0.0, 0.01, 0.1), (0.002, 0.01, 0.1), (0.02, 0.05, 0.05)])
def test_so_many_videos_are_needed_for_a_proof(loss: float, eps: float, delta: float) -> None:
    needed = videos_needed(loss, eps, delta)
    assert needed is not None
    losses = np.random.default_rng(0).binomial(needed, loss, 20_000)
    assert (loss_p_values(losses, needed, eps) <= delta).mean() > POWER - 0.02
    assert most_losses(needed, eps, delta) >= 0
    if loss == 0:
        assert loss_p_values(np.array([0]), needed - 1, eps)[0] > delta


def test_a_provable_loss_is_proven_as_often_as_said() -> None:
    loss = provable_loss(900, 0.01, 0.05)
    assert 0 < loss < 0.01
    assert stats.binom.cdf(most_losses(900, 0.01, 0.05), 900, loss) == pytest.approx(POWER)
    assert provable_loss(100, 0.01, 0.05) == 0  # of 100 videos, not even 0 losses prove it


def test_no_number_of_videos_proves_a_promise_that_is_broken() -> None:
    assert videos_needed(0.01, 0.01, 0.1) is None
