"""95 % intervals of accuracies, of the difference between two policies, and of medians, and an exact paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

from videoadapt.routing.label_rules import Bools, Choice, Floats

LEVEL = 0.95  # the level of every interval
DRAWS = 10_000  # bootstrap draws: the 2.5 % quantile then rests on 250 draws


@lru_cache(maxsize=4096)  # scipy takes 2 ms, and classes of 50 videos have the same few counts again and again
def wilson(right: int, total: int) -> tuple[float, float]:
    """Returns the Wilson score interval of the fraction `right / total`, or (0, 1) if `total` is 0."""
    if total == 0:
        return 0.0, 1.0
    low, high = stats.binomtest(right, total).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def class_means(right: Bools, truth: Choice) -> Floats:
    """Returns the accuracy on each class that occurs in `truth`, in the order of the class numbers.

    Args:
        right: Whether the answer on each video is right, `(videos,)`.
        truth: The class number of each video, `(videos,)`.
    """
    counts = np.bincount(truth)
    hits = np.bincount(truth, weights=right)  # (classes,): right videos of each class
    return hits[counts > 0] / counts[counts > 0]


def mean_class_interval(right: Bools, truth: Choice) -> tuple[float, float]:
    """Returns the normal interval of the mean class accuracy, where videos are drawn within each class.

    The variance of a class is estimated with one more right and one more wrong video (Agresti and Coull, 1998), so
    that a class at 0 or 100 %, or of a single video, has a variance above 0.

    Args:
        right: Whether the answer on each video is right, `(videos,)`.
        truth: The class number of each video, `(videos,)`.
    """
    counts = np.bincount(truth)
    counts = counts[counts > 0]  # (classes that occur,), as `class_means` returns
    means = class_means(right, truth)
    smoothed = (means * counts + 1) / (counts + 2)
    half = _normal_half(float((smoothed * (1 - smoothed) / counts).sum()) / len(counts) ** 2)
    return max(0.0, float(means.mean()) - half), min(1.0, float(means.mean()) + half)


def _normal_half(variance: float) -> float:
    return float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(variance)


def paired_difference(a: Bools, b: Bools, seed: int = 0) -> tuple[float, float, float]:
    """Returns the accuracy of a minus the accuracy of b on the same videos, with a bootstrap interval over videos.

    Half a video is added to each kind of outcome, so that the interval is never a point: two policies that agree on
    every video of a sample may differ on other videos.

    Args:
        a: Whether policy a is right on each video, `(videos,)`.
        b: Whether policy b is right on each video, `(videos,)`.
        seed: Seed of the bootstrap.

    Returns:
        The difference, and the lower and upper end of its interval, all between -1 and 1.
    """
    total = max(len(a), 1)
    counts = np.array([(a & ~b).sum(), (b & ~a).sum(), (a == b).sum()])  # only a right, only b right, both the same
    fractions = counts / total
    smoothed = (counts + 0.5) / (counts + 0.5).sum()
    drawn = np.random.default_rng(seed).multinomial(total, smoothed, DRAWS)  # (DRAWS, 3)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / total, [0.025, 0.975])
    return float(fractions[0] - fractions[1]), float(low), float(high)


def mcnemar(a_only: int, b_only: int) -> float:
    """Returns the exact two-sided p-value of McNemar's test that a and b are right equally often.

    If both are equally good, then a is right with probability 1/2 on a video that only one of them gets right.

    Args:
        a_only: Number of videos that only a gets right.
        b_only: Number of videos that only b gets right.
    """
    if a_only + b_only == 0:
        return 1.0
    return float(stats.binomtest(a_only, a_only + b_only).pvalue)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median and the lower and upper end of its interval from order statistics.

    The interval assumes nothing about the distribution. Fewer than 6 values allow no 95 %: their range is returned.
    """
    ordered, n = np.sort(values), len(values)
    # The median lies below the value of rank r with the chance that at most r of n fair coins show heads.
    # `stats.quantile_test` gives the same ends, but takes 100 times as long.
    rank = max(int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5)) - 1, 0)
    return float(np.median(ordered)), float(ordered[rank]), float(ordered[-1 - rank])
