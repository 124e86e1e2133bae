"""Intervals have published values, cover the truth in simulations, and are symmetric."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videoadapt.evaluation.intervals import (
    accuracy_interval,
    bootstrap_interval,
    class_means,
    mean_class_interval,
    paired_difference,
    wilson,
)
from videoadapt.evaluation.result_tables import class_table


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # 0.95 score intervals, from R's prop.test(right, total, correct = FALSE) and Newcombe (1998), table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_has_its_published_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 400).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_solves_its_equation(counts: tuple[int, int]) -> None:
    """The ends are the p with `(right / total - p)^2 = z^2 p (1 - p) / total`."""
    right, total = counts
    for p in wilson(right, total):
        assert (right / total - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / total, abs=1e-9)


@given(st.integers(0, 400).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_contains_the_fraction_and_is_symmetric(counts: tuple[int, int]) -> None:
    right, total = counts
    low, high = wilson(right, total)
    assert 0 <= low < high <= 1
    if total:
        assert low - 1e-12 <= right / total <= high + 1e-12
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low))


def test_the_interval_of_no_videos_is_0_to_1() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("fraction", "total"), [(0.1, 60), (0.5, 100), (0.77, 400), (0.95, 200)])
def test_wilson_covers_the_truth_19_times_in_20(fraction: float, total: int) -> None:
    draws = np.random.default_rng(0).binomial(total, fraction, 4000)
    covered = [low <= fraction <= high for low, high in (wilson(int(right), total) for right in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_the_paired_interval_covers_the_true_difference() -> None:
    rng = np.random.default_rng(1)
    chances = [0.6, 0.08, 0.14, 0.18]  # both right, only a, only b, none
    covered = []
    for _ in range(300):
        drawn = rng.choice(4, 400, p=chances)
        _, low, high = paired_difference(drawn <= 1, (drawn == 0) | (drawn == 2))
        covered.append(low <= 0.08 - 0.14 <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    "counts", [[200, 100, 60, 40], [50] * 400, [2] * 400, [5] * 12, [1] * 60], ids=lambda c: f"{len(c)} classes"
)
def test_the_mean_class_interval_covers_the_true_mean(counts: list[int]) -> None:
    """Classes of few videos and classes at 0 or 100 % included."""
    rng = np.random.default_rng(2)
    truth = np.repeat(np.arange(len(counts)), counts)
    chance = rng.uniform(0.3, 0.95, len(counts))
    covered = []
    for _ in range(400):
        low, high = mean_class_interval(rng.random(len(truth)) < chance[truth], truth, np.arange(len(truth)))
        covered.append(low <= chance.mean() <= high)
    assert 0.92 <= np.mean(covered) <= 0.995


@pytest.mark.parametrize("across", [False, True], ids=["sources of one class", "sources of all classes"])
def test_the_mean_class_interval_covers_the_true_mean_where_videos_of_a_source_are_alike(across: bool) -> None:
    rng = np.random.default_rng(3)
    truth = np.tile(np.repeat(np.arange(4), 5), 40)  # 40 times 5 videos of each of 4 classes
    sources = np.arange(800) // (20 if across else 5)
    covered = []
    for _ in range(400):  # all videos of a source are right, or all are wrong
        right = (rng.random(160) < 0.7)[sources]
        low, high = mean_class_interval(right, truth, sources)
        covered.append(low <= 0.7 <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


def test_one_source_counts_as_one_video_in_the_mean_class_interval() -> None:
    once = mean_class_interval(np.array([True, False]), np.arange(2), np.arange(2))
    copies = mean_class_interval(np.arange(18) < 9, np.arange(18) // 9, np.arange(18) // 9)  # noqa: PLR2004
    assert copies == pytest.approx(once)


def test_the_mean_class_interval_is_never_a_point() -> None:
    for right in (np.ones(12, bool), np.zeros(12, bool), np.eye(1, 12, 3, dtype=bool)[0]):
        low, high = mean_class_interval(right, np.arange(12), np.arange(12))
        assert low < right.mean() < high or (low < high and right.mean() in {low, high})


def test_intervals_of_sources_cover_the_truth_where_their_videos_are_alike() -> None:
    rng, sources = np.random.default_rng(2), np.repeat(np.arange(60), 10)
    covered = []
    for _ in range(200):  # a is right on 7 of 10 sources, on all of their videos; b is right on 6 of 10 videos
        a, b = np.repeat(rng.random(60) < 0.7, 10), rng.random(600) < 0.6
        low, high = accuracy_interval(a, sources)
        difference, lowest, highest = paired_difference(a, b, sources=sources)
        assert lowest <= difference <= highest
        covered.append((low <= 0.7 <= high, lowest <= 0.1 <= highest))
    assert np.mean(covered, axis=0) == pytest.approx(0.94, abs=0.035)
    alone = accuracy_interval(a, np.arange(600))
    assert alone == wilson(int(a.sum()), 600)
    assert high - low > 2 * (alone[1] - alone[0])


@pytest.mark.parametrize(("sources", "accuracy"), [(5, 0.9), (10, 0.9), (20, 0.9), (40, 0.95)])
def test_intervals_of_few_sources_do_not_promise_too_much(sources: int, accuracy: float) -> None:
    rng, numbers = np.random.default_rng(3), np.repeat(np.arange(sources), 10)
    covered = []
    for _ in range(200):
        a, b = (np.repeat(rng.random(sources) < accuracy, 10) for _ in "ab")
        low, high = accuracy_interval(a, numbers)
        _, lowest, highest = paired_difference(a, b, sources=numbers)
        covered.append((low <= accuracy <= high, lowest <= 0 <= highest))
    assert np.mean(covered, axis=0).min() > 0.92


def test_copies_of_a_video_change_no_interval_of_sources() -> None:
    a, b = np.random.default_rng(0).random((2, 30)) < 0.8
    copies = np.repeat(np.arange(30), 10)
    assert accuracy_interval(a[copies], copies)[0] == pytest.approx(
        bootstrap_interval(a.astype(np.float64), [0.0, 1.0])[0]
    )
    assert paired_difference(a[copies], b[copies], sources=copies) == pytest.approx(paired_difference(a, b))


def test_sources_of_one_video_change_nothing() -> None:
    a, b = np.random.default_rng(0).random((2, 90)) < 0.6
    assert paired_difference(a, b, sources=np.random.default_rng(1).permutation(90)) == paired_difference(a, b)


pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60).map(np.array)


@given(pairs)
def test_the_paired_difference_is_that_of_the_accuracies_and_symmetric(pair: np.ndarray) -> None:
    a, b = pair.T
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert low <= difference <= high
    back, back_low, back_high = paired_difference(b, a)
    step = 2 / len(a)  # between the values of a bootstrap where no pair agrees: its draws move an end by one
    assert back == -difference
    assert (back_low, back_high) == pytest.approx((-high, -low), abs=1.01 * step)


def test_equal_policies_do_not_differ_and_pairs_that_agree_narrow_the_interval() -> None:
    a = np.arange(100) < 70
    difference, low, high = paired_difference(a, a)
    assert difference == 0.0
    assert -0.05 < low < 0 < high < 0.05  # agreeing on 100 videos is no certainty
    nested, crossed = a & (np.arange(100) >= 5), np.roll(a, 35)
    assert nested.mean() == 0.65
    widths = [high - low for _, low, high in (paired_difference(a, nested), paired_difference(a, crossed))]
    assert widths[0] < widths[1] / 2


def test_mean_class_accuracy_weighs_classes_not_videos() -> None:
    truth = np.array([0] * 90 + [2] * 10)  # class 1 does not occur
    right = np.array([True] * 90 + [False] * 5 + [True] * 5)
    assert class_means(right, truth).tolist() == [1.0, 0.5]
    low, high = mean_class_interval(right, truth, np.arange(100))
    assert low < 0.75 < high
    assert 0.5 <= low
    assert high <= 1.0


def test_the_interval_of_a_class_draws_whole_sources() -> None:
    videos = pd.DataFrame(
        {"policy": "a", "truth": "x", "prediction": "x", "failed": False, "source": np.arange(90) // 9}
    )
    videos["right"] = videos["source"] < 7  # noqa: PLR2004
    of_sources, of_videos = class_table(videos, "wrong"), class_table(videos.assign(source=np.arange(90)), "wrong")
    assert of_videos.loc[0, ["top1_low", "top1_high"]].tolist() == list(wilson(63, 90))
    low, high = of_sources.loc[0, ["top1_low", "top1_high"]]
    assert low < wilson(7, 10)[0] + 0.05 and wilson(7, 10)[1] - 0.05 < high


def test_intervals_repeat() -> None:
    rng = np.random.default_rng(0)
    a, b, truth = rng.random(80) < 0.8, rng.random(80) < 0.7, rng.integers(0, 4, 80)
    assert paired_difference(a, b) == paired_difference(a, b)
    assert mean_class_interval(a, truth, truth) == mean_class_interval(a, truth, truth)
