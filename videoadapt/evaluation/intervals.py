"""95 % intervals of accuracies, of the difference between two policies, and of medians, and an exact paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from videoadapt.routing.label_rules import Bools, Choice, Floats, Interval

_DIGITS = 9  # sums that differ by rounding alone are the same
LEVEL = 0.95  # the level of every interval
DRAWS = 10_000  # bootstrap draws: the 2.5 % quantile then rests on 250 draws
_SEED = 0  # of the bootstrap


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


def mean_class_interval(right: Bools, truth: Choice, sources: Choice) -> tuple[float, float]:
    """Returns the normal interval of the mean class accuracy, where whole sources are drawn.

    The variance is estimated with one more right and one more wrong source in each class, as large as its other
    sources are in the mean (Agresti and Coull, 1998, where each video is its own source). So a class at 0 or 100 %,
    or of a single source, has a variance above 0.

    Args:
        right: Whether the answer on each video is right, `(videos,)`.
        truth: The class number of each video, `(videos,)`.
        sources: Number of each video's source, `(videos,)`.
    """
    of = np.unique(truth, return_inverse=True)[1].reshape(-1)  # (videos,): position in the arrays over classes below
    pairs = np.unique(np.stack([of, sources]), axis=1)  # (2, pairs of class and source that occur)
    counts = np.bincount(of)  # (classes that occur,), as `class_means` returns
    added = counts / np.bincount(pairs[0])  # (classes,): videos of a source in the mean
    means = class_means(right, truth)
    smoothed = (means * counts + added) / (counts + 2 * added)
    weights = 1 / (counts * (counts + 2 * added))
    # Of each source the sum over its videos, of all classes: these are alike.
    numbers = np.unique(sources, return_inverse=True)[1].reshape(-1)
    units = np.bincount(numbers, weights=(right - smoothed[of]) * np.sqrt(weights[of]))  # (sources,)
    variance = (units**2).sum() + (weights * added**2 * (smoothed**2 + (1 - smoothed) ** 2)).sum()
    half = _normal_half(float(variance) / len(counts) ** 2)
    return max(0.0, float(means.mean()) - half), min(1.0, float(means.mean()) + half)


def _normal_half(variance: float) -> float:
    return float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(variance)


def accuracy_interval(right: Bools, sources: Choice) -> tuple[float, float]:
    """Returns the interval of an accuracy: Wilson's, or by bootstrap where a source has several videos.

    Args:
        right: Whether the answer on each video is right, `(videos,)`.
        sources: Number of each video's source, `(videos,)`.
    """
    if len(np.unique(sources)) == len(sources):
        return wilson(int(right.sum()), len(right))
    return bootstrap_interval(right.astype(np.float64), [0.0, 1.0], sources)


def paired_difference(a: Bools, b: Bools, *, sources: Choice | None = None) -> Interval:
    """Returns the accuracy of a minus the accuracy of b on the same videos, with a bootstrap interval.

    Args:
        a: Whether policy a is right on each video, `(videos,)`.
        b: Whether policy b is right on each video, `(videos,)`.
        sources: Number of each video's source, `(videos,)`; None: each video is its own.

    Returns:
        The difference, and the lower and upper end of its interval, all between -1 and 1.
    """
    gains = a.astype(np.float64) - b
    low, high = bootstrap_interval(gains, [1.0, -1.0, 0.0], sources)  # only a, only b, both the same
    return float(gains.sum() / max(len(gains), 1)), low, high


def bootstrap_interval(gains: Floats, kinds: Sequence[float], sources: Choice | None = None) -> tuple[float, float]:
    """Returns the bootstrap interval of a mean over videos. Whole sources are drawn: their videos are alike.

    Half a unit of each kind is added, so that the interval is never a point: two policies that agree on every video of
    a sample may differ on other videos. A unit has as many videos as are alike: the design effect (Kish, 1965), from
    one video, if those of a source differ as others do, to a whole source, if they are equal or no video differs.

    Args:
        gains: The value of each video, `(videos,)`.
        kinds: The values that a video can have.
        sources: Number of each video's source, `(videos,)`; None: each video is its own.
    """
    numbers = np.arange(len(gains)) if sources is None else np.unique(sources, return_inverse=True)[1]
    units = np.stack([np.bincount(numbers, weights=gains), np.bincount(numbers)], axis=1)  # (sources, 2)
    size = _videos_alike(gains, units)
    added = np.array([[kind * size, size] for kind in kinds])  # (kinds, 2): the sum and the number of videos
    weights = np.repeat([0.5, 1.0], [len(added), len(units)])
    # Units with the same sum and size are drawn together, so that memory does not grow with the videos.
    both = np.concatenate([added, units]).round(_DIGITS)
    types, first, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    counts = np.bincount(inverse.reshape(-1), weights=weights)
    order = np.argsort(first)  # by first appearance: the kinds have the same random numbers in every sample
    counts, types = counts[order], types[order]
    drawn = np.random.default_rng(_SEED).multinomial(max(len(units), 1), counts / counts.sum(), DRAWS)  # (DRAWS, types)
    low, high = np.quantile(drawn @ types[:, 0] / (drawn @ types[:, 1]), [0.025, 0.975])
    return float(low), float(high)


def _videos_alike(gains: Floats, units: npt.NDArray[Any]) -> float:
    """Returns how many videos are alike: from 1 to the videos of a source in the mean.

    Args:
        gains: The value of each video, `(videos,)`.
        units: The sum of the values and the number of videos of each source, `(sources, 2)`.
    """
    if not len(gains):
        return 1.0
    most = len(gains) / len(units)
    apart = float(((gains - gains.mean()) ** 2).sum())  # the variance if videos were independent
    together = float(((units[:, 0] - gains.mean() * units[:, 1]) ** 2).sum())
    return min(max(together / apart, 1.0), most) if apart > 0 else most


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


def has_interval(values: int) -> bool:
    """Returns whether this many values allow an interval of their median; with fewer, `median_interval` is a range."""
    return stats.binom.cdf(0, values, 0.5) <= (1 - LEVEL) / 2


def median_interval(values: Sequence[float]) -> Interval:
    """Returns the median and the lower and upper end of its interval from order statistics.

    The interval assumes nothing about the distribution. Fewer than 6 values allow no 95 %: their range is returned.
    """
    ordered, n = np.sort(values), len(values)
    # The median lies below the value of rank r with the chance that at most r of n fair coins show heads.
    # `stats.quantile_test` gives the same ends, but takes 100 times as long.
    rank = max(int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5)) - 1, 0)
    return float(np.median(ordered)), float(ordered[rank]), float(ordered[-1 - rank])
