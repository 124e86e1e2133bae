"""Routing gives every clip the result that it has alone at its point, in the order of the clips."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor

from videoadapt.config.sections import AssignConfig, ModelConfig
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.clips.views import normalise, pixel_draws, preprocess
from videoadapt.errors import UserError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.label_rules import Choice, cheapest_sufficient, last_true
from videoadapt.routing.policy import Assigned, Evidence, Fixed, Mixture, OnePointPolicy, Oracle, Policy, Random
from videoadapt.routing.router import Router, assign_probabilities

CONFIG = ModelConfig(
    width=16, depth=2, heads=2, patch=4, size=16, num_frames=2, num_classes=5, points=("4", "3", "2"), init_std=0.3
)
CLIPS, CROPS = 11, 2


@cache
def model() -> TimeSformer:
    torch.manual_seed(0)
    return TimeSformer(CONFIG).eval()


@cache
def views() -> Tensor:
    shape = (CLIPS, CROPS, 3, 2, 16, 16)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@cache
def thumbnails() -> Tensor:
    shape = (CLIPS, 3, 2, 32, 32)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@cache
def assigner() -> Assigner:
    torch.manual_seed(3)
    made = Assigner(AssignConfig(frames=2, size=32, channel_multiplier=0.25, stages=1), 3)
    made.train()(thumbnails())
    made.eval()
    with torch.no_grad():  # decisions that differ from clip to clip
        made.head.weight.mul_(3 / made(thumbnails()).std(0)[:, None])
        made.head.bias.sub_(made(thumbnails()).mean(0))
    return made


@cache
def alone() -> np.ndarray:
    """Logits `(clips, crops, points, classes)`, each view run by itself."""
    logits = torch.empty(CLIPS, CROPS, 3, 5)
    with torch.inference_mode():
        for clip in range(CLIPS):
            for crop in range(CROPS):
                view = normalise(views()[clip, crop][None], CONFIG.mean, CONFIG.std, torch.float32)
                for number, point in enumerate(CONFIG.points):
                    logits[clip, crop, number] = model()(view, point)[0]
    return logits.numpy()


class Given(OnePointPolicy):
    """A policy with a choice that the test gives."""

    name = "given"
    needs = frozenset({"population"})

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def choose(self, evidence: Evidence) -> Choice:
        return self.choice


def expected(choice: Choice) -> np.ndarray:
    return alone()[np.arange(CLIPS), :, choice]


def test_results_differ_between_points_and_clips_so_that_a_mistake_shows() -> None:
    flat = alone().reshape(-1, 5)
    gaps = [abs(a - b).max() for i, a in enumerate(flat) for b in flat[:i]]
    assert min(gaps) > 1e-3


@settings(max_examples=40)
@given(hnp.arrays(np.int64, CLIPS, elements=st.integers(0, 2)), st.integers(1, 30))
def test_routed_results_are_those_of_each_clip_alone_in_order(choice: np.ndarray, batch: int) -> None:
    routed = Router(model(), Given(choice), batch=batch).run(views())
    assert np.array_equal(routed.choice, choice)
    assert routed.logits.dtype == np.float32
    assert np.allclose(routed.logits, expected(choice), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_every_policy_is_routed_by_what_it_chooses(batch: int) -> None:
    right = np.random.default_rng(0).random((CLIPS, 3)) < 0.5
    probabilities = assign_probabilities(assigner(), thumbnails())
    policies: list[tuple[Policy, Choice]] = [
        (Fixed("3"), np.full(CLIPS, 1)),
        (Random((0.5, 0.2, 0.3), seed=4), Random((0.5, 0.2, 0.3), seed=4).choose(Evidence(CLIPS, CONFIG.points))),
        (Oracle(), last_true(right)),
        (Assigned(assigner(), CONFIG.points, 0.7), cheapest_sufficient(probabilities, 0.7)),
    ]
    assert len(set(policies[-1][1].tolist())) > 1
    for policy, choice in policies:
        routed = Router(model(), policy, batch=batch).run(views(), thumbnails=thumbnails(), right=right)
        assert np.array_equal(routed.choice, choice), policy.name
        assert np.allclose(routed.logits, expected(choice), atol=1e-5), policy.name


def test_a_mixture_gives_each_clip_its_point_by_its_pixels_alone() -> None:
    policy = Mixture(("4", "2"), 0.4)
    routed = Router(model(), policy, batch=4).run(views())
    assert set(routed.choice.tolist()) == {0, 2}
    for clip in range(CLIPS):
        assert Router(model(), policy, batch=1).run(views()[clip : clip + 1]).choice == routed.choice[clip]
    assert np.allclose(routed.logits, expected(routed.choice), atol=1e-5)
    draws = pixel_draws(torch.randint(0, 256, (2000, 1, 3, 1, 4, 4), dtype=torch.uint8))
    assert stats.kstest(draws, "uniform").pvalue > 1e-4


def test_the_order_of_the_clips_changes_the_order_of_the_results_alone() -> None:
    order = np.random.default_rng(1).permutation(CLIPS)
    policy = Assigned(assigner(), CONFIG.points, 0.6)
    straight = Router(model(), policy, batch=4).run(views(), thumbnails=thumbnails())
    mixed = Router(model(), policy, batch=4).run(views()[order], thumbnails=thumbnails()[order])
    assert np.array_equal(mixed.choice, straight.choice[order])
    assert np.allclose(mixed.logits, straight.logits[order], atol=1e-5)


def test_routing_in_half_precision_gives_float32_results_near_the_exact_ones() -> None:
    half = TimeSformer(CONFIG).eval()
    half.load_state_dict(model().state_dict())
    routed = Router(half.bfloat16(), Fixed("4"), batch=4).run(views())
    assert routed.logits.dtype == np.float32
    assert np.allclose(routed.logits, expected(np.zeros(CLIPS, dtype=np.int64)), atol=0.3)


def test_one_clip_and_none_at_a_point() -> None:
    routed = Router(model(), Fixed("2"), batch=8).run(views()[:1])
    assert np.allclose(routed.logits, alone()[:1, :, 2], atol=1e-5)


def test_assign_probabilities_are_the_assigners() -> None:
    found = assign_probabilities(assigner(), thumbnails())
    assert found.dtype == np.float64
    assert np.allclose(found.sum(1), 1)
    assert np.allclose(found, assigner().probabilities(thumbnails()).numpy())


def test_a_policy_with_an_assigner_needs_thumbnails() -> None:
    with pytest.raises(UserError, match="policy assigned: needs the clips' thumbnails"):
        Router(model(), Assigned(assigner(), CONFIG.points), batch=4).run(views())


@pytest.mark.parametrize("settings", [{}, {"align_corners": True}, {"embed": "kernel"}])
def test_clips_that_are_resized_before_they_are_normalised_give_the_same_logits(settings: dict) -> None:
    torch.manual_seed(0)
    made = TimeSformer(CONFIG.model_copy(update=settings)).eval()
    clips = views().flatten(0, 1).repeat(20, 1, 1, 1, 1)  # more than are resized at once
    with torch.inference_mode():
        for point in CONFIG.points:
            small = preprocess(made, clips, point)
            assert small.shape[-1] == made.side(point)
            torch.testing.assert_close(made(small, point), made(preprocess(made, clips), point), atol=1e-5, rtol=0)


def test_the_views_of_one_video_are_one_item() -> None:
    video = ClipViews(views()[:2], thumbnails()[:2])
    router = Router(model(), Assigned(assigner(), CONFIG.points, 0.5))
    alone, listed = router.run(video), router.run([video])
    assert np.array_equal(alone.choice, listed.choice) and np.array_equal(alone.logits, listed.logits)
