"""Cascades over views: which views run, what they cost, and that the answer is that of the views that ran."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import videoadapt as va
from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.config.cost import point_macs
from videoadapt.config.load import make_config
from videoadapt.config.sections import Average, EvaluateConfig, ModelConfig
from videoadapt.config.views import clip_order, view_order
from videoadapt.errors import UserError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.decide import Decision, clip_ends, clip_macs, decide, views_run
from videoadapt.routing.label_rules import Choice, Floats, confidences, running_answers, softmax
from videoadapt.routing.policy import NO_STEP, Cascade, Evidence, Fixed, Policy, Step
from videoadapt.routing.replay import answers, points_in_answer
from videoadapt.routing.router import Router
from videoadapt.routing.scores import Scored

POINTS = ("4", "3", "2")
CONFIG = ModelConfig(width=16, depth=2, heads=2, patch=4, size=16, num_frames=2, num_classes=5, points=POINTS)
MACS = point_macs(CONFIG)
PROTOCOLS = [(1, 3), (10, 3), (4, 1)]  # clips x crops; the first two are those of Kinetics


def test_views_run_from_the_middle_outwards() -> None:
    assert view_order(1, 1) == [0]
    assert view_order(1, 3) == [1, 0, 2]
    assert view_order(3, 3) == [4, 3, 5, 1, 0, 2, 7, 6, 8]
    assert clip_order(4, 2) == [1, 1, 2, 2, 0, 0, 3, 3]


@given(st.integers(1, 12), st.integers(1, 5))
def test_every_view_runs_once_and_the_clips_one_after_the_other(clips: int, crops: int) -> None:
    order = view_order(clips, crops)
    assert sorted(order) == list(range(clips * crops))
    assert order[0] == (clips - 1) // 2 * crops + (crops - 1) // 2
    assert [order[i] // crops for i in range(0, len(order), crops)] == [
        order[i + crops - 1] // crops for i in range(0, len(order), crops)
    ]
    middle = [abs(2 * (view % crops) - crops + 1) for view in order[:crops]]
    assert middle == sorted(middle)


def on_stored(policy: Policy, logits: Floats, average: Average = "probabilities") -> Decision:
    """The decision on stored logits `(videos, views in the order in which they run, points, classes)`."""
    found = {measure: values for measure, values in confidences(running_answers(logits, average)).items()}

    def stored(rows: Choice, step: Step) -> dict[Measure, Floats]:
        return {measure: values[rows, step.stop - 1, step.point] for measure, values in found.items()}

    return decide(policy, Evidence(len(logits), POINTS, views=logits.shape[1]), stored)


def shard_of(logits: Floats) -> Scored:
    """Scores of `(videos, clips, crops, points, classes)`."""
    videos, clips = logits.shape[:2]
    rows = np.repeat(np.arange(videos), clips)
    return Scored(rows, np.tile(np.arange(clips), videos), np.zeros_like(rows), logits.reshape(-1, *logits.shape[2:]))


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.just(3), st.just(4))
stored_logits = shapes.flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-30, 30, width=32) | st.just(np.nan))
)


@given(stored_logits, st.sampled_from(POINTS), st.sampled_from(MEASURES), st.sampled_from(["probabilities", "logits"]))
def test_threshold_0_is_the_centre_view_and_above_1_the_fixed_point_to_the_bit(
    logits: Floats, point: str, measure: Measure, average: Average
) -> None:
    videos, clips, crops = logits.shape[:3]
    views, number, shard = {"clips": clips, "crops": crops}, POINTS.index(point), shard_of(logits)
    in_order = shard.by_video()

    def answered(policy: Policy, decision: Decision) -> Floats:
        return answers(shard, np.arange(videos), points_in_answer(policy, decision, **views), average)

    every = Cascade((point,), (2.0,), measure, views=True)
    decision = on_stored(every, in_order, average)
    fixed = decide(Fixed(point), Evidence(videos * clips, POINTS, views=crops), lambda _rows, _step: {})
    assert (decision.stops == clips * crops).all()
    np.testing.assert_array_equal(answered(every, decision), answered(Fixed(point), fixed))
    np.testing.assert_array_equal(answered(every, decision), running_answers(in_order, average)[:, -1, number])
    costs = [
        clip_macs(policy, views_run(policy, decided, 3, **views), CONFIG)[0]
        for policy, decided in ((every, decision), (Fixed(point), fixed))
    ]
    assert costs[0].tolist() == costs[1].tolist() == [crops * MACS[point]] * (videos * clips)

    centre = Cascade((point,), (0.0,), measure, views=True)
    decision = on_stored(centre, in_order, average)
    usable = ~np.isnan(in_order[:, 0, number]).any(-1)
    assert (decision.stops[usable] == 1).all()
    # A mean with a NaN is NaN, so a video whose centre view is lost runs all its views.
    assert (decision.stops[~usable] == clips * crops).all()
    np.testing.assert_array_equal(
        answered(centre, decision)[usable], softmax(logits[usable, (clips - 1) // 2, (crops - 1) // 2, number])
    )


@given(st.sampled_from(PROTOCOLS), st.integers(0, 99), st.floats(0.2, 1.0), st.floats(0.2, 1.0))
def test_a_video_pays_for_the_views_that_it_needed(protocol: tuple[int, int], seed: int, a: float, b: float) -> None:
    clips, crops = protocol
    count = clips * crops
    logits = np.random.default_rng(seed).normal(0, 2, (6, clips, crops, 3, 4)).astype(np.float32)
    policy = Cascade(("2", "4"), (a, b), views=True)
    shard = shard_of(logits)
    decision = on_stored(policy, shard.by_video())
    ran = views_run(policy, decision, 3, clips=clips, crops=crops)
    macs = clip_macs(policy, ran, CONFIG)[0].reshape(6, clips)
    ends = clip_ends(policy, decision, clips=clips, crops=crops).reshape(6, clips)
    sure = confidences(running_answers(shard.by_video(), "probabilities"))["probability"]  # (videos, views, points)
    for video in range(6):
        wanted = [v for v in range(count) if sure[video, v, 0] >= b]
        stop = min([*wanted, count - 1]) + 1
        at_cheap = sure[video, 0, 2] >= a
        assert macs[video].sum() == MACS["2"] + (0 if at_cheap else stop * MACS["4"])
        # The middle clip has the first view; a clip without a view that ran costs nothing.
        assert macs[video, (clips - 1) // 2] >= MACS["2"]
        clips_run = 1 if at_cheap else -(-stop // crops)
        assert (macs[video] > 0).sum() == (ends[video] >= 0).sum() == clips_run
        assert set(ends[video]) <= ({2, -1} if at_cheap else {0, -1})


@cache
def model() -> TimeSformer:
    torch.manual_seed(0)
    return TimeSformer(CONFIG.model_copy(update={"init_std": 0.4})).eval()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("points", "measure", "views"),
    [
        (("4",), "probability", True),
        (("2", "4"), "probability", True),
        (("2", "3", "4"), "margin", True),
        (("4", "2"), "entropy", True),
        (("2", "4"), "probability", False),
    ],
)
def test_the_model_is_asked_for_what_stored_answers_decide(
    protocol: tuple[int, int], points: tuple[str, ...], measure: Measure, views: bool
) -> None:
    clips, crops = protocol
    videos, count = 7, clips * crops
    shape = (videos, clips, crops, 3, 2, 16, 16)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    in_order = pixels.flatten(1, 2)[:, view_order(clips, crops)]  # (videos, views, C, T, S, S)
    every = np.stack([Router(model(), Fixed(p), batch=64).run(in_order).logits for p in POINTS], axis=2)
    # Thresholds that lie between the confidences of the videos, so that some end and others go on.
    first = confidences(running_answers(every, "probabilities"))[measure][:, 0 if views else -1]  # (videos, points)
    between = tuple(float(np.quantile(first[:, POINTS.index(point)], 0.4)) for point in points)
    policy = Cascade(points, between if views else between[:-1], measure, views=views)
    if views:
        expected = on_stored(policy, every)
    else:  # here a unit is a clip of `count` crops
        stored = confidences(softmax(every).mean(1))[measure]  # (videos, points)
        evidence = Evidence(videos, POINTS, views=count)
        expected = decide(policy, evidence, lambda rows, step: dict.fromkeys(MEASURES, stored[rows, step.point]))
    assert len(set(expected.end.tolist())) > 1
    seen: list[tuple[str, int]] = []
    handle = model().register_forward_pre_hook(lambda _module, given: seen.append((given[1], len(given[0]))))
    routed = Router(model(), policy, batch=8).run(pixels if views else in_order)
    handle.remove()
    assert routed.decision.end.tolist() == expected.end.tolist()
    assert np.array_equal(routed.decision.ran, expected.ran)
    for video, (point, stop) in enumerate(zip(expected.points, expected.stops, strict=True)):
        np.testing.assert_allclose(routed.logits[video, :stop], every[video, :stop, point], rtol=1e-4, atol=1e-5)
    # The model runs as many views as are paid for.
    of_unit = {"clips": clips, "crops": crops} if views else {"clips": 1, "crops": count}
    paid = views_run(policy, expected, 3, **of_unit).sum(0)
    assert [sum(size for name, size in seen if name == point) for point in POINTS] == paid.tolist()


def frames(videos: int) -> list[np.ndarray]:
    return list(np.random.default_rng(2).integers(0, 256, (videos, 12, 24, 40, 3), dtype=np.uint8))


def test_a_prediction_over_views_equals_the_fixed_point_or_the_centre_view() -> None:
    views = EvaluateConfig(temporal_views=3, spatial_crops=3, batch=1)  # one view a batch: equal bits

    def predicted(policy: str | Policy, evaluate: EvaluateConfig = views) -> va.Predictions:
        return va.predict(model(), frames(4), policy, fps=25.0, evaluate=evaluate, progress=False)

    every, fixed = predicted(Cascade(("4",), (2.0,), views=True)), predicted("fixed:4")
    for cascade, all_views in zip(every, fixed, strict=True):
        assert (cascade.classes, cascade.probabilities) == (all_views.classes, all_views.probabilities)
        assert (cascade.macs, cascade.views, cascade.points) == (9 * MACS["4"], 9, ("4",))
        assert (all_views.macs, all_views.views, all_views.points) == (cascade.macs, 9, ("4",) * 3)
    one = EvaluateConfig(temporal_views=3, spatial_crops=1, batch=1)
    middle = predicted(Cascade(("4",), (0.0,), views=True), one)
    for first, wide in zip(middle, predicted("cascade:4:views:0"), strict=True):
        assert first.probabilities == wide.probabilities  # the centre crop of the middle clip
        assert (wide.macs, wide.views) == (MACS["4"], 1)


def test_a_video_of_one_view_is_refused() -> None:
    with pytest.raises(UserError, match=r"cascade:4:views:0\.9: goes over the views of a video, which has one; raise"):
        va.predict(model(), frames(1), "cascade:4:views:0.9", fps=25.0, evaluate=EvaluateConfig(spatial_crops=1))
    config = {"model": {"points": ["14", "7"]}, "evaluate": {"spatial_crops": 1, "cascade": "14:views:0.9"}}
    with pytest.raises(UserError, match=r"'14:views:0\.9': goes over the views of a video, which has one; raise"):
        make_config(config)


def test_next_may_be_called_on_any_units_in_any_state() -> None:
    """As a queue does, whose clips are at different steps."""
    policy = Cascade(("2", "4"), (0.5, 0.7), views=True)
    last = np.array([NO_STEP, 0, 0, 1, 1, 3, 3, 2])
    sure = np.array([np.nan, 0.5, 0.4, 0.7, 0.6, 0.9, 0.1, np.nan])
    evidence = Evidence(8, POINTS, confidence={"probability": sure}, views=3)
    following = policy.next(evidence, last)
    assert following.tolist() == [0, NO_STEP, 1, NO_STEP, 2, NO_STEP, NO_STEP, 3]
    for row in range(8):
        alone = np.array([row])
        assert policy.next(evidence.take(alone), last[alone]).tolist() == [following[row]]
    assert policy.steps(POINTS, 3) == (Step(2, 0, 1), Step(0, 0, 1), Step(0, 1, 2), Step(0, 2, 3))
    assert Fixed("3").next(Evidence(2, POINTS), np.array([NO_STEP, 1])).tolist() == [1, NO_STEP]
