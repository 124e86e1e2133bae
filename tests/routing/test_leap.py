"""A leap: one cheap point, and then the point whose answer is worth its cost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from videoadapt.config.cost import point_macs
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError
from videoadapt.evaluation.evaluated import reported_policy
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.decide import decide
from videoadapt.routing.label_rules import Choice, Floats, confidences, outcome_table
from videoadapt.routing.leap_rules import Logistic, answer_features, mean_cost, price_for, worth_most
from videoadapt.routing.policy import NO_STEP, Evidence, Leap, Step, parse_policy

COSTS = np.array([1.0, 0.4, 0.1])
POINTS = ("14", "7", "4")


def answers(clips: int, seed: int) -> Floats:
    """Returns probabilities of 5 classes, from sure to unsure, `(clips, classes)`."""
    draw = np.random.default_rng(seed)
    return draw.dirichlet(np.ones(5), clips) ** draw.uniform(0.2, 4, (clips, 1))


def normalised(values: Floats) -> Floats:
    return values / values.sum(axis=1, keepdims=True)


def leap(price: float, seed: int = 1) -> Leap:
    """Returns a leap from 4 for a model that is right where 4 is sure, and otherwise at dearer points."""
    probabilities = normalised(answers(2_000, seed))
    draw, sure = np.random.default_rng(seed), probabilities.max(1)
    right = draw.random((2_000, 3)) < np.stack([0.9 + 0 * sure, 0.5 + 0.4 * sure, sure], axis=1)
    chances = Logistic.fit(answer_features(confidences(probabilities)), right)
    return Leap("4", POINTS, tuple(COSTS.tolist()), chances, price)


def test_a_clip_pays_for_both_points_and_a_price_saves_cost() -> None:
    chances = np.array([[0.9, 0.8, 0.2], [0.9, 0.9, 0.9], [0.5, 0.4, 0.45]])
    assert worth_most(chances, COSTS, 2, 0.0).tolist() == [0, 0, 0]
    choice = worth_most(chances, COSTS, 2, 0.2)
    assert choice.tolist() == [1, 2, 2]
    assert mean_cost(choice, COSTS, 2) == pytest.approx((0.5 + 0.1 + 0.1) / 3)
    assert worth_most(chances, COSTS, 1, 10.0).tolist() == [1, 1, 1]
    assert worth_most(np.full((1, 3), np.nan), COSTS, 2, 0.2).tolist() == [0]


@pytest.mark.parametrize("wanted", [0.1, 0.3, 0.7, 1.2])
def test_the_price_of_a_cost_is_the_lowest_that_keeps_it(wanted: float) -> None:
    chances = np.random.default_rng(3).random((500, 3))

    def cost(price: float) -> float:
        return mean_cost(worth_most(chances, COSTS, 2, price), COSTS, 2)

    price = price_for(chances, COSTS, 2, wanted)
    assert cost(price) <= wanted
    assert price == 0 or cost(price * (1 - 1e-9)) > wanted
    with pytest.raises(UserError, match="first point alone costs 0.1"):
        price_for(chances, COSTS, 2, 0.05)


def test_unsure_clips_leap_and_sure_ones_stay() -> None:
    policy, probabilities = leap(0.3), normalised(answers(400, 2))
    probabilities[0] = np.nan

    def run(rows: Choice, step: Step) -> dict:
        return dict(confidences(probabilities[rows]))

    evidence = Evidence(len(probabilities), POINTS, views=1)
    together = decide(policy, evidence, run)
    point, sure = together.end, probabilities.max(1)  # step i is point i
    assert point[0] == 0  # no answer, so the costliest point
    stayed = point[1:] == 2
    assert 0.1 < stayed.mean() < 0.9
    assert sure[1:][stayed].min() > sure[1:][~stayed].max() - 0.2


def test_each_clip_is_decided_alone() -> None:
    policy, probabilities = leap(0.3), normalised(answers(50, 4))
    last = np.array([NO_STEP, 2, 0, 1] * 12 + [2, NO_STEP])
    evidence = Evidence(50, POINTS, confidence=confidences(probabilities))
    found = policy.next(evidence, last)
    assert (found[last == NO_STEP] == 2).all() and (found[(last == 0) | (last == 1)] == NO_STEP).all()
    alone = [int(policy.next(evidence.take(np.array([row])), last[[row]])[0]) for row in range(50)]
    assert alone == found.tolist()


def test_a_leap_is_fitted_on_the_label_table_of_a_run(tmp_path: Path) -> None:
    model = ModelConfig(points=POINTS, patch=16, size=224)
    probabilities = np.stack([normalised(answers(300, seed)) for seed in (1, 2, 3)], axis=1)  # (clips, points, classes)
    names = [f"v{i:03}" for i in range(300)]
    table = outcome_table(names, np.zeros(300, np.int64), np.zeros(300, np.int64), probabilities, POINTS)
    (tmp_path / "labels").mkdir()
    table.to_parquet(tmp_path / "labels" / "outcomes.parquet")
    (tmp_path / "labels" / "label.json").write_text('{"source": "holdout", "manifest": "a", "model": "b"}')
    policy = parse_policy("leap:4:cost=0.5", None, model, tmp_path)
    assert isinstance(policy, Leap) and policy == parse_policy("leap:4:cost=0.5", None, model, tmp_path)
    macs = point_macs(model)
    assert policy.costs == tuple(macs[point] / macs["14"] for point in POINTS)
    features = answer_features(confidences(probabilities[:, 2]))
    choice = worth_most(policy.chances(features), np.array(policy.costs), 2, policy.price)
    assert mean_cost(choice, np.array(policy.costs), 2) == pytest.approx(0.5, abs=0.01)
    assert parse_policy(f"leap:4:price={policy.price:.9f}", None, model, tmp_path).record().keys() == {"price"}


@pytest.mark.parametrize("text", ["leap:4", "leap:5:cost=0.4", "leap:4:cost=", "leap:4,7:cost=0.4", "leap:4:0.4"])
def test_other_texts_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leap"):
        parse_policy(text, None, ModelConfig(points=POINTS, patch=16, size=224), tmp_path)


def test_a_leap_needs_labels_and_its_own_points(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `label` first"):
        parse_policy("leap:4:cost=0.4", None, ModelConfig(points=POINTS, patch=16, size=224), tmp_path)
    assert leap(0.25).name == "leap:4:price=0.25"


def test_a_file_gives_back_the_same_leap_and_refuses_anything_else() -> None:
    policy = leap(1 / 3)
    numbers = json.loads(json.dumps(policy.to_json()))
    again = Leap.from_json(policy.name, numbers)
    assert again == policy and again.name == policy.name
    wrong = {"price": "x", "costs": [1.0], "first": "9", "mean": [0.0], "weights": [[float("nan")] * 5] * 3}
    for broken in (None, [1], {}, *(numbers | {key: value} for key, value in wrong.items())):
        with pytest.raises(ValueError, match="the numbers of leap:4:price=0.333333 are no leap's"):
            Leap.from_json(policy.name, broken)
    with pytest.raises(UserError, match="was fitted for the points 14, 7, 4, the model has 14, 4"):
        again.check(TimeSformer(ModelConfig(points=("14", "4"), depth=1, width=16, heads=2)))


def test_the_page_is_about_a_leap_where_there_is_no_assigner() -> None:
    leap_row = {"macs_saved": 0.4, **leap(0.25).record()}
    assert reported_policy({"fixed:14": {}, "leap:4:price=0.25": leap_row, "oracle": {}}) == "leap:4:price=0.25"
