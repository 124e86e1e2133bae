"""Learn then Test (Angelopoulos et al., 2021): which policies keep a promise, with a stated confidence.

A promise is a bound on a mean over all videos: of the loss, or of the cost. For each policy, a p-value tests the
hypothesis that the policy breaks it. Policies are tested in orders that are fixed before the outcomes are seen, and an
order ends at its first policy that fails (fixed-sequence testing), so that an order needs no correction for the number
of its policies. Several orders share `delta` (Bonferroni). With probability 1 - delta, no valid policy breaks it.

All functions are pure and work on counts and means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from videoadapt.routing.label_rules import Bools, Choice, Floats

POWER = 0.8  # probability with which `videos_needed` succeeds
_MOST_VIDEOS = 10**9  # no calibration has more
_ROUNDING = 1e-12


def loss_p_values(losses: Choice | Floats, videos: int, eps: float) -> Floats:
    """Returns the p-values of the hypotheses that policies lose more than `eps`: exact binomial tests.

    Args:
        losses: Number of videos on which each policy loses, `(policies,)`.
        videos: Number of all videos.
        eps: Largest mean loss that keeps the promise.
    """
    p_values: Floats = stats.binom.cdf(losses, videos, eps)
    return p_values


def mean_p_values(means: Floats, most: Floats, units: int, bound: float) -> Floats:
    """Returns the p-values of the hypotheses that the mean of a cost or loss is more than `bound`: Hoeffding-Bentkus.

    Bates et al. (2021), Proposition 1: the smaller one of Hoeffding's bound and of Bentkus's.

    Args:
        means: The mean over the units, by policy, `(policies,)`.
        most: The largest possible value of a unit, by policy, `(policies,)`; the smallest is 0.
        units: Number of units: videos, or sources of videos.
        bound: Largest mean that keeps the promise.
    """
    fraction = np.minimum(bound / most, 1.0)  # of the largest value, as the bounds are for values in [0, 1]
    found = np.minimum(means / most, fraction)  # above the bound, Hoeffding's p-value is 1
    bentkus = math.e * stats.binom.cdf(np.ceil(units * means / most - _ROUNDING), units, fraction)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 counts as 0
        above = np.where(found < 1, (1 - found) * np.log((1 - found) / (1 - fraction)), 0.0)
        below = np.where(found > 0, found * np.log(found / fraction), 0.0)
    p_values: Floats = np.minimum(1.0, np.minimum(np.exp(-units * (above + below)), bentkus))
    return np.where(most <= bound, 0.0, p_values)  # no unit can be above the bound


def loss_upper(losses: Choice | Floats, videos: int, delta: float) -> Floats:
    """Returns upper bounds of the mean losses, each alone with confidence 1 - delta (Clopper and Pearson)."""
    bounds: Floats = np.where(losses < videos, stats.beta.ppf(1 - delta, losses + 1, np.maximum(videos - losses, 1)), 1)
    return bounds


def mean_upper(mean: float, most: float, units: int, delta: float) -> float:
    """Returns an upper bound of a mean with confidence 1 - delta: where `mean_p_values` gives delta."""

    def excess(bound: float) -> float:
        return float(mean_p_values(np.array([mean]), np.array([most]), units, bound)[0]) - delta

    low, high = max(mean, most * _ROUNDING), most * (1 - _ROUNDING)
    if low >= high or excess(high) > 0:
        return most
    return float(optimize.brentq(excess, low, high, xtol=1e-6)) if excess(low) > 0 else low


def valid_in_order(p_values: Floats, delta: float) -> Bools:
    """Returns which policies of one order are valid: those before the first p-value above `delta`."""
    return np.cumprod(p_values <= delta).astype(bool)


def valid_policies(p_values: Floats, orders: Sequence[npt.NDArray[np.int64]], deltas: Sequence[float]) -> Bools:
    """Returns which policies are valid, `(policies,)`.

    Args:
        p_values: One for each policy, `(policies,)`.
        orders: Numbers of the policies of each order, in the order of the tests.
        deltas: The part of delta of each order.
    """
    valid = np.zeros(len(p_values), dtype=bool)
    for order, delta in zip(orders, deltas, strict=True):
        valid[order] |= valid_in_order(p_values[order], delta)
    return valid


def split_delta(delta: float, predicted: Sequence[float]) -> list[float]:
    """Splits `delta` among orders: half for the one with the lowest predicted cost, a quarter for the next, and so on.

    Orders with the same prediction get equal parts. The parts sum to `delta`.

    Args:
        delta: The whole.
        predicted: Predicted cost of each order, which may not come from the calibration's outcomes.
    """
    costs = np.asarray(predicted, dtype=np.float64)
    halves = 0.5 ** np.arange(1, len(costs) + 1)
    halves[-1:] *= 2  # the last part is as large as the one before it, so that the sum is 1
    parts = np.empty(len(costs))
    parts[np.argsort(costs, kind="stable")] = halves
    return [float(delta * parts[costs == cost].mean()) for cost in costs]


def most_losses(videos: int, eps: float, delta: float) -> int:
    """Returns the most losses with which a policy is valid; -1 if none at all are few enough."""
    most = int(stats.binom.ppf(delta, videos, eps))  # the first number whose probability sums up to delta or more
    return most if stats.binom.cdf(most, videos, eps) <= delta else most - 1


def provable_loss(videos: int, eps: float, delta: float) -> float:
    """Returns the largest mean loss of a policy whose proof succeeds with probability `POWER`; see `videos_needed`.

    It is 0 if the videos are too few for any proof.
    """
    most = most_losses(videos, eps, delta)
    return float(stats.beta.ppf(1 - POWER, most + 1, videos - most)) if most >= 0 else 0.0


def videos_needed(loss: float, eps: float, delta: float) -> int | None:
    """Returns about how many videos prove that a policy keeps its promise; None if no number does.

    Args:
        loss: The true mean loss of the policy.
        eps: Largest mean loss that keeps the promise.
        delta: 1 minus the confidence.

    Returns:
        The number of videos with which the proof succeeds with probability `POWER`.
    """
    if loss >= eps:
        return None

    def is_enough(videos: int) -> bool:
        return bool(stats.binom.cdf(most_losses(videos, eps, delta), videos, loss) >= POWER)

    high = 1
    while not is_enough(high):
        high *= 2
        if high > _MOST_VIDEOS:
            return None
    low = high // 2  # not enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
