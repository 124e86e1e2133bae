"""95 % intervals of accuracies, of the difference between two policies, and of medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from videoadapt.routing.label_rules import Bools, Choice, Floats

Z = 1.959964  # the normal distribution's 97.5 % point
DRAWS = 10_000


def wilson(right: int, total: int) -> tuple[float, float]:
    """The Wilson score interval of a share."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    centre = (share + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z / (1 + Z**2 / total) * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def class_means(right: Bools, truth: Choice) -> Floats:
    """The accuracy on each class that occurs."""
    counts = np.bincount(truth)
    hits = np.bincount(truth, weights=right)
    return hits[counts > 0] / counts[counts > 0]


def mean_class_interval(right: Bools, truth: Choice) -> tuple[float, float]:
    """The normal interval of the mean class accuracy, videos being drawn within each class.

    The variance of a class is estimated from one more right and one more wrong video than there are (Agresti and Coull,
    1998), so that a class at 0 or 100 %, or of a single video, is not taken for certain.
    """
    counts = np.bincount(truth)
    counts = counts[counts > 0]
    means = class_means(right, truth)
    shares = (means * counts + 1) / (counts + 2)
    half = Z * math.sqrt(float((shares * (1 - shares) / counts).sum())) / len(counts)
    return max(0.0, float(means.mean()) - half), min(1.0, float(means.mean()) + half)


def paired_difference(a: Bools, b: Bools, seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of a minus that of b on the same videos, with its bootstrap interval over videos.

    Half a video is added to each kind of outcome, so that no difference in a sample is not taken for certainty.
    """
    total = max(len(a), 1)
    counts = np.array([(a & ~b).sum(), (b & ~a).sum(), (a == b).sum()])
    shares = counts / total
    smoothed = (counts + 0.5) / (counts + 0.5).sum()  # policies that never differed here may differ elsewhere
    drawn = np.random.default_rng(seed).multinomial(total, smoothed, DRAWS)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / total, [0.025, 0.975])
    return float(shares[0] - shares[1]), float(low), float(high)


def mcnemar(a_only: int, b_only: int) -> float:
    """The exact two-sided p-value that a and b are equally often right, from the videos that only one gets right.

    McNemar's test in its exact binomial form: where both are equally good, either is right alone with chance 1/2.
    """
    total, ways, tail = a_only + b_only, 1, 1
    for count in range(min(a_only, b_only)):
        ways = ways * (total - count) // (count + 1)  # of choosing count + 1 of total
        tail += ways
    return min(1.0, float(Fraction(2 * tail, 2**total)))


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its interval from order statistics, which assumes nothing of the distribution.

    Of fewer than 6 values, which allow no 95 %, their range.
    """
    ordered, n = sorted(values), len(values)
    edge, chance = 0, 0.0  # that the true median lies below `ordered[edge]`: a binomial tail
    while (chance := chance + math.comb(n, edge) * 0.5**n) <= 0.025:  # noqa: PLR2004 - half of what 95 % leave
        edge += 1
    edge = max(edge - 1, 0)
    return statistics.median(ordered), ordered[edge], ordered[-1 - edge]
