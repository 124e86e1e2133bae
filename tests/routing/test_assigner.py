"""The assigner decides once per clip, and can be fitted to two objectives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from videoadapt.config.sections import AssignConfig
from videoadapt.routing.assigner import Assigner, assigner_loss, assigner_macs, expected_cost

SMALL: dict[str, Any] = {"frames": 3, "size": 32, "channel_multiplier": 0.25, "stages": 3}


def small(points: int = 3, **changes: Any) -> Assigner:
    torch.manual_seed(0)
    assigner = Assigner(AssignConfig(**(SMALL | changes)), points)
    assigner.train()(thumbnails(8, **changes))  # statistics of its batch norms
    return assigner.eval()


def thumbnails(clips: int, **changes: Any) -> Tensor:
    frames, size = ((SMALL | changes)[key] for key in ("frames", "size"))
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (clips, 3, frames, size, size), dtype=torch.uint8, generator=generator)


FAMILIES: list[dict[str, Any]] = [{}, {"family": "convolutions"}]


@pytest.mark.parametrize(
    "changes", [*FAMILIES, {"frames": 1}, {"stages": 1}, {"stages": 7}, {"channel_multiplier": 0.5}]
)
def test_each_clip_gets_one_distribution_over_the_points(changes: dict[str, Any]) -> None:
    found = small(4, **changes).probabilities(thumbnails(5, **changes))
    assert found.shape == (5, 4)
    assert found.dtype == torch.float32
    assert torch.allclose(found.sum(-1), torch.ones(5))


@pytest.mark.parametrize("changes", FAMILIES)
def test_a_decision_does_not_depend_on_the_other_clips(changes: dict[str, Any]) -> None:
    assigner, clips = small(**changes), thumbnails(5)
    together = assigner.probabilities(clips)
    alone = torch.cat([assigner.probabilities(clip[None]) for clip in clips])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_order_of_the_frames_does_not_matter_but_motion_does() -> None:
    assigner, clips = small(), thumbnails(4)
    moving = assigner(clips)
    assert torch.allclose(moving, assigner(clips.flip(2)), atol=1e-5)
    still = clips[:, :, :1].expand_as(clips)
    assert not torch.allclose(moving, assigner(still), atol=1e-4)


@pytest.mark.parametrize("changes", [*FAMILIES, {"stages": 7}])
def test_the_copy_for_inference_decides_alike_without_batch_norms(changes: dict[str, Any]) -> None:
    assigner, clips = small(**changes), thumbnails(4)
    before = {name: tensor.clone() for name, tensor in assigner.state_dict().items()}
    quick = assigner.for_inference()
    torch.testing.assert_close(quick(clips), assigner(clips), atol=1e-5, rtol=1e-5)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in assigner.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in quick.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in assigner.state_dict().items())


@pytest.mark.parametrize("changes", FAMILIES)
def test_still_frames_have_a_finite_gradient(changes: dict[str, Any]) -> None:
    assigner = small(**changes).train()
    still = thumbnails(4)[:, :, :1].expand(-1, -1, 3, -1, -1)
    assigner(still).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in assigner.parameters())


def test_narrower_nets_smaller_frames_and_fewer_frames_cost_less() -> None:
    full = assigner_macs(AssignConfig(), 3)
    assert assigner_macs(AssignConfig(channel_multiplier=0.25), 3) < full
    assert assigner_macs(AssignConfig(size=64), 3) < full
    head = Assigner(AssignConfig(), 3).head.weight.numel()
    assert assigner_macs(AssignConfig(frames=2), 3) - head == pytest.approx((full - head) / 2)


def test_the_expected_cost_is_that_of_drawing_points_by_the_probabilities() -> None:
    generator = np.random.default_rng(0)
    logits, wrong = generator.normal(size=(4, 3)), generator.random((4, 3)) < 0.5
    costs = np.array([195.8, 98.6, 48.1])
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    by_hand = [
        sum(chances[i, p] * (costs[p] / 195.8 + 2.0 * wrong[i, p]) for p in range(3)) for i in range(4)
    ]  # fmt: skip
    found = expected_cost(torch.tensor(logits), torch.tensor(wrong).float(), torch.tensor(costs).float(), mu=2.0)
    assert found.shape == (4,)
    assert found.numpy() == pytest.approx(by_hand, rel=1e-5)
    scaled = expected_cost(torch.tensor(logits), torch.tensor(wrong).float(), torch.tensor(costs).float() * 1e9, mu=2.0)
    assert torch.allclose(scaled, found)


@pytest.mark.parametrize(("mu", "best"), [(2.0, [2, 1, 0, 2]), (0.0, [2, 2, 2, 2])])
def test_the_cheapest_right_point_has_the_least_expected_cost_if_errors_cost_enough(mu: float, best: list[int]) -> None:
    wrong = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]).float()
    costs = torch.tensor([195.8, 98.6, 48.1])
    sure = [expected_cost(torch.eye(3)[p].mul(50).expand(4, 3), wrong, costs, mu=mu) for p in range(3)]
    assert torch.stack(sure, dim=1).argmin(1).tolist() == best


def test_the_loss_is_cross_entropy_or_the_mean_expected_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0])
    wrong, costs = (torch.rand(6, 3, generator=generator) < 0.5).float(), torch.tensor([4.0, 2.0, 1.0])
    ce = assigner_loss(logits, labels, wrong, costs, AssignConfig(loss="ce"))
    assert torch.allclose(ce, F.cross_entropy(logits, labels))
    cost = assigner_loss(logits, labels, wrong, costs, AssignConfig(loss="expected_cost", mu=3.0))
    assert torch.allclose(cost, expected_cost(logits, wrong, costs, mu=3.0).mean())


@pytest.mark.parametrize("loss", ["ce", "expected_cost"])
def test_the_assigner_can_be_fitted(loss: Any) -> None:
    assigner = small(frames=1, stages=1).train()
    config = assigner.config.model_copy(update={"loss": loss})
    labels = torch.arange(6) % 3
    clips = torch.zeros(6, 3, 1, 32, 32, dtype=torch.uint8)
    clips[labels == 1] = 128
    clips[labels == 2] = 255
    wrong = (torch.arange(3) > labels[:, None]).float()
    optimizer = torch.optim.AdamW(assigner.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        assigner_loss(assigner(clips), labels, wrong, torch.tensor([4.0, 2.0, 1.0]), config).backward()
        optimizer.step()
    assert assigner(clips).argmax(-1).tolist() == labels.tolist()
