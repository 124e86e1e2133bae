"""What policies do on scored videos, and which of them keep a promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.config.sections import CalibrateConfig
from videoadapt.routing.assigner import assigner_macs
from videoadapt.routing.candidates import Order
from videoadapt.routing.label_rules import Bools, Choice, Floats
from videoadapt.routing.learn_then_test import loss_p_values, mean_p_values, valid_policies
from videoadapt.routing.policy import Fixed, Policy
from videoadapt.routing.replay import replay
from videoadapt.routing.scores import Scores

ROUNDING = 1e-9  # of costs


@dataclass(frozen=True)
class Measured:
    """What some policies do on n videos, or on n sources of videos.

    Attributes:
        right: Whether each policy is right on each video, `(policies, n)`; by source, how often it is.
        lost: Whether the costliest point is right and the policy wrong, `(policies, n)`; by source, how often.
        cost: Cost of each video over its cost at the costliest point, `(policies, n)`; by source, the mean.
        most: The largest possible cost of a video, `(policies,)`.
    """

    right: Bools | Floats
    lost: Bools | Floats
    cost: Floats
    most: Floats

    def by_source(self, sources: Choice) -> Measured:
        """Returns the means over the videos of each source, which count alike, however many videos they have.

        Args:
            sources: Number of each video's source, from 0 without gaps, `(videos,)`.
        """
        means = np.equal.outer(np.arange(sources.max() + 1), sources) / np.bincount(sources)[:, None]  # (n, videos)
        return Measured(self.right @ means.T, self.lost @ means.T, self.cost @ means.T, self.most)

    def totals(self, weights: Choice | None = None) -> Totals:
        """Returns the totals of all units.

        Args:
            weights: How often each unit counts, `(n,)`; None: once.
        """
        counts = np.ones(self.cost.shape[1], dtype=np.int64) if weights is None else weights
        units = int(counts.sum())
        costs, accuracies = self.cost @ counts / units, self.right @ counts / units
        return Totals(units, self.lost @ counts, self.lost.dtype == bool, costs, accuracies, self.most)


@dataclass(frozen=True)
class Totals:
    """What policies did on all units together, videos or sources. Every array is `(policies,)`.

    Attributes:
        units: Number of units.
        losses: Sum of the losses of all units. A video has loss 1 if the costliest point is right and the policy wrong.
        whole: The loss of a unit is 0 or 1; otherwise anything between them.
        costs: Mean cost of a video.
        accuracies: Fraction of the videos on which the policy is right.
        most: The largest possible cost of a video.
    """

    units: int
    losses: Choice | Floats
    whole: bool
    costs: Floats
    accuracies: Floats
    most: Floats


def measure(scores: Scores, policies: Sequence[Policy], config: Config) -> Measured:
    """Applies policies to scored videos.

    Args:
        scores: The scores of all clips at all points.
        policies: The policies.
        config: The run's config.
    """
    found = replay([Fixed(config.model.points[0]), *policies], scores, config)
    costliest, views = found.macs[0, 0], scores.clips_per_video * config.evaluate.spatial_crops
    most = [_largest_macs(policy, scores.clips_per_video, views, config) for policy in policies]
    return Measured(
        right=found.right[1:],
        lost=found.right[0] & ~found.right[1:],
        cost=found.macs[1:] / costliest,
        most=np.array(most) / costliest,
    )


def _largest_macs(policy: Policy, clips: int, views: int, config: Config) -> int:
    """Returns the MACs of a video that runs all that a policy allows."""
    macs, model = list(point_macs(config.model).values()), config.model
    of_unit = views if policy.unit == "video" else views // clips
    steps = [macs[point] * (stop - start) for point, start, stop in policy.steps(model.points, of_unit)]
    assigner = assigner_macs(policy.assigner.config, len(macs)) if policy.assigner is not None else 0
    return policy.largest_cost(steps, model.points) * (views // of_unit) + clips * assigner


def run_tests(
    totals: Totals,
    policies: Sequence[Policy],
    orders: Sequence[Order],
    deltas: Sequence[float],
    settings: CalibrateConfig,
) -> tuple[Floats, Bools]:
    """Tests all policies. Returns their p-values and which ones are valid, both `(policies,)`.

    A fixed point needs no test where its promise is certain: its cost is known, and the costliest point loses nothing.

    Args:
        totals: What the policies did.
        policies: The policies.
        orders: The orders of the tests; all their policies are in `policies`.
        deltas: The part of delta of each order.
        settings: The promise.
    """
    row = {policy: number for number, policy in enumerate(policies)}
    rows = [np.array([row[policy] for policy in order.policies]) for order in orders]
    fixed = np.array([isinstance(policy, Fixed) for policy in policies])
    if settings.cost is None:
        if totals.whole:
            p_values = loss_p_values(totals.losses, totals.units, settings.eps)
        else:
            most = np.ones(len(totals.losses))
            p_values = mean_p_values(totals.losses / totals.units, most, totals.units, settings.eps)
        certain = fixed & (totals.costs >= 1 - ROUNDING)
        p_values = np.where(certain, 0.0, p_values)
    else:
        rows = [order[::-1] for order in rows]  # from the cheapest policy on
        p_values = mean_p_values(totals.costs, totals.most, totals.units, settings.cost)
        certain = fixed & (totals.costs <= settings.cost + ROUNDING)
        p_values = np.where(fixed, 1.0 - certain, p_values)
    return p_values, certain | valid_policies(p_values, rows, deltas)


def best(valid: Bools, totals: Totals, settings: CalibrateConfig) -> int | None:
    """Returns the number of the policy to choose; None if no valid policy is cheaper than the costliest point.

    Of the valid policies the cheapest is chosen or, under a bound of the cost, the most accurate.
    """
    costs, accuracies = totals.costs, totals.accuracies
    numbers = np.flatnonzero(valid & (costs < 1 - ROUNDING))
    if not len(numbers):
        return None
    keys = (-accuracies, costs) if settings.cost is None else (costs, -accuracies)  # the last one decides first
    return int(numbers[np.lexsort([key[numbers] for key in keys])[0]])
