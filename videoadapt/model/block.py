"""One transformer block with divided space-time attention (TimeSformer, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from videoadapt.config.sections import ModelConfig
from videoadapt.model.drop import class_attention, gather_tokens, select_positions
from videoadapt.model.norm import LengthNorm


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax attention (TimeSformer, eq. 5 to 7) of queries, keys and values `(S, M, N, D / M)`."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused kernel is slow here: plain products are 2 to 4 times as fast in the forward pass, and 3 to 10
        # times with the backward pass (measured, docs/log.md).
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention within each of S sequences.

    Args:
        width: D.
        heads: M; divides D.
        qkv_bias: Whether queries, keys and values have a bias (LV-ViT has none).
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)  # one product for all three, as in timm
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens `(S, N, D)` to `(S, N, D)`."""
        return self._attend(*self._project(x))

    def with_class_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `forward(x)` and the attention `(S, N)` of the first token to each token, see `class_attention`."""
        q, k, v = self._project(x)
        # The fused kernel does not return its attention weights. Only one row is computed again, which is cheap.
        return self._attend(q, k, v), class_attention(q, k)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "s n (three m d) -> three s m n d", three=3, m=self.heads)  # (S, M, N, D / M)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.proj(rearrange(attend(q, k, v), "s m n d -> s n (m d)"))  # (S, N, D)


class Block(nn.Module):
    """Temporal attention at each position, spatial attention in each frame, then an MLP (TimeSformer, eq. 5 to 11).

    Each of the three is a residual branch with a LayerNorm in front. Between spatial attention and MLP the block may
    drop patch tokens (SuperViT). An image model (`config.temporal` false) has no temporal branch.

    Args:
        config: The model's section of the config.
        drop_path: Probability that a residual branch is skipped in training (stochastic depth). The MLP branch is
            skipped by a whole clip, the branches of attention by a clip or a sequence (`config.drop_path_unit`).
    """

    def __init__(self, config: ModelConfig, *, drop_path: float) -> None:
        super().__init__()
        width = config.width

        def norm() -> LengthNorm:
            return LengthNorm(width, config.lengths, eps=config.norm_eps, shared=config.share_norm)

        def scale() -> nn.Module:
            return nn.Identity() if config.layer_scale is None else LayerScale(width, config.layer_scale)

        self.temporal = config.temporal
        if self.temporal:
            self.temporal_norm = norm()
            self.temporal_attn = Attention(width, config.heads, qkv_bias=config.qkv_bias)
            # Zero at the start, in all blocks but the first (`timesformer.initialise`). Fine-tuning then starts from
            # the output of the pretrained image block.
            self.temporal_fc = nn.Linear(width, width)
            self.temporal_scale = scale()
        # All names that do not begin with `temporal_` are names in timm's ViT, so that image weights load by name.
        self.norm1 = norm()
        self.attn = Attention(width, config.heads, qkv_bias=config.qkv_bias)
        self.scale1 = scale()
        self.norm2 = norm()
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.scale2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()  # one draw per index of dimension 0
        self.drops_sequences = config.drop_path_unit == "sequence"
        self.residual_scale = config.residual_scale

    def forward(self, prefix: Tensor, patches: Tensor, length: int, kept: int) -> tuple[Tensor, Tensor]:
        """Runs the block on the tokens of a batch of clips.

        Args:
            prefix: The class token, and for students the distillation token, `(B, P, D)`.
            patches: Patch tokens `(B, T, N, D)`.
            length: L, the length whose LayerNorms apply. N is below `L * L` once tokens were dropped.
            kept: K, the number of positions to keep. With `kept == N` nothing is dropped.

        Returns:
            Prefix `(B, P, D)` and patches `(B, T, K, D)`. The K positions get the most attention from the class
            token, averaged over heads and frames. They are the same in all frames and keep their order.
        """
        if self.temporal:
            # Without the prefix, because it has no position and no frame.
            patches = self._add(patches, self._attend_over_time(patches, length))
        prefix, patches = self._attend_within_frames(prefix, patches, length, kept)
        return self._mlp_branch(prefix, patches, length)

    def _attend_over_time(self, patches: Tensor, length: int) -> Tensor:
        """Computes the temporal branch: each position attends to the same position in all frames (eq. 11)."""
        positions = patches.shape[2]
        x = rearrange(self.temporal_norm(patches, length), "b t n d -> (b n) t d")  # (B N, T, D)
        x = self.temporal_attn(x)
        if self.drops_sequences:  # a dropped position still gets the bias of `temporal_fc`, as in TimeSformer's code
            x = self.drop_path(x)
        x = self.temporal_scale(rearrange(self.temporal_fc(x), "(b n) t d -> b t n d", n=positions))  # (B, T, N, D)
        return x if self.drops_sequences else self.drop_path(x)

    def _attend_within_frames(self, prefix: Tensor, patches: Tensor, length: int, kept: int) -> tuple[Tensor, Tensor]:
        """Adds the spatial branch: the tokens of a frame and a copy of the prefix attend to each other (eq. 6 to 8)."""
        count, frames = prefix.shape[1], patches.shape[1]
        x = torch.cat([repeat(prefix, "b p d -> b t p d", t=frames), patches], dim=2)  # (B, T, P + N, D)
        x = rearrange(self.norm1(x, length), "b t n d -> (b t) n d")  # (F, P + N, D), F = B T
        drops = kept < patches.shape[2]
        x, scores = self.attn.with_class_attention(x) if drops else (self.attn(x), None)
        if self.drops_sequences:
            x = self.drop_path(x)
        x = self.scale1(rearrange(x, "(b t) n d -> b t n d", t=frames))  # (B, T, P + N, D)
        if not self.drops_sequences:
            x = self.drop_path(x)
        # The block returns one prefix per clip: the mean of its copies over the frames.
        prefix, patches = self._add(prefix, x[:, :, :count].mean(1)), self._add(patches, x[:, :, count:])
        if scores is not None:
            scores = rearrange(scores[:, count:], "(b t) n -> b t n", t=frames)  # (B, T, N), patches only
            patches = gather_tokens(patches, select_positions(scores, kept))  # (B, T, K, D)
        return prefix, patches

    def _mlp_branch(self, prefix: Tensor, patches: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Adds the MLP branch to all tokens, in one call (eq. 9)."""
        count = prefix.shape[1]
        x = torch.cat([prefix, patches.flatten(1, 2)], dim=1)  # (B, P + T K, D)
        x = self._add(x, self.drop_path(self.scale2(self.mlp(self.norm2(x, length)))))
        return x[:, :count], x[:, count:].unflatten(1, patches.shape[1:3])  # (B, P, D), (B, T, K, D)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.add(x, branch, alpha=self.residual_scale)  # LV-ViT halves every branch
