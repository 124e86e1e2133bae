"""The training objectives: one loss value per clip. `step.py` weights and sums them over clips and points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
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

LabelLoss = Callable[[Tensor, Tensor], Tensor]  # of logits and targets


def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Returns the cross-entropy with soft targets, over the last dimension, in float32.

    Args:
        logits: (..., classes).
        targets: (..., classes), each row a distribution.
        class_weights: Factor of each class's term, (classes,), as in `torch.nn.CrossEntropyLoss`; None means 1.

    Returns:
        The loss, (...).
    """
    if class_weights is not None:
        targets = targets * class_weights
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(-1)


def balanced_weights(labels: npt.NDArray[np.int64], classes: int) -> Tensor:
    """Returns a weight for each class (`loss.class_weights: balanced`), (classes,) float32.

    `clips / (classes with clips * clips of the class)`, as scikit-learn's `class_weight="balanced"`: all classes count
    the same in a sum over the clips, and the mean over the clips is 1. A class without clips has 1.

    Args:
        labels: The class of each training clip.
        classes: Number of classes of the model.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 1.0)).float()


def distillation(logits: Tensor, teacher: Tensor, *, tau: float, hard: bool) -> Tensor:
    """Returns `tau^2 KL(softmax(teacher / tau) || softmax(logits / tau))` (ReViT, equation 4), in float32.

    The paper writes the arguments in the other order. Public code of distillation has them in this order.

    Args:
        logits: Logits of the student, (B, classes).
        teacher: Logits of the teacher, (B, classes); receives no gradient.
        tau: Temperature; the factor tau^2 keeps the size of the gradient.
        hard: If set, returns the cross-entropy with the teacher's top class instead.

    Returns:
        The loss of each clip, (B,).
    """
    logits, teacher = logits.float(), teacher.detach().float()
    if hard:
        return F.cross_entropy(logits, teacher.argmax(-1), reduction="none")
    student = F.log_softmax(logits / tau, dim=-1)
    expected = F.log_softmax(teacher / tau, dim=-1)
    return tau**2 * F.kl_div(student, expected, reduction="none", log_target=True).sum(-1)


def point_loss(
    heads: Heads,
    targets: Tensor,
    teacher: Tensor | None,
    config: LossConfig,
    *,
    dropped: bool = False,
    dense: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Returns the loss of each clip at one point.

    - The teacher: cross-entropy with the labels.
    - A student with all tokens: `(1 - lam)` times this plus `lam` times the distillation. With a distillation token,
      the class head learns the labels and the distillation head learns from the teacher (ReViT, Figure 3).
    - A student with dropped tokens: the divergence of its inference logits from the logits of the same length with
      all tokens, at temperature 1; with `loss.dropped: ce`, cross-entropy with the labels (SuperViT).
    - With targets for the head on patches, `dense_weight` times the mean cross-entropy over patches is added (LV-ViT,
      equation 4). `make_targets` decides which points have them.

    Args:
        heads: The outputs of the model at the point.
        targets: Labels, (B, classes) soft.
        teacher: Logits of the teacher, (B, classes); None for the teacher itself.
        config: The `loss` section.
        dropped: Whether the point drops tokens.
        dense: Labels of patches, (B, T * N, classes) soft.
        class_weights: Weights of the classes in each cross-entropy with labels, (classes,); see `cross_entropy`.

    Returns:
        The loss, (B,) float32.
    """
    labelled = partial(cross_entropy, class_weights=class_weights)
    if dropped:
        loss = _dropped_loss(heads.logits(), targets, teacher, config, labelled)
    else:
        loss = _class_loss(heads, targets, teacher, config, labelled)
    if dense is None:
        return loss
    assert heads.dense is not None, "only a model with a head on patches has targets for it"
    return loss + config.dense_weight * labelled(heads.dense, dense).mean(1)  # (B, T * N) to (B,)


def _class_loss(
    heads: Heads, targets: Tensor, teacher: Tensor | None, config: LossConfig, labelled: LabelLoss
) -> Tensor:
    loss = labelled(heads.cls, targets)
    if teacher is None:
        return loss
    student = heads.logits() if heads.dist is None else heads.dist
    distilled = distillation(student, teacher, tau=config.tau, hard=config.hard)
    return (1 - config.lam) * loss + config.lam * distilled


def _dropped_loss(
    logits: Tensor, targets: Tensor, teacher: Tensor | None, config: LossConfig, labelled: LabelLoss
) -> Tensor:
    if config.dropped == "ce":
        return labelled(logits, targets)
    assert teacher is not None, "a config refuses points whose length with all tokens is missing"
    return distillation(logits, teacher, tau=1.0, hard=False)


class Targets(NamedTuple):
    """The targets of the heads at one point. If `swap` is set, they belong to the clips after the swap."""

    cls: Tensor  # targets of the class head, (B, classes)
    dense: Tensor | None  # targets of the head on patches, (B, T * N, classes); None at points without its loss
    swap: tuple[Tensor, Tensor] | None  # tokens to mix between clips; an argument of `TimeSformer.forward`

    def padded(self, clips: int) -> Targets:
        """Returns the targets with some more clips, whose targets are zeros and whose tokens stay."""
        dense = None if self.dense is None else pad_rows(self.dense, clips)
        if self.swap is None or not clips:
            return Targets(pad_rows(self.cls, clips), dense, self.swap)
        partners, taken = self.swap
        alone = torch.arange(len(partners), len(partners) + clips, device=partners.device)
        return Targets(pad_rows(self.cls, clips), dense, (torch.cat([partners, alone]), pad_rows(taken, clips)))


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """Returns a tensor (B, ...) with some rows of zeros behind it; the same tensor for none."""
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, count)) if count else rows


def make_targets(point: Point, truth: Tensor, batch: Batch, config: Config, *, seed: int) -> Targets:
    """Returns the targets of a batch at one point.

    Without label maps, each patch has the label of its clip. With label maps, patches have their own labels, and the
    map gives `loss.map_share` of the class target. With `data.mix_token`, tokens of pairs of clips are swapped. The
    swap depends on `seed`, the length and the positions of the clips only, so that it is the same in every layout.

    Args:
        point: The point.
        truth: Labels, (B, classes) soft.
        batch: Gives the positions and the label maps of the clips.
        config: The config.
        seed: Seed of the step.
    """
    cls, dense = _unswapped_targets(point.length, truth, batch, config)
    swap = None
    if config.data.mix_token:
        partners, taken = token_swap(
            batch.positions, point.length, size=config.model.size, alpha=config.data.mix_token, seed=seed
        )  # (B,), (B, N) bool: which tokens come from the partner
        swap = partners, taken = partners.to(truth.device), taken.to(truth.device)
        # The class target is mixed by the fraction of swapped tokens.
        cls = torch.lerp(cls, cls[partners], taken.float().mean(1, keepdim=True))
        dense = torch.where(taken[..., None], dense[partners], dense)  # (B, N, classes)
    if not _has_dense_loss(point, config):
        return Targets(cls, None, swap)
    return Targets(cls, dense.repeat(1, config.model.num_frames, 1), swap)  # (B, N, ...) to (B, T * N, ...)


def _has_dense_loss(point: Point, config: Config) -> bool:
    """Returns whether the patches of a point have labels: with dropped patches they have none."""
    taught = config.loss.dense_lengths == "all" or point.length == config.model.lengths[0]
    return config.model.dense_head is not None and point.keep == 1.0 and taught


def _unswapped_targets(length: int, truth: Tensor, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """Returns the targets of the clips, (B, classes), and of the patches of one frame, (B, N, classes)."""
    if batch.tokens is None:
        return truth, truth[:, None].expand(-1, length**2, -1)
    found = token_targets(batch.tokens, length, config.model.num_classes)
    whole, patches = (smooth(targets, config.loss.label_smoothing) for targets in found)
    return torch.lerp(truth, whole, config.loss.map_share), patches
