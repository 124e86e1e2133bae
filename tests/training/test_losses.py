"""The objectives: values and gradients against independent formulas; one value per clip."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from videoadapt.config.sections import LossConfig
from videoadapt.model.timesformer import Heads
from videoadapt.training.losses import balanced_weights, cross_entropy, distillation, point_loss


def logits(seed: int, batch: int = 5, classes: int = 7) -> Tensor:
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))


def soft_targets(batch: int = 5, classes: int = 7) -> Tensor:
    return logits(9, batch, classes).softmax(-1)


def gradient(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), at)[0]


def test_cross_entropy_of_hard_labels_equals_that_of_torch() -> None:
    x, labels = logits(0), torch.tensor([0, 6, 3, 3, 1])
    found = cross_entropy(x, F.one_hot(labels, 7).float())
    assert torch.allclose(found, F.cross_entropy(x, labels, reduction="none"))


def test_cross_entropy_of_soft_labels_and_its_gradient() -> None:
    x, targets = logits(0).requires_grad_(), soft_targets()
    by_hand = [sum(-t * (v - torch.logsumexp(row, 0)) for t, v in zip(ts, row, strict=True))
               for ts, row in zip(targets, x.detach(), strict=True)]  # fmt: skip
    loss = cross_entropy(x, targets)
    assert torch.allclose(loss.detach(), torch.stack(by_hand), atol=1e-5)
    assert torch.allclose(gradient(loss, x), x.detach().softmax(-1) - targets, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_distillation_from_an_equal_teacher_is_zero(tau: float) -> None:
    x = logits(0).requires_grad_()
    loss = distillation(x, x.detach() + 5.0, tau=tau, hard=False)  # a shift of all logits means nothing
    assert torch.allclose(loss, torch.zeros(5), atol=1e-5)
    assert gradient(loss, x).abs().max() < 1e-5


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_distillation_and_its_gradient_equal_the_formulas(tau: float) -> None:
    x, teacher = logits(0).double().requires_grad_(), logits(1).double()
    p, q = (teacher / tau).softmax(-1), (x.detach() / tau).softmax(-1)
    loss = distillation(x, teacher, tau=tau, hard=False)
    assert torch.allclose(loss.double(), tau**2 * (p * (p / q).log()).sum(-1), rtol=1e-4)
    assert torch.allclose(gradient(loss, x), tau * (q - p), atol=1e-5)


def test_the_divergence_is_from_the_teacher_to_the_student() -> None:
    sure, unsure = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert distillation(unsure, sure, tau=1.0, hard=False).item() == pytest.approx(math.log(2), abs=1e-3)
    assert distillation(sure, unsure, tau=1.0, hard=False).item() > 4


def test_hard_distillation_depends_on_the_top_class_of_the_teacher_only() -> None:
    x, teacher = logits(0), logits(1)
    found = distillation(x, teacher, tau=1.0, hard=True)
    assert torch.allclose(found, F.cross_entropy(x, teacher.argmax(-1), reduction="none"))
    assert torch.equal(found, distillation(x, 100 * teacher, tau=1.0, hard=True))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("token", [False, True])
def test_the_teacher_gets_no_gradient(hard: bool, token: bool) -> None:
    x, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    heads = Heads(x, x * 2 if token else None)
    point_loss(heads, soft_targets(), teacher, LossConfig(hard=hard)).sum().backward()
    assert x.grad is not None
    assert teacher.grad is None


def test_the_teacher_learns_from_the_labels_only() -> None:
    x, targets = logits(0), soft_targets()
    for lam in (0.0, 0.9):
        assert torch.equal(point_loss(Heads(x, None), targets, None, LossConfig(lam=lam)), cross_entropy(x, targets))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_lam_mixes_labels_and_teacher(lam: float) -> None:
    x, teacher, targets = logits(0), logits(1), soft_targets()
    found = point_loss(Heads(x, None), targets, teacher, LossConfig(lam=lam, tau=2.0))
    learned = distillation(x, teacher, tau=2.0, hard=False)
    assert torch.allclose(found, (1 - lam) * cross_entropy(x, targets) + lam * learned)


def test_with_a_distillation_token_each_head_learns_from_its_own_teacher() -> None:
    cls, dist = logits(0).requires_grad_(), logits(2).requires_grad_()
    teacher, targets = logits(1), soft_targets()
    loss = point_loss(Heads(cls, dist), targets, teacher, LossConfig(lam=0.3))
    on_cls, on_dist = torch.autograd.grad(loss.sum(), (cls, dist))
    assert torch.allclose(on_cls, 0.7 * (cls.softmax(-1) - targets), atol=1e-6)
    assert torch.allclose(on_dist, 0.3 * (dist.softmax(-1) - teacher.softmax(-1)), atol=1e-6)


@pytest.mark.parametrize("token", [False, True])
def test_a_point_with_dropped_tokens_learns_from_its_length_at_tau_1(token: bool) -> None:
    x, teacher, targets = logits(0), logits(1), soft_targets()
    heads = Heads(x, logits(2) if token else None)
    found = point_loss(heads, targets, teacher, LossConfig(lam=0.3, tau=2.0), dropped=True)
    p, q = teacher.softmax(-1), heads.logits().softmax(-1)
    assert torch.allclose(found, (p * (p / q).log()).sum(-1), rtol=1e-4)
    found = point_loss(heads, targets, None, LossConfig(dropped="ce"), dropped=True)
    assert torch.equal(found, cross_entropy(heads.logits(), targets))


@pytest.mark.parametrize("lam", [0.0, 0.9])
@pytest.mark.parametrize("taught", [False, True])
def test_a_head_on_patches_adds_its_own_loss_with_and_without_a_teacher(lam: float, taught: bool) -> None:
    cls, patches = logits(0), torch.stack([logits(i) for i in (3, 4, 5)], 1)  # (5 clips, 3 patches, classes)
    wanted = torch.stack([logits(i).softmax(-1) for i in (6, 7, 8)], 1)
    teacher = logits(1) if taught else None
    config = LossConfig(lam=lam, dense_weight=0.3)
    heads = Heads(cls, None, patches, 0.25)
    found = point_loss(heads, soft_targets(), teacher, config, dense=wanted)
    on_patches = torch.stack([cross_entropy(patches[:, i], wanted[:, i]) for i in range(3)]).mean(0)
    expected = cross_entropy(cls, soft_targets())
    if teacher is not None:
        answer = cls + 0.25 * patches.max(1).values  # inference logits, as those of the teacher
        expected = (1 - lam) * expected + lam * distillation(answer, teacher, tau=1.0, hard=False)
    torch.testing.assert_close(found, expected + 0.3 * on_patches)
    torch.testing.assert_close(point_loss(heads, soft_targets(), teacher, config), expected)


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(hard=True), LossConfig(lam=0.5, tau=3.0)])
def test_the_loss_of_a_clip_does_not_depend_on_other_clips(config: LossConfig) -> None:
    x, teacher, targets = logits(0), logits(1), soft_targets()
    together = point_loss(Heads(x, None), targets, teacher, config)
    alone = [
        point_loss(Heads(x[i : i + 1], None), targets[i : i + 1], teacher[i : i + 1], config) for i in range(len(x))
    ]
    assert together.shape == (5,)
    assert torch.allclose(together, torch.cat(alone))


def test_losses_are_float32_whatever_the_precision_of_the_model() -> None:
    x, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    exact = point_loss(Heads(x.float(), None), soft_targets(), teacher.float(), LossConfig())
    found = point_loss(Heads(x, None), soft_targets(), teacher, LossConfig())
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_large_logits_stay_finite() -> None:
    x, teacher = 1e4 * logits(0), 1e4 * logits(1)
    assert point_loss(Heads(x, None), soft_targets(), teacher, LossConfig()).isfinite().all()


def test_class_weights_are_those_of_torch_and_balance_the_classes() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [3])
    weights = balanced_weights(labels, 4)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 1.0, 10 / 3])  # the third class has no clips
    assert weights[labels].mean() == pytest.approx(1.0)
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    soft = torch.softmax(logits.flip(0), -1)
    expected = F.cross_entropy(logits, soft, weights, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, soft, weights), expected)
    config = LossConfig(lam=0.5)
    teacher = logits.roll(1, 0)
    loss = point_loss(Heads(logits), soft, teacher, config, class_weights=weights)
    distilled = distillation(logits, teacher, tau=1.0, hard=False)  # without weights
    torch.testing.assert_close(loss, 0.5 * expected + 0.5 * distilled)
