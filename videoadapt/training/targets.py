"""What a step's clips are to be taken for at a length: labels, token labels, and what mixing tokens makes of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.data.clips.augment import smooth, token_swap
from videoadapt.data.clips.loader import Batch
from videoadapt.data.clips.token_labels import token_targets


class Targets(NamedTuple):
    """Of the class head `(B, classes)`, and of the head on patches `(B, T * N, classes)` where the model has one.

    They are those of clips that are mixed by `swap`, see `TimeSformer.forward`.
    """

    cls: Tensor
    dense: Tensor | None
    swap: tuple[Tensor, Tensor] | None


def targets_at(point: Point, truth: Tensor, batch: Batch, config: Config, *, seed: int) -> Targets:
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
