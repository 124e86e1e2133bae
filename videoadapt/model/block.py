"""One transformer block with divided space-time attention (TimeSformer, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from videoadapt.config.sections import ModelConfig
from videoadapt.model.drop import class_attention, strongest, take
from videoadapt.model.norm import LengthNorm


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of `(S, M, N, D / M)` tensors.

    Fused, but for bfloat16 on CPUs, where plain matrix products are 2 to 4 times as fast forward and 3 to 10 times
    with the backward pass (docs/log.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention within sequences."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(S, N, D)` to `(S, N, D)`."""
        return self._attend(*self._project(x))

    def with_class_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and how much the first token attends to each: `(S, N)`."""
        q, k, v = self._project(x)
        return self._attend(q, k, v), class_attention(q, k)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "s n (three m d) -> three s m n d", three=3, m=self.heads)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.proj(rearrange(attend(q, k, v), "s m n d -> s n (m d)"))


class Block(nn.Module):
    """Temporal attention at each position, spatial attention in each frame, MLP; each with norm and residual.

    Between attention and MLP a block may drop tokens (SuperViT).
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
            self.temporal_fc = nn.Linear(width, width)
            self.temporal_scale = scale()
        self.norm1 = norm()
        self.attn = Attention(width, config.heads, qkv_bias=config.qkv_bias)
        self.scale1 = scale()
        self.norm2 = norm()
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.scale2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.residual_scale = config.residual_scale

    def forward(self, prefix: Tensor, patches: Tensor, length: int, kept: int) -> tuple[Tensor, Tensor]:
        """`(B, P, D)` and `(B, T, N, D)` to `(B, P, D)` and `(B, T, K, D)`, `kept` of the N positions.

        They are those that the class token attends to most, mean over heads and frames, the same in all frames.
        """
        if self.temporal:
            patches = self._add(patches, self._attend_over_time(patches, length))
        prefix, patches = self._attend_within_frames(prefix, patches, length, kept)
        return self._mix_channels(prefix, patches, length)

    def _attend_over_time(self, patches: Tensor, length: int) -> Tensor:
        positions = patches.shape[2]
        x = rearrange(self.temporal_norm(patches, length), "b t n d -> (b n) t d")
        x = self.temporal_fc(self.temporal_attn(x))
        return self.drop_path(self.temporal_scale(rearrange(x, "(b n) t d -> b t n d", n=positions)))

    def _attend_within_frames(self, prefix: Tensor, patches: Tensor, length: int, kept: int) -> tuple[Tensor, Tensor]:
        """Every frame attends with its own copy of the prefix; the copies' results are averaged over the frames."""
        count, frames = prefix.shape[1], patches.shape[1]
        x = torch.cat([repeat(prefix, "b p d -> b t p d", t=frames), patches], dim=2)  # (B, T, P + N, D)
        x = rearrange(self.norm1(x, length), "b t n d -> (b t) n d")
        drops = kept < patches.shape[2]
        x, scores = self.attn.with_class_attention(x) if drops else (self.attn(x), None)
        x = self.drop_path(self.scale1(rearrange(x, "(b t) n d -> b t n d", t=frames)))
        prefix, patches = self._add(prefix, x[:, :, :count].mean(1)), self._add(patches, x[:, :, count:])
        if scores is not None:
            patches = take(patches, strongest(rearrange(scores[:, count:], "(b t) n -> b t n", t=frames), kept))
        return prefix, patches

    def _mix_channels(self, prefix: Tensor, patches: Tensor, length: int) -> tuple[Tensor, Tensor]:
        count = prefix.shape[1]
        x = torch.cat([prefix, patches.flatten(1, 2)], dim=1)  # (B, P + T K, D)
        x = self._add(x, self.drop_path(self.scale2(self.mlp(self.norm2(x, length)))))
        return x[:, :count], x[:, count:].unflatten(1, patches.shape[1:3])  # (B, T, K, D)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.add(x, branch, alpha=self.residual_scale)
