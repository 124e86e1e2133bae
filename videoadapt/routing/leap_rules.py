"""Rules of a leap: from how sure one point is, how probable it is that each point is right, and which one to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.errors import UserError
from videoadapt.routing.label_rules import Bools, Choice, Floats

FEATURES = len(MEASURES) + 1  # of an answer, see `answer_features`
PENALTY = 0.01  # of the squared weights, beside the mean loss of a clip: a dozen features need no more
_MOST = 1 - 1e-6  # a probability of 1 has no odds


@dataclass(frozen=True)
class Logistic:
    """Logistic regressions on the same features, one for each point.

    Attributes:
        mean: Of each feature, `(features,)`, as all of these.
        scale: Standard deviation of each feature.
        weights: For each point, those of the standardised features, and a constant last: `(points, features + 1)`.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, features: Floats, right: Bools, penalty: float = PENALTY) -> Logistic:
        """Fits the regressions.

        Args:
            features: `(clips, features)`. Clips with NaN are left out.
            right: Whether each point is right on each clip, `(clips, points)`.
            penalty: Factor of the squared weights, the constant apart.

        Raises:
            UserError: No clip is left.
        """
        known = np.isfinite(features).all(axis=1)
        if not known.any():
            raise UserError("label table: has no clip whose answer is a number")
        x, y = features[known], right[known].astype(float)
        mean, scale = x.mean(0), x.std(0) + 1e-9
        x = np.column_stack([(x - mean) / scale, np.ones(len(x))])
        penalties = np.append(np.full(len(mean), penalty), 0.0)
        weights = [_fit_one(x, wanted, penalties) for wanted in y.T]
        return cls(tuple(mean.tolist()), tuple(scale.tolist()), tuple(tuple(row.tolist()) for row in weights))

    @classmethod
    def from_json(cls, numbers: Mapping[str, Any]) -> Logistic:
        """Returns the regressions of a file, whose content is that of `dataclasses.asdict`.

        Raises:
            TypeError, KeyError, ValueError: It is not.
        """
        mean, scale, *weights = (
            tuple(map(float, row)) for row in (numbers["mean"], numbers["scale"], *numbers["weights"])
        )
        if len(mean) != len(scale) or any(len(row) != len(mean) + 1 for row in weights):
            raise ValueError("expected a mean and a scale for each feature, and a weight more for each regression")
        if not np.isfinite(np.concatenate([mean, scale, *weights])).all():
            raise ValueError("expected finite numbers")
        return cls(mean, scale, tuple(weights))

    def __call__(self, features: Floats) -> Floats:
        """Returns the probability that each point is right: `(clips, features)` to `(clips, points)`."""
        x = np.column_stack([(features - self.mean) / self.scale, np.ones(len(features))])
        chances: Floats = special.expit(x @ np.array(self.weights).T)
        return chances


def _fit_one(x: Floats, y: Floats, penalties: Floats) -> Floats:
    def loss(weights: Floats) -> tuple[float, Floats]:
        logits = x @ weights
        value = np.mean(np.logaddexp(0, logits) - y * logits) + (penalties * weights**2).sum()
        return float(value), x.T @ (special.expit(logits) - y) / len(y) + 2 * penalties * weights

    found: Floats = optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    return found


def answer_features(confidence: Mapping[Measure, Floats]) -> Floats:
    """Returns what a leap reads of an answer, `(clips, 4)`: each measure of confidence, and the log odds."""
    likely = np.minimum(confidence["probability"], _MOST)
    with np.errstate(divide="ignore"):
        odds = np.log(likely / (1 - likely))
    return np.stack([confidence["probability"], confidence["margin"], confidence["entropy"], odds], axis=1)


def worth_most(chances: Floats, costs: Floats, first: int, price: float) -> Choice:
    """Returns the point of each clip: the largest chance minus the price of its cost, where `first` is paid for.

    A clip with a NaN chance gets the costliest point. Of points that are worth the same, the costliest is taken.

    Args:
        chances: Probability that each point is right, `(clips, points)`, costliest first.
        costs: Of the points, as fractions of the costliest one, `(points,)`.
        first: The point that every clip has run.
        price: Of the costliest point's cost, in probability.
    """
    value = chances - price * _further(costs, first)
    return np.argmax(np.where(np.isnan(value), -np.inf, value), axis=1)


def mean_cost(choice: Choice, costs: Floats, first: int) -> float:
    """Returns the mean cost of a clip that runs `first`, and then the point of `choice` if it is another one."""
    return float(costs[first] + _further(costs, first)[choice].mean())


def price_for(chances: Floats, costs: Floats, first: int, wanted: float) -> float:
    """Returns the lowest price at which the mean cost of a clip is at most `wanted`.

    Raises:
        UserError: The first point alone costs more.
    """

    def cost(price: float) -> float:
        return mean_cost(worth_most(chances, costs, first, price), costs, first)

    low, high = 0.0, 2.0 / float(min(np.delete(costs, first), default=1.0))  # no chance is worth the higher price
    if cost(high) > wanted:
        raise UserError(
            f"leap: its first point alone costs {cost(high):.3g}, which is more than cost={wanted:g}; begin with a "
            "cheaper point of model.points, or allow a higher cost"
        )
    if cost(low) <= wanted:
        return low
    for _ in range(60):  # the cost falls with the price, in steps
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= wanted else (middle, high)
    return high


def _further(costs: Floats, first: int) -> Floats:
    return np.where(np.arange(len(costs)) == first, 0.0, costs)
