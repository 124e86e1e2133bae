"""What a few clips prove about an assigner: which threshold they support, and how well it tells clips apart.

All functions are pure. Clips of this module are those that the assigner was not fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import numpy as np
from scipy import optimize, stats

from videoadapt.config.cascade import NEVER
from videoadapt.routing.label_rules import Bools, Choice, Floats, Interval, cheapest_sufficient
from videoadapt.routing.learn_then_test import (
    loss_p_values,
    loss_upper,
    mean_p_values,
    mean_upper,
    valid_in_order,
    videos_needed,
)

FEWEST = 50  # clips. With fewer, one clip is more than two points of accuracy, and no threshold can be chosen
_BESIDE = 1e-9
_Z = float(stats.norm.ppf(0.975))  # of 95 % intervals
Rule = Literal["proven", "estimated", "none"]


def choosing_clips(labelled: int, select: float) -> int:
    """Returns how many of so many labelled clips choose the threshold; an assigner is of use from `FEWEST` on."""
    return round(select * labelled)


@dataclass(frozen=True)
class FixedPoint:
    """What one point for all clips would save and lose against the costliest one. The names are keys of `assign.json`.

    `p_value` is the exact one of McNemar's test: how likely chance alone makes such a difference in accuracy.
    """

    macs_saved: float
    difference: Interval  # accuracy minus the costliest point's
    p_value: float


@dataclass(frozen=True)
class Threshold:
    """A threshold, and what it rests on.

    `proven`: the loss is at most the tolerance, with the wanted confidence. `estimated`: it is so on these clips alone.
    `none`: no threshold that saves is supported, and every clip gets the costliest point.
    """

    value: float
    rule: Rule


def supported_threshold(  # noqa: PLR0913 - settings, by name
    probabilities: Floats,
    right: Bools,
    costs: Floats,
    *,
    assigner_cost: float,
    tolerance: float,
    delta: float,
    sources: Choice | None = None,
) -> Threshold:
    """Chooses the threshold that saves most, as far as the clips support it.

    First by proof: thresholds are tested from the safest on, as in `calibrate`. If no threshold that saves is proven,
    by estimate: the cheapest one that loses at most `tolerance` on these clips, or one clip where a clip is more than
    that. An estimate needs `FEWEST` clips, and an assigner that tells easy clips from hard ones.

    Args:
        probabilities: The assigner's probabilities, `(clips, points)`.
        right: Whether the model is right, `(clips, points)`.
        costs: Cost of each point, `(points,)`, in any unit.
        assigner_cost: Cost of the assigner, in the same unit.
        tolerance: Accuracy that may be lost.
        delta: 1 minus the confidence of a proof.
        sources: Number of each clip's source, `(clips,)`; None: each clip is its own. Clips of one source are alike,
            so that the units of a proof are sources, each with the mean loss of its clips.
    """
    clips = len(right)
    grid = np.linspace(0.995, 0.5, 100)  # from the safest threshold on
    choices = [cheapest_sufficient(probabilities, float(threshold)) for threshold in grid]
    lost = np.stack([right[:, 0] & ~right[np.arange(clips), choice] for choice in choices])  # (thresholds, clips)
    saves = np.array([costs[choice].mean() + assigner_cost < costs[0] for choice in choices])
    proven = np.flatnonzero(valid_in_order(_p_values(lost, sources, tolerance), delta) & saves)
    if len(proven):
        return Threshold(float(grid[proven[-1]]), "proven")  # the last one is the cheapest: costs fall along the grid
    _, low, _ = separation(probabilities, right, sources)
    if clips >= FEWEST and low > 0.5:  # noqa: PLR2004 - of guessing
        value = choose_threshold(probabilities, right, costs, tolerance=max(tolerance, 1 / clips))
        if costs[cheapest_sufficient(probabilities, value)].mean() + assigner_cost < costs[0]:
            return Threshold(value, "estimated")
    return Threshold(NEVER, "none")  # every clip gets the costliest point


def choose_threshold(probabilities: Floats, right: Bools, costs: Floats, *, tolerance: float) -> float:
    """Finds the threshold of least mean cost that loses at most `tolerance` accuracy against the costliest point.

    Args:
        probabilities: The assigner's probabilities, `(clips, points)`, on clips that it was not fitted on.
        right: Whether the model is right, `(clips, points)`.
        costs: Cost of each point, `(points,)`, in any unit.
        tolerance: Accuracy that may be lost, between 0 and 1.

    Returns:
        The threshold. `NEVER` if every threshold loses more: every clip then gets the costliest point.
    """
    best, least = NEVER, np.inf
    allowed = right[:, 0].mean() - tolerance - 1e-12  # the small number forgives rounding of the mean
    for threshold in np.linspace(0.5, 0.995, 100):  # in steps of 0.005
        choice = cheapest_sufficient(probabilities, float(threshold))
        accuracy, cost = right[np.arange(len(choice)), choice].mean(), costs[choice].mean()
        if accuracy >= allowed and cost < least:  # `<`: of equal costs, the lowest threshold counts
            best, least = float(threshold), cost
    return best


def clips_needed(tolerance: float, delta: float, sources: Choice) -> int | None:
    """Returns about how many clips prove `tolerance` if none is lost; None if no number does.

    The units of a proof are sources. Without a loss, as many sources are needed as clips that are each their own.

    Args:
        tolerance: Accuracy that may be lost.
        delta: 1 minus the confidence.
        sources: Number of each clip's source, `(clips,)`. Further sources are taken to have as many clips.
    """
    units = videos_needed(0.0, tolerance, delta)
    return units and math.ceil(units * len(sources) / len(np.unique(sources)))


def _p_values(lost: Bools, sources: Choice | None, tolerance: float) -> Floats:
    """Returns the p-value of each row of losses, `(thresholds, clips)`: exact, or by the means of the sources."""
    if not have_several(sources):
        return loss_p_values(lost.sum(1), lost.shape[1], tolerance)
    means = np.stack([_source_means(row, sources) for row in lost])  # (thresholds, sources)
    return mean_p_values(means.mean(1), np.ones(len(means)), means.shape[1], tolerance)


def have_several(sources: Choice | None) -> TypeGuard[Choice]:
    """Returns whether a source has several clips."""
    return sources is not None and len(np.unique(sources)) < len(sources)


def _source_means(values: Bools, sources: Choice) -> Floats:
    """Returns the mean over the clips of each source: `(clips,)` to `(sources,)`."""
    means: Floats = _source_sums(values, sources) / np.unique(sources, return_counts=True)[1]
    return means


def _source_sums(values: Floats | Bools, sources: Choice) -> Floats:
    """Returns the sum over the clips of each source: `(clips,)` to `(sources,)`."""
    numbers = np.unique(sources, return_inverse=True)[1].reshape(-1)  # (clips,)
    return np.bincount(numbers, weights=values).astype(np.float64)


def separation(probabilities: Floats, right: Bools, sources: Choice | None = None) -> Interval:
    """Returns how well the assigner tells clips on which the cheapest point is right from the others.

    It is the area under the ROC curve (AUC): the probability that of two clips, one of each kind, the assigner finds
    the easy one easier. 0.5 is guessing. The interval is Newcombe's (2006, method 5), which stays inside 0 and 1 and
    has a width also where no pair is in the wrong order. The width is by the number of sources with clips of a kind,
    and not by the number of clips: those of one source are alike.

    Args:
        probabilities: The assigner's probabilities, `(clips, points)`.
        right: Whether the model is right, `(clips, points)`.
        sources: Number of each clip's source, `(clips,)`; None: each clip is its own.

    Returns:
        The AUC and its interval; 0.5 between 0 and 1 if all clips are of one kind.
    """
    score, easy = probabilities[:, -1], right[:, -1]
    m, n = int(easy.sum()), int((~easy).sum())
    if not m or not n:
        return 0.5, 0.0, 1.0
    found = float(stats.mannwhitneyu(score[easy], score[~easy]).statistic) / (m * n)
    if sources is not None:
        m, n = len(np.unique(sources[easy])), len(np.unique(sources[~easy]))
    pairs = (m + n) / 2 - 1

    def distance(area: float) -> float:
        spread = 1 + pairs * (1 - area) / (2 - area) + pairs * area / (1 + area)
        return (found - area) ** 2 - _Z**2 * area * (1 - area) * spread / (m * n)

    # Just beside the AUC itself, the distance is negative. At 0 and at 1 it would be a root, but not an end.
    low = 0.0 if found == 0 else float(optimize.brentq(distance, 0.0, found - _BESIDE))
    high = 1.0 if found == 1 else float(optimize.brentq(distance, found + _BESIDE, 1.0))
    return found, low, high


def difference(right: Bools, costliest: Bools, sources: Choice) -> Interval:
    """Returns the accuracy minus the costliest point's on the same clips, with a 95 % interval.

    Agresti and Min (2005): half a source is added to each kind of outcome, so that the interval is never a point.

    Args:
        right: Whether the answer on each clip is right, `(clips,)`.
        costliest: Whether the costliest point's is, `(clips,)`.
        sources: Number of each clip's source, `(clips,)`. The interval draws whole sources.
    """
    return _mean_interval(right.astype(np.float64) - costliest, sources)


def _mean_interval(gains: Floats, sources: Choice) -> Interval:
    """Returns the mean of gains between -1 and 1, `(clips,)`, with the interval of `difference`."""
    added = len(gains) / len(np.unique(sources))  # clips of a source in the mean
    clips = len(gains) + 2 * added
    centre = float(gains.sum()) / clips
    squares = (_source_sums(gains - centre, sources) ** 2).sum() + added**2 * (1 + 2 * centre**2)
    half = _Z * math.sqrt(squares) / clips
    return float(gains.mean()), max(-1.0, centre - half), min(1.0, centre + half)


def over_random(right: Bools, choice: Choice, sources: Choice) -> Interval:
    """Returns the accuracy minus the mean accuracy of random routing with the same mix, with a 95 % interval.

    Args:
        right: Whether the model is right, `(clips, points)`.
        choice: Number of the point of each clip, `(clips,)`.
        sources: As in `difference`.
    """
    clips, points = right.shape
    mix = np.bincount(choice, minlength=points) / clips
    gains = right[np.arange(clips), choice] - right @ mix  # (clips,)
    return _mean_interval(gains, sources)


def fixed_points(right: Bools, costs: Floats, points: Sequence[str], sources: Choice) -> dict[str, FixedPoint]:
    """Returns what each point but the costliest would save and lose, if all clips had it.

    Args:
        right: Whether the model is right, `(clips, points)`.
        costs: Cost of each point, `(points,)`.
        points: The points, costliest first.
        sources: As in `difference`. The p-value is McNemar's, of sources that gain in all against those that lose.
    """
    found = {}
    for number, point in enumerate(points[1:], start=1):
        gains = _source_sums(right[:, number].astype(np.float64) - right[:, 0], sources)  # (sources,)
        won, lost = int((gains > 0).sum()), int((gains < 0).sum())
        p_value = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
        saved = float(1 - costs[number] / costs[0])
        found[point] = FixedPoint(saved, difference(right[:, number], right[:, 0], sources), p_value)
    return found


def largest_loss(right: Bools, choice: Choice, delta: float, sources: Choice | None = None) -> float:
    """Returns the upper bound, with confidence 1 - delta, of how often the costliest point is right and this one wrong.

    Args:
        right: Whether the model is right, `(clips, points)`.
        choice: Number of the point of each clip, `(clips,)`.
        delta: 1 minus the confidence.
        sources: As in `supported_threshold`.
    """
    lost = right[:, 0] & ~right[np.arange(len(choice)), choice]
    if (choice == 0).all():
        return 0.0
    if have_several(sources):
        means = _source_means(lost, sources)
        return mean_upper(float(means.mean()), 1.0, len(means), delta)
    return float(loss_upper(np.array([lost.sum()]), len(choice), delta)[0])
