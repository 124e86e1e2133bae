"""The training objectives, one value per clip; sums and weights over clips and points are the loop's business."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from videoadapt.config.sections import LossConfig
from videoadapt.model.timesformer import Heads


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `(B, classes)` logits with soft targets `(B, classes)`: `(B,)`, in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(-1)


def distillation(logits: Tensor, teacher: Tensor, *, tau: float, hard: bool) -> Tensor:
    """`tau^2 KL(teacher / tau || student / tau)`, or with `hard` cross-entropy with the teacher's top class: `(B,)`.

    ReViT, equation 4, with the arguments in the order of public code. The teacher's `(B, classes)` get no gradient.
    """
    logits, teacher = logits.float(), teacher.detach().float()
    if hard:
        return F.cross_entropy(logits, teacher.argmax(-1), reduction="none")
    student = F.log_softmax(logits / tau, dim=-1)
    wanted = F.log_softmax(teacher / tau, dim=-1)
    return tau**2 * F.kl_div(student, wanted, reduction="none", log_target=True).sum(-1)


def point_loss(
    heads: Heads,
    targets: Tensor,
    teacher: Tensor | None,
    config: LossConfig,
    *,
    dropped: bool = False,
    dense: Tensor | None = None,
) -> Tensor:
    """The loss of each clip at one point, `(B,)`: the teacher learns the truth, a student `(1 - lam)` of it.

    With a distillation token the class head learns the truth and the distillation head the teacher (ReViT, Fig. 3).
    A point that has `dropped` tokens learns, with the answer of all heads, to say what the same length says with all
    of them (SuperViT); with `loss.dropped: ce`, the truth. Given `dense` targets `(B, T * N, classes)`, the head on
    patches learns them (LV-ViT, equation 4): the mean over patches is added `dense_weight` times, whoever teaches the
    class.
    """
    if dropped:
        loss = _dropped_loss(heads.logits(), targets, teacher, config)
    else:
        loss = _class_loss(heads, targets, teacher, config)
    if dense is None:
        return loss
    assert heads.dense is not None, "only a model with a head on patches has targets for it"
    return loss + config.dense_weight * cross_entropy(heads.dense, dense).mean(1)


def _class_loss(heads: Heads, targets: Tensor, teacher: Tensor | None, config: LossConfig) -> Tensor:
    truth = cross_entropy(heads.cls, targets)
    if teacher is None:
        return truth
    learner = heads.logits() if heads.dist is None else heads.dist
    learned = distillation(learner, teacher, tau=config.tau, hard=config.hard)
    return (1 - config.lam) * truth + config.lam * learned


def _dropped_loss(answer: Tensor, targets: Tensor, teacher: Tensor | None, config: LossConfig) -> Tensor:
    if config.dropped == "ce":
        return cross_entropy(answer, targets)
    assert teacher is not None, "configs without one are refused"
    return distillation(answer, teacher, tau=1.0, hard=False)
