"""Token dropping (SuperViT): scores to positions to tokens, as functions that know nothing of the model."""

from __future__ import annotations

import torch
from torch import Tensor


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """How much the first token attends to each, mean over heads: `(S, M, N, D / M)` queries and keys to `(S, N)`.

    One row of the attention alone, so that all the rest stays fused. It gets no gradient, for it only chooses; it is at
    least float32, for in half precision many tokens would score the same.
    """
    q, k = q[:, :, :1].detach(), k.detach()
    rows = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (S, M, 1, N)
    return rows.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).mean(1)[:, 0]


def strongest(scores: Tensor, kept: int) -> Tensor:
    """The positions with the highest mean score over frames, `(B, T, N)` to `(B, K)`, in ascending order.

    One choice for all frames, so that attention over time finds the same position in each. Ties go to the first.
    """
    best = scores.mean(1).argsort(dim=-1, descending=True, stable=True)[:, :kept]
    return best.sort(dim=-1).values


def take(patches: Tensor, positions: Tensor) -> Tensor:
    """The tokens at `(B, K)` positions, in every frame: `(B, T, N, D)` to `(B, T, K, D)`."""
    index = positions[:, None, :, None].expand(-1, patches.shape[1], -1, patches.shape[-1])
    return patches.gather(2, index)
