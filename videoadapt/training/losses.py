"""The training objectives, one value per clip; sums and weights over clips and points are the loop's business."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.config.sections import LossConfig
from videoadapt.data.clips.augment import smooth, token_swap
from videoadapt.data.clips.loader import Batch
from videoadapt.data.clips.token_labels import token_targets
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


class Targets(NamedTuple):
    """Of the class head `(B, classes)`, and of the head on patches `(B, T * N, classes)` where the model has one.

    They are those of clips that are mixed by `swap`, see `TimeSformer.forward`.
    """

    cls: Tensor
    dense: Tensor | None
    swap: tuple[Tensor, Tensor] | None


def make_targets(point: Point, truth: Tensor, batch: Batch, config: Config, *, seed: int) -> Targets:
    """The targets at a point, of a batch whose labels are `truth`, `(B, classes)`.

    Without label maps each patch is to be taken for what its clip is; with them, `loss.map_share` of the class head's
    target is the map's as well. A point that drops patches has no targets for those that are left. Which tokens are
    mixed depends on `seed`, the length and the clips' positions in the step alone.
    """
    cls, dense = _unmixed(point.length, truth, batch, config)
    swap = None
    if config.data.mix_token:
        partners, taken = token_swap(
            batch.positions, point.length, size=config.model.size, alpha=config.data.mix_token, seed=seed
        )
        swap = partners, taken = partners.to(truth.device), taken.to(truth.device)
        cls = torch.lerp(cls, cls[partners], taken.float().mean(1, keepdim=True))
        dense = torch.where(taken[..., None], dense[partners], dense)
    if config.model.dense_head is None or point.keep < 1.0:
        return Targets(cls, None, swap)
    return Targets(cls, dense.repeat(1, config.model.num_frames, 1), swap)


def _unmixed(length: int, truth: Tensor, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """Targets of the clips `(B, classes)` and of the patches of a frame `(B, N, classes)`."""
    if batch.tokens is None:
        return truth, truth[:, None].expand(-1, length**2, -1)
    found = token_targets(batch.tokens, length, config.model.num_classes)
    whole, patches = (smooth(targets, config.loss.label_smoothing) for targets in found)
    return torch.lerp(truth, whole, config.loss.map_share), patches
