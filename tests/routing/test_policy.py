"""Labels and policies equal a brute-force computation, clip by clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from videoadapt.config.sections import AssignConfig, ModelConfig
from videoadapt.errors import UserError
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.decide import decide
from videoadapt.routing.label_rules import (
    cheapest_sufficient,
    choose_labels,
    last_true,
    outcome_table,
    right_matrix,
    softmax,
)
from videoadapt.routing.policy import (
    Assigned,
    Cascade,
    Evidence,
    Fixed,
    Mixture,
    Oracle,
    Policy,
    Random,
    mix_of,
    parse_policy,
)
from videoadapt.routing.threshold import choose_threshold

POINTS = ("14", "10", "7")
MODEL = ModelConfig(points=POINTS)
COSTS = np.array([195.8, 98.6, 48.1])

rights = st.tuples(st.integers(1, 30), st.integers(1, 4)).flatmap(lambda shape: hnp.arrays(np.bool_, shape))
three = st.integers(1, 40).flatmap(lambda clips: hnp.arrays(np.bool_, (clips, 3)))


@st.composite
def distributions(draw: st.DrawFn, clips: int) -> np.ndarray:
    """Probabilities of three labels from a softmax, some of them 0 or 1."""
    logits = draw(
        hnp.arrays(np.float32, (clips, 3), elements=st.sampled_from([-200.0, -3.0, -1.0, 0.0, 0.5, 2.0, 200.0]))
    )
    return softmax(logits)


@st.composite
def selections(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    right = draw(three)
    return draw(distributions(len(right))), right


# Labels.


@given(rights, st.sampled_from(["longest", "cheapest", "exclude"]))
def test_the_label_is_the_cheapest_right_point(right: np.ndarray, none_right: Any) -> None:
    count = right.shape[1]
    fallback = {"longest": 0, "cheapest": count - 1, "exclude": -1}[none_right]
    expected = [max((p for p in range(count) if row[p]), default=fallback) for row in right]
    assert choose_labels(right, none_right).tolist() == expected


@given(rights)
def test_last_true_is_the_cheapest_or_the_last(flags: np.ndarray) -> None:
    count = flags.shape[1]
    assert last_true(flags).tolist() == [max((p for p in range(count) if row[p]), default=count - 1) for row in flags]


@given(st.data(), st.integers(1, 12), st.floats(0.01, 1.0))
def test_the_cheapest_point_suffices_with_the_wanted_probability(data: st.DataObject, clips: int, level: float) -> None:
    probabilities = data.draw(distributions(clips))
    before = probabilities.copy()
    for row, point in zip(probabilities, cheapest_sufficient(probabilities, level), strict=True):
        enough = [p for p in range(3) if sum(row[:p:-1]) + row[p] >= level]  # from the cheapest up to p
        assert point == max(enough, default=0)
    assert np.array_equal(probabilities, before)


@given(st.data(), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_costs_less_on_any_clip(data: st.DataObject, clips: int, a: float, b: float) -> None:
    probabilities = data.draw(distributions(clips))
    low, high = (COSTS[cheapest_sufficient(probabilities, level)] for level in sorted((a, b)))
    assert (low <= high).all()


def test_a_threshold_that_no_probability_reaches_gives_all_clips_the_costliest_point() -> None:
    sure = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert cheapest_sufficient(sure, 1.0).tolist() == [2, 1]
    assert cheapest_sufficient(sure, 2.0).tolist() == [0, 0]
    assert cheapest_sufficient(sure, 0.0).tolist() == [2, 2]


@given(selections(), st.sampled_from([0.0, 0.05, 0.3]))
def test_the_threshold_loses_no_more_than_the_tolerance(
    selection: tuple[np.ndarray, np.ndarray], tolerance: float
) -> None:
    probabilities, right = selection
    threshold = choose_threshold(probabilities, right, COSTS, tolerance=tolerance)
    choice = cheapest_sufficient(probabilities, threshold)
    lost = right[:, 0].mean() - right[np.arange(len(choice)), choice].mean()
    assert lost <= tolerance + 1e-9


@given(selections(), st.sampled_from([0.0, 0.05, 0.3]))
def test_no_other_threshold_of_the_grid_would_save_more(
    selection: tuple[np.ndarray, np.ndarray], tolerance: float
) -> None:
    probabilities, right = selection
    clips = np.arange(len(right))

    def outcome(threshold: float) -> tuple[float, float]:
        choice = cheapest_sufficient(probabilities, threshold)
        return right[clips, choice].mean(), COSTS[choice].mean()

    _, cost = outcome(choose_threshold(probabilities, right, COSTS, tolerance=tolerance))
    for other in np.arange(0.5, 0.996, 0.005):
        accuracy, saving = outcome(other)
        if accuracy >= right[:, 0].mean() - tolerance:
            assert cost <= saving + 1e-9


def test_a_perfect_assigner_gets_a_threshold_that_saves() -> None:
    right = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=bool)
    labels = choose_labels(right, "longest")
    probabilities = 0.9 * np.eye(3)[labels] + 0.1 / 3
    threshold = choose_threshold(probabilities, right, COSTS, tolerance=0.0)
    assert cheapest_sufficient(probabilities, threshold).tolist() == labels.tolist() == [2, 1, 0, 2]


def test_an_assigner_that_is_always_wrong_gets_a_threshold_that_ignores_it() -> None:
    right = np.array([[True, False, False]] * 4)
    threshold = choose_threshold(np.array([[0.0, 0.0, 1.0]] * 4), right, COSTS, tolerance=0.1)
    assert cheapest_sufficient(np.array([[0.0, 0.0, 1.0]] * 4), threshold).tolist() == [0] * 4


# The table of outcomes.


@st.composite
def outcomes(draw: st.DrawFn) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    clips, classes = draw(st.integers(1, 10)), draw(st.integers(2, 5))
    logits = draw(hnp.arrays(np.float64, (clips, 3, classes), elements=st.integers(-3, 3).map(float)))
    truth = draw(hnp.arrays(np.int64, clips, elements=st.integers(0, classes - 1)))
    probabilities = softmax(logits)
    videos = [f"v{i // 2}" for i in range(clips)]
    return outcome_table(videos, np.arange(clips) % 2, truth, probabilities, POINTS), truth, probabilities


@given(outcomes())
def test_the_table_has_the_outcome_of_each_clip_at_each_point(
    made: tuple[pd.DataFrame, np.ndarray, np.ndarray],
) -> None:
    table, truth, probabilities = made
    assert len(table) == len(truth) * 3
    for i, row in enumerate(table.itertuples()):
        clip, point = divmod(i, 3)
        seen = probabilities[clip, point]
        others = np.delete(seen, truth[clip])
        assert (row.video, row.clip, row.point) == (f"v{clip // 2}", clip % 2, POINTS[point])
        assert (row.truth, row.prediction) == (truth[clip], int(np.argmax(seen)))
        assert row.p_true == seen[truth[clip]]
        assert row.margin == pytest.approx(seen[truth[clip]] - others.max())
        assert row.right == (row.prediction == row.truth)
        assert row.margin <= 0 or row.right
        assert row.margin >= 0 or not row.right


@given(outcomes(), st.randoms())
def test_outcomes_are_read_from_a_table_in_any_order(
    made: tuple[pd.DataFrame, np.ndarray, np.ndarray], random: Any
) -> None:
    table, truth, probabilities = made
    order = list(range(len(table)))
    random.shuffle(order)
    clips, right = right_matrix(table.iloc[order], POINTS)
    prediction = probabilities.argmax(-1)
    assert list(zip(clips["video"], clips["clip"], strict=True)) == [(f"v{i // 2}", i % 2) for i in range(len(truth))]
    assert np.array_equal(right, prediction == truth[:, None])
    _, agrees = right_matrix(table.iloc[order], POINTS, source="teacher")
    assert np.array_equal(agrees, prediction == prediction[:, :1])
    assert agrees[:, 0].all()


@pytest.mark.parametrize("names", [None, np.array(["a", "b", None], dtype=object)])
def test_nan_probabilities_are_right_for_no_class_and_for_no_teacher(names: np.ndarray | None) -> None:
    probabilities = np.full((2, 3, 2), 0.5)  # (clips, points, classes)
    probabilities[0] = np.nan
    table = outcome_table(["u", "v"], np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64), probabilities, POINTS)
    if names is not None:  # as `label` writes it
        table = table.assign(**{column: names[table[column]] for column in ("truth", "prediction")})
    for source in ("train", "teacher"):
        assert right_matrix(table, POINTS, source=source)[1].tolist() == [[False] * 3, [True] * 3]


def test_labels_from_the_teacher_need_no_truth() -> None:
    probabilities = softmax(np.random.default_rng(0).normal(size=(6, 3, 4)))
    tables = [
        outcome_table(list("abcdef"), np.zeros(6, dtype=np.int64), truth, probabilities, POINTS)
        for truth in (np.zeros(6, dtype=np.int64), np.arange(6) % 4)
    ]
    a, b = (right_matrix(table, POINTS, source="teacher")[1] for table in tables)
    assert np.array_equal(a, b)


def test_a_table_without_some_points_is_refused_and_the_error_names_them() -> None:
    probabilities = np.full((2, 1, 3), 1 / 3)
    table = outcome_table(["a", "b"], np.array([0, 0]), np.array([0, 1]), probabilities, ["14"])
    with pytest.raises(UserError, match="no outcomes for the points 10, 7"):
        right_matrix(table, POINTS)


def test_a_table_of_more_points_serves_fewer() -> None:
    probabilities = softmax(np.random.default_rng(0).normal(size=(5, 3, 4)))
    table = outcome_table(list("abcde"), np.zeros(5, dtype=np.int64), np.arange(5) % 4, probabilities, POINTS)
    assert np.array_equal(right_matrix(table, ("14", "7"))[1], right_matrix(table, POINTS)[1][:, [0, 2]])


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32)))
def test_softmax_adds_to_one_and_is_torchs(logits: np.ndarray) -> None:
    found = softmax(logits)
    assert found.dtype == np.float64
    assert np.allclose(found.sum(-1), 1)
    assert np.allclose(found, torch.from_numpy(logits).double().softmax(-1).numpy())


# Policies.


def test_a_fixed_policy_gives_every_clip_its_point() -> None:
    assert Fixed("10").choose(Evidence(4, POINTS)).tolist() == [1] * 4
    assert Fixed("10").name == "fixed:10"
    with pytest.raises(UserError, match="fixed:8: the model has no point 8; this model has the points 14, 10, 7"):
        Fixed("8").choose(Evidence(4, POINTS))


@given(hnp.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 2)), st.integers(0, 3))
def test_random_has_exactly_the_mix_of_the_policy_that_it_imitates(choice: np.ndarray, seed: int) -> None:
    drawn = Random(mix_of(choice, 3), seed).choose(Evidence(len(choice), POINTS))
    assert np.bincount(drawn, minlength=3).tolist() == np.bincount(choice, minlength=3).tolist()


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(0, 500))
def test_random_with_any_mix_is_within_one_clip_of_it(fractions: list[float], clips: int) -> None:
    assume(sum(fractions) > 0.01)
    drawn = Random(tuple(fractions)).choose(Evidence(clips, POINTS))
    assert len(drawn) == clips
    wanted = np.array(fractions) / sum(fractions) * clips
    assert (abs(np.bincount(drawn, minlength=3) - wanted) <= 1 + 1e-9).all()


def test_random_reads_no_evidence_and_repeats_with_its_seed() -> None:
    mix = (0.2, 0.3, 0.5)
    first, again, other = (Random(mix, seed).choose(Evidence(100, POINTS)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    half = first[:50]
    assert 0 < (half == 2).sum() < 50  # mixed, not sorted


@given(three)
def test_the_oracle_is_the_cheapest_among_the_choices_that_are_right(right: np.ndarray) -> None:
    choice = Oracle().choose(Evidence(len(right), POINTS, right=right))
    for row, chosen in zip(right, choice, strict=True):
        best = [p for p in range(3) if row[p] == row.any()]  # of no right point all are as good
        assert COSTS[chosen] == COSTS[best].min()


@given(three, st.data())
def test_no_policy_is_more_often_right_than_the_oracle(right: np.ndarray, data: st.DataObject) -> None:
    clips = np.arange(len(right))
    choice = data.draw(hnp.arrays(np.int64, len(right), elements=st.integers(0, 2)))
    oracle = Oracle().choose(Evidence(len(right), POINTS, right=right))
    assert right[clips, oracle].sum() >= right[clips, choice].sum()


def test_the_oracle_needs_the_truth() -> None:
    with pytest.raises(UserError, match="videoadapt evaluate"):
        decide(Oracle(), Evidence(3, POINTS), lambda _rows, _step: {})


@given(st.data(), st.integers(1, 10))
def test_the_assigned_policy_follows_the_assigner_at_its_threshold(data: st.DataObject, clips: int) -> None:
    probabilities = data.draw(distributions(clips))
    choice = Assigned(ASSIGNER, POINTS, 0.7).choose(Evidence(clips, POINTS, probabilities))
    assert np.array_equal(choice, cheapest_sufficient(probabilities, 0.7))


ASSIGNER = Assigner(AssignConfig(frames=1, size=32, channel_multiplier=0.25, stages=1), 3)


def test_mix_of_is_the_fraction_of_clips_at_each_point() -> None:
    assert mix_of(np.array([0, 0, 2, 0]), 3) == (0.75, 0.0, 0.25)
    assert mix_of(np.array([], dtype=np.int64), 3) == (0.0, 0.0, 0.0)


def test_policies_by_name() -> None:
    assigned = Assigned(ASSIGNER, POINTS)
    assert parse_policy("fixed:10", None, MODEL) == Fixed("10")
    assert parse_policy("fixed:10@1.0", None, MODEL) == Fixed("10")
    assert parse_policy("assigned", assigned, MODEL) is assigned
    assert parse_policy("assigned:0.9", assigned, MODEL) == replace(assigned, threshold=0.9, text="assigned:0.9")
    mixture = parse_policy("mixture:14,7@1.0:0.25", None, MODEL)
    assert mixture == Mixture(("14", "7"), 0.25)
    assert mixture.name == "mixture:14,7:0.25"


@pytest.mark.parametrize(
    "text",
    ["", "fixed", "fixed:8", "fixed:", "oracle", "random", "assigned:14", "Assigned", "mixture:14,7", "mixture:14:0.5"],
)
def test_the_error_of_an_unknown_policy_lists_the_known_ones(text: str) -> None:
    with pytest.raises(
        UserError,
        match=r"expected assigned, cascade:POINTS:\[views:\]THRESHOLDS, leap:POINT:cost=0.4, fixed:POINT, mixture:.* "
        "the points 14, 10, 7$",
    ):
        parse_policy(text, Assigned(ASSIGNER, POINTS), MODEL)


def test_the_error_of_assigned_without_an_assigner_names_the_verb() -> None:
    with pytest.raises(UserError, match="run `videoadapt label` and `videoadapt assign` first"):
        parse_policy("assigned", None, MODEL)


@pytest.mark.parametrize(
    ("policy", "text", "largest"),
    [
        (Fixed("10"), "fixed:10", 2),
        (Mixture(("14", "7"), 1 / 3), "mixture:14,7:0.3333333333333333", 4),
        (Oracle(), "oracle", 4),
        (Cascade(("7", "14"), (0.1 + 0.2,), text="7,14:cost=0.5"), "cascade:7,14:0.30000000000000004:probability", 7),
        (Cascade(("7",), (0.9,), "margin", views=True), "cascade:7:views:0.9:margin", 7),
    ],
)
def test_a_policy_is_written_with_all_its_numbers_and_knows_its_largest_cost(
    policy: Policy, text: str, largest: int
) -> None:
    assert policy.written() == text
    assert policy.largest_cost([4, 2, 1], POINTS) == largest


def test_only_the_assigned_policy_pays_for_an_assigner() -> None:
    assert [p.assigner for p in (Fixed("14"), Random((1.0,)), Oracle())] == [None] * 3
    assert Assigned(ASSIGNER, POINTS).assigner is ASSIGNER
