"""Cascades clip by clip: which clips go on, what they cost, and thresholds fitted to a mean cost."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.config.cost import point_macs
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError
from videoadapt.evaluation.outcomes import pareto_front
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.decide import Decision, clip_macs, decide, views_run
from videoadapt.routing.label_rules import Choice, confidence, confidence_matrix, fit_threshold, outcome_table, softmax
from videoadapt.routing.policy import Cascade, Evidence, Fixed, Policy, Step, parse_cascade
from videoadapt.routing.router import Router

GRID = ("14", "12", "14@0.7", "8@0.5")
MODEL = ModelConfig(points=GRID, num_frames=1, temporal=False)
MACS = point_macs(MODEL)
COSTS = np.array([MACS[point] / MACS["8@0.5"] for point in GRID])
CASCADE = ("8@0.5", "12", "14")
sure = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 30), st.just(4)), elements=st.floats(0, 1, width=16) | st.just(np.nan)
)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6))
def test_confidences_are_between_0_and_1_and_follow_their_definitions(logits: list[float]) -> None:
    p = softmax(np.array(logits))
    best, second = sorted(p, reverse=True)[:2]
    assert confidence(p, "probability") == best
    assert confidence(p, "margin") == pytest.approx(best - second)
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    assert confidence(p, "entropy") == pytest.approx(1 - entropy / math.log(len(p)), abs=1e-9)
    for measure in MEASURES:
        assert -1e-9 <= confidence(p, measure) <= 1
        assert confidence(np.eye(3), measure) == pytest.approx([1, 1, 1])
    assert confidence(np.full(4, 0.25), "margin") == 0
    assert confidence(np.full(4, 0.25), "entropy") == pytest.approx(0)


def decided(policy: Policy, confidences: np.ndarray) -> Decision:
    """The decision on clips of stored confidences `(clips, points of GRID)`."""

    def stored(rows: Choice, step: Step) -> dict[Measure, np.ndarray]:
        return {measure: confidences[rows, step.point] for measure in MEASURES}

    return decide(policy, Evidence(len(confidences), GRID, views=3), stored)


def ends(policy: Policy, confidences: np.ndarray) -> Choice:
    """The points where these clips end."""
    return decided(policy, confidences).points


def costs_of(policy: Policy, confidences: np.ndarray) -> np.ndarray:
    """The MACs of these clips, of 3 crops each."""
    ran = views_run(policy, decided(policy, confidences), len(GRID), clips=1, crops=3)
    macs, assigner = clip_macs(policy, ran, MODEL)
    assert assigner == 0
    return macs


@given(sure, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_clip_ends_at_the_first_sure_point_and_pays_for_all_points_before(
    confidences: np.ndarray, thresholds: tuple[float, float]
) -> None:
    policy = Cascade(CASCADE, thresholds, "margin")
    choice, costs = ends(policy, confidences), costs_of(policy, confidences)
    for row, chosen, cost in zip(confidences, choice, costs, strict=True):
        ran = ["8@0.5"]
        if not row[3] >= thresholds[0]:  # so that NaN goes on
            ran.append("12")
            if not row[1] >= thresholds[1]:
                ran.append("14")
        assert GRID[chosen] == ran[-1]
        assert cost == 3 * sum(MACS[point] for point in ran)
    assert (costs_of(Fixed("12"), confidences) == 3 * MACS["12"]).all()


def test_a_nan_confidence_is_never_sure() -> None:
    nan = np.nan
    confidences = np.array([[0.9, 0.9, 0.9, nan], [0.9, nan, 0.9, nan], [nan, nan, nan, nan], [nan, nan, nan, 0.9]])
    assert ends(Cascade(CASCADE, (0.5, 0.5)), confidences).tolist() == [1, 0, 0, 3]
    assert ends(Cascade(CASCADE, (0.0, 0.0)), confidences).tolist() == [1, 0, 0, 3]  # not even at threshold 0


def test_a_fitted_threshold_counts_clips_of_nan_as_going_on() -> None:
    along = np.array([[0.2, 0.0], [0.4, 0.0], [0.6, 0.0], [np.nan, 0.0]])
    costs = np.array([1.0, 2.0])
    assert fit_threshold(along, costs, 2.0) == 0.4  # the clips of 0.2 and NaN go on: 1 + 2 * 2 / 4
    assert fit_threshold(along, costs, 1.5) == 0.2
    assert fit_threshold(along, costs, 3.0) == 2.0
    with pytest.raises(UserError, match=r"first point alone costs 1\.5, which is more than cost=1\.4"):
        fit_threshold(along, costs, 1.4)


@given(sure, st.floats(1.0, 8.0))
def test_a_fitted_threshold_is_the_highest_within_the_mean_cost(confidences: np.ndarray, mean_cost: float) -> None:
    numbers = [GRID.index(point) for point in CASCADE]
    along, costs = confidences[:, numbers], COSTS[numbers]

    def cost(threshold: float) -> float:
        policy = Cascade(CASCADE, (threshold, threshold))
        return float(costs_of(policy, confidences).mean()) / 3 / MACS["8@0.5"]

    least = cost(0.0)  # clips of NaN go on at every threshold
    if least > mean_cost:
        with pytest.raises(UserError, match="first point alone costs"):
            fit_threshold(along, costs, mean_cost)
        return
    threshold = fit_threshold(along, costs, mean_cost)
    assert cost(threshold) <= mean_cost + 1e-9
    higher = [value for value in [*along[:, :-1].ravel(), 2.0] if value > threshold]
    assert all(cost(value) > mean_cost - 1e-9 for value in higher)


def test_a_mean_cost_below_that_of_the_first_point_is_refused() -> None:
    with pytest.raises(UserError, match=r"first point alone costs 0\.5, which is more than cost=0\.4"):
        fit_threshold(np.zeros((3, 2)), np.array([0.5, 1.0]), 0.4)


def test_cascades_by_name() -> None:
    assert parse_cascade("8@0.5,14@0.7:0.6", MODEL, None) == Cascade(("8@0.5", "14@0.7"), (0.6,))
    three = parse_cascade("8@.5,12,14:0.6,0.8:entropy", MODEL, None)
    assert three == Cascade(("8@0.5", "12", "14"), (0.6, 0.8), "entropy")
    assert three.name == "cascade:8@.5,12,14:0.6,0.8:entropy"  # as written
    assert parse_cascade("8@0.5,12,14:0.6", MODEL, None).thresholds == (0.6, 0.6)


@pytest.mark.parametrize(
    "text", ["", "14:0.5", "8@0.5,14", "8@0.5,14:", "8@0.5,14:high", "8@0.5,10:0.5", "14,14:0.5", "8@0.5,14:0.5:luck"]
)
def test_a_wrong_cascade_is_refused_and_the_error_lists_the_points(text: str) -> None:
    with pytest.raises(UserError, match=r"expected (POINT,POINT.*14, 12, 14@0\.7, 8@0\.5|LENGTH or LENGTH@KEEP)"):
        parse_cascade(text, MODEL, None)


def test_a_threshold_that_nothing_reaches_can_be_written() -> None:
    never = fit_threshold(np.ones((3, 2)), np.array([0.5, 1.0]), 1.5)  # the cost pays for all points
    cascade = Cascade(("8@0.5", "14"), (never,))
    assert parse_cascade(cascade.written().removeprefix("cascade:"), MODEL, None) == cascade
    sure = Cascade(("8@0.5", "14"), (1 - 3e-14,))
    assert parse_cascade(sure.written().removeprefix("cascade:"), MODEL, None) == sure
    with pytest.raises(UserError, match="thresholds from 0 to 1"):
        parse_cascade("8@0.5,14:1.5", MODEL, None)


@pytest.mark.parametrize("measure", MEASURES)
def test_confidences_of_equal_probabilities_and_of_one_class_are_between_0_and_1(measure: Measure) -> None:
    assert all(confidence(np.full((1, classes), 1 / classes), measure) >= 0 for classes in range(1, 402, 4))
    assert confidence(np.array([[1.0], [np.nan]]), measure) == pytest.approx([1, np.nan], nan_ok=True)


def test_too_many_thresholds_are_refused() -> None:
    with pytest.raises(UserError, match="expected 1 threshold or 2, got 3"):
        parse_cascade("8@0.5,12,14:0.1,0.2,0.3", MODEL, None)


def test_a_cascade_is_fitted_on_the_label_table_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `label` first"):
        parse_cascade("8@0.5,14:cost=0.5", MODEL, tmp_path)
    probabilities = softmax(3 * np.random.default_rng(0).normal(size=(200, 4, 5)))
    table = outcome_table(
        [f"v{i:03}" for i in range(200)], np.zeros(200, np.int64), np.zeros(200, np.int64), probabilities, GRID
    )
    (tmp_path / "labels").mkdir()
    table.to_parquet(tmp_path / "labels" / "outcomes.parquet")
    for measure in MEASURES:
        expected = confidence(probabilities, measure)[:, [3, 0]]
        np.testing.assert_allclose(confidence_matrix(table, ("8@0.5", "14"), measure), expected)
        fitted = parse_cascade(f"8@0.5,14:cost=0.5:{measure}", MODEL, tmp_path)
        macs = point_macs(MODEL)
        goes_on = (expected[:, 0] < fitted.thresholds[0]).mean()
        assert goes_on == pytest.approx(0.5 - macs["8@0.5"] / macs["14"], abs=1 / 200)
    with pytest.raises(UserError, match="has no confidences at 12"):
        confidence_matrix(table[table["point"] != "12"], ("12", "14"), "margin")
    old: pd.DataFrame = table.drop(columns="confidence_margin")
    with pytest.raises(UserError, match="has no confidences at 12, 14; run `label` again"):
        confidence_matrix(old, ("12", "14"), "margin")


@pytest.mark.parametrize("measure", MEASURES)
def test_clips_that_go_on_fill_new_batches_and_each_answer_is_that_of_its_last_point(measure: Measure) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        width=16, depth=2, heads=2, patch=4, size=16, num_frames=1, temporal=False, num_classes=4,
        points=("4", "4@0.5", "2"), drop_blocks=(1,), init_std=0.5,
    )  # fmt: skip
    model = TimeSformer(config).eval()
    views = torch.randint(0, 256, (23, 2, 3, 1, 16, 16), dtype=torch.uint8)
    every = np.stack([Router(model, Fixed(point), batch=7).run(views).logits for point in config.points], axis=1)
    confidences = confidence(softmax(every).mean(2), measure)  # (clips, points)
    # Between two clips: other batches round differently.
    thresholds = tuple(float(np.sort(confidences[:, point])[10:12].mean()) for point in (2, 1))
    policy = Cascade(("2", "4@0.5", "4"), thresholds, measure)
    batches: list[tuple[str, int]] = []
    model.register_forward_pre_hook(lambda _module, given: batches.append((given[1], len(given[0]))))
    routed = Router(model, policy, batch=8).run(views)
    assert set(routed.choice) == {0, 1, 2}
    expected = decide(
        policy,
        Evidence(23, config.points, views=2),
        lambda rows, step: dict.fromkeys(MEASURES, confidences[rows, step.point]),
    )
    assert routed.choice.tolist() == expected.points.tolist()
    assert np.array_equal(routed.decision.ran, expected.ran)
    np.testing.assert_allclose(routed.logits, every[np.arange(23), routed.choice], rtol=1e-4, atol=1e-5)
    ran = {"2": 23, "4@0.5": int((routed.choice != 2).sum()), "4": int((routed.choice == 0).sum())}
    for point, clips in ran.items():
        sizes = [size for name, size in batches if name == point]
        assert sum(sizes) == 2 * clips
        assert all(size == 8 for size in sizes[:-1])


def test_a_cascade_ends_early_where_all_clips_are_sure() -> None:
    config = ModelConfig(width=16, depth=1, heads=2, patch=4, size=16, num_frames=1, temporal=False, points=("4", "2"))
    views = torch.zeros((3, 1, 3, 1, 16, 16), dtype=torch.uint8)
    routed = Router(TimeSformer(config).eval(), Cascade(("2", "4"), (0.0,)), batch=8).run(views)
    assert routed.choice.tolist() == [1, 1, 1]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_pareto_front_holds_the_policies_that_no_other_beats(policies: list[tuple[int, int]]) -> None:
    front = pareto_front([c for c, _ in policies], [a for _, a in policies])
    assert any(front)
    for (cost, accuracy), on in zip(policies, front, strict=True):
        beaten = [(c, a) for c, a in policies if c <= cost and a >= accuracy and (c, a) != (cost, accuracy)]
        assert on == (not beaten)
