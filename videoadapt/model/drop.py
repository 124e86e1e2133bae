"""Token dropping (SuperViT): pure functions from attention to scores to positions to tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """Returns the attention that the first token (the class token) pays to each token, averaged over heads.

    Args:
        q: Queries `(S, M, N, D / M)`.
        k: Keys `(S, M, N, D / M)`.

    Returns:
        Scores `(S, N)` that sum to 1 over N, float32 or wider. They carry no gradient.
    """
    # Detached: the scores only choose positions, and choosing has no gradient.
    q, k = q[:, :, :1].detach(), k.detach()  # (S, M, 1, D / M): one row of the attention matrix is enough
    rows = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (S, M, 1, N)
    # In half precision many tokens would have equal scores, and the choice among them would be arbitrary.
    scores = rows.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return scores.mean(1)[:, 0]  # (S, N)


def select_positions(scores: Tensor, kept: int) -> Tensor:
    """Returns the `kept` positions with the highest scores, averaged over frames.

    All frames keep the same positions, so that temporal attention finds each position in every frame.

    Args:
        scores: `(B, T, N)`.
        kept: K, the number of positions to keep; at most N.

    Returns:
        Positions `(B, K)`, int64, ascending. Of equal scores the first position wins.
    """
    # argsort and not topk: only a stable sort fixes which of two equal scores wins.
    best = scores.mean(1).argsort(dim=-1, descending=True, stable=True)[:, :kept]  # (B, K), best first
    return best.sort(dim=-1).values


def gather_tokens(patches: Tensor, positions: Tensor) -> Tensor:
    """Returns the tokens at the given positions of every frame.

    Args:
        patches: `(B, T, N, D)`.
        positions: `(B, K)`, int64, below N.

    Returns:
        `(B, T, K, D)`.
    """
    clips, frames, count, width = patches.shape
    # Whole rows are copied, 4 to 8 times as fast on CPUs as `gather`, which looks at every number's own index.
    first = torch.arange(0, clips * frames * count, count, device=patches.device).view(clips, frames, 1)  # of a frame
    rows = (first + positions[:, None]).flatten()  # (B T K)
    return patches.reshape(-1, width).index_select(0, rows).view(clips, frames, -1, width)
