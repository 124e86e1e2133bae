"""One transformer block with divided space-time attention (TimeSformer, section 3)."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from videoadapt.config.sections import ModelConfig
from videoadapt.model.attention import attend, attend_over_time, has_kernel
from videoadapt.model.cast import Weights, cast_weights, own_weights
from videoadapt.model.drop import class_attention, gather_tokens, select_positions
from videoadapt.model.layout import FRAMES, PATCHES, TOKENS, Shape
from videoadapt.model.norm import LengthNorm


class Branch(NamedTuple):
    """The output of a residual branch that is not added yet."""

    x: Tensor
    layout: int  # of model/layout.py
    gate: Tensor | None  # a factor for each clip (B,); None = 1

    def added_to(self, x: Tensor, scale: float) -> Tensor:
        """Returns `x + scale * gate * branch`; both in the same layout."""
        return torch.add(x, _gated(self.x, self.gate), alpha=scale)


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

    def forward(self, x: Tensor, weights: Weights = own_weights) -> Tensor:
        """Maps tokens `(S, N, D)` to `(S, N, D)`."""
        return F.linear(self.mixed(x, weights), *weights(self.proj))

    def with_class_attention(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Returns `forward(x)` and the attention `(S, N)` of the first token to each token, see `class_attention`."""
        q, k, v = self._project(x, weights)
        # The fused kernel does not return its attention weights. Only one row is computed again, which is cheap.
        return F.linear(self._attend(q, k, v), *weights(self.proj)), class_attention(q, k)

    def mixed(self, x: Tensor, weights: Weights) -> Tensor:
        """Maps tokens `(S, N, D)` to the values that they attend to, `(S, N, D)`: `forward` without its last layer."""
        return self._attend(*self._project(x, weights))

    def mixed_over_time(self, x: Tensor, weights: Weights) -> Tensor:
        """As `mixed`, for `(B, T, N, D)`: each position attends to itself in all frames of its clip."""
        return attend_over_time(F.linear(x, *weights(self.qkv)), self.heads)

    def _project(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        parts = F.linear(x, *weights(self.qkv)).chunk(3, dim=-1)  # along D: one copy joins their gradients
        q, k, v = (rearrange(part, "s n (m d) -> s m n d", m=self.heads) for part in parts)  # (S, M, N, D / M)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rearrange(attend(q, k, v), "s m n d -> s n (m d)")  # (S, N, D)


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
            # Zero with weights of an image model (`load_weights`): fine-tuning starts from the image model's output.
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
        self.linears = [module for module in self.modules() if isinstance(module, nn.Linear)]

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
        weights = cast_weights(self.linears, patches.device)
        gates = self._gates(patches.shape[0], patches.device)
        if self.temporal:
            # Without the prefix, because it has no position and no frame.
            patches = self._add(patches, self._attend_over_time(patches, length, weights), gates[0])
        x = self._within_frames(prefix, patches, length)
        x, scores = self._spatial(x, weights, drops=kept < patches.shape[2])
        prefix, patches = self._add_within_frames(prefix, patches, x, scores, kept, gates[1])
        return self._mlp_branch(prefix, patches, length, weights, gates[2])

    def fused(self, x: Tensor, before: Branch | None, shape: Shape, length: int, kept: int) -> tuple[Tensor, Branch]:
        """Runs the block with the kernel `add_norm`, which adds a branch and normalises in one pass.

        Args:
            x: All tokens `(B, P + T N, D)`, prefix first.
            before: The MLP branch of the block before, which is not added yet; None in the first block.
            shape: P and T.
            length: As in `forward`.
            kept: As in `forward`.

        Returns:
            The tokens `(B, P + T K, D)`, and the MLP branch that is still to be added.
        """
        weights, gates = cast_weights(self.linears, x.device), self._gates(x.shape[0], x.device)
        if self.temporal:
            x, y = self._add_norm(x, before, self.temporal_norm, shape, length, target=PATCHES)  # y (B, T, N, D)
            y = self.temporal_scale(self._temporal_with_kernel(y, weights))
            before = Branch(y, PATCHES, gates[0])
        x, y = self._add_norm(x, before, self.norm1, shape, length, target=FRAMES)  # y (F, P + N, D), F = B T
        y, scores = self._spatial(y, weights, drops=kept < y.shape[1] - shape.prefix)
        if scores is None:
            x, y = self._add_norm(x, Branch(self.scale1(y), FRAMES, gates[1]), self.norm2, shape, length, target=TOKENS)
        else:
            prefix, patches = shape.split(x)
            prefix, patches = self._add_within_frames(prefix, patches, y, scores, kept, gates[1])
            x = torch.cat([prefix, patches.flatten(1, 2)], dim=1)  # (B, P + T K, D)
            y = self.norm2(x, length)
        return x, Branch(self.scale2(self._mlp(y, weights)), TOKENS, gates[2])

    def _add_norm(
        self, x: Tensor, branch: Branch | None, norm: LengthNorm, shape: Shape, length: int, *, target: int
    ) -> tuple[Tensor, Tensor]:
        """Adds a branch to the tokens, and normalises the sum for the next branch."""
        if branch is None:
            return x, norm(shape.to_layout(x, target), length)
        from videoadapt.model.kernels.add_norm import add_norm  # Triton is there only where the kernels run

        weight, bias = norm.affine(length)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        return add_norm(
            x, branch.x, branch.gate, weight, bias, self.residual_scale, norm.eps, shape.frames, shape.prefix,
            branch.layout, target, dtype,
        )  # fmt: skip

    def _gates(self, clips: int, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Draws the factors `(B,)` of the three branches for each clip; None for a branch that no clip drops."""
        if self.drops_sequences:
            return None, None, self._draw((clips,), device)
        gates = self._draw((3, clips), device)
        return (None, None, None) if gates is None else (gates[0], gates[1], gates[2])

    def _draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Draws factors of drop path, 0 or 1 / (1 - rate); None if it drops nothing."""
        if not self.training or not isinstance(self.drop_path, DropPath):
            return None
        keep = 1.0 - self.drop_path.drop_prob
        return torch.empty(shape, device=device).bernoulli_(keep).div_(keep)

    def _attend_over_time(self, patches: Tensor, length: int, weights: Weights = own_weights) -> Tensor:
        """Computes the temporal branch: each position attends to the same position in all frames (eq. 11)."""
        x = self.temporal_norm(patches, length)  # (B, T, N, D)
        if has_kernel(x):
            x = self._temporal_with_kernel(x, weights)
        else:  # other kernels want contiguous sequences, and D numbers of a token are moved faster than 3 D
            factors = self._drop_of_positions(x)
            x = self.temporal_attn.mixed(rearrange(x, "b t n d -> (b n) t d"), weights)  # (B N, T, D)
            factors = None if factors is None else rearrange(factors, "b 1 n 1 -> (b n) 1 1")
            x = self._project_over_time(x, factors, patches.shape[1] * patches.shape[2], weights)
            x = rearrange(x, "(b n) t d -> b t n d", b=patches.shape[0])  # (B, T, N, D)
        return self.temporal_scale(x)

    def _temporal_with_kernel(self, x: Tensor, weights: Weights) -> Tensor:
        """Computes temporal attention and `temporal_fc` on CUDA, `(B, T, N, D)` to `(B, T, N, D)`."""
        mixed = self.temporal_attn.mixed_over_time(x, weights)
        return self._project_over_time(mixed, self._drop_of_positions(x), x.shape[1] * x.shape[2], weights)

    def _project_over_time(self, x: Tensor, factors: Tensor | None, tokens: int, weights: Weights) -> Tensor:
        """Applies the last layer of temporal attention, factors of drop path, and `temporal_fc` to `(..., D)`.

        Without factors the two layers are one, whose weight is a product of D numbers for each of D^2. A product of
        D numbers for each of `tokens` times D is saved, so that pays for clips with at least D tokens.
        """
        (weight, bias), (fc_weight, fc_bias) = weights(self.temporal_attn.proj), weights(self.temporal_fc)
        if factors is None and bias is not None and tokens >= x.shape[-1]:
            return F.linear(x, fc_weight @ weight, F.linear(bias, fc_weight, fc_bias))
        x = F.linear(x, weight, bias)
        # A dropped position still gets the bias of `temporal_fc`, as in TimeSformer's code.
        return F.linear(x if factors is None else x * factors.to(x.dtype), fc_weight, fc_bias)

    def _drop_of_positions(self, x: Tensor) -> Tensor | None:
        """Returns the factors of drop path `(B, 1, N, 1)`, one for each position of each clip; None if it has none."""
        return self._draw((x.shape[0], 1, x.shape[2], 1), x.device) if self.drops_sequences else None

    def _within_frames(self, prefix: Tensor, patches: Tensor, length: int) -> Tensor:
        """Normalises the tokens of each frame, with a copy of the prefix: `(F, P + N, D)`, F = B T."""
        frames = patches.shape[1]
        x = torch.cat([repeat(prefix, "b p d -> b t p d", t=frames), patches], dim=2)  # (B, T, P + N, D)
        return rearrange(self.norm1(x, length), "b t n d -> (b t) n d")

    def _spatial(self, x: Tensor, weights: Weights, *, drops: bool) -> tuple[Tensor, Tensor | None]:
        """Attends within frames `(F, P + N, D)`. With `drops`, also returns scores `(F, P + N)`."""
        x, scores = self.attn.with_class_attention(x, weights) if drops else (self.attn(x, weights), None)
        return self.drop_path(x) if self.drops_sequences else x, scores

    def _add_within_frames(  # noqa: PLR0917 - what `forward` and `fused` have
        self, prefix: Tensor, patches: Tensor, x: Tensor, scores: Tensor | None, kept: int, gate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds the spatial branch `(F, P + N, D)` (eq. 8). With scores, keeps the positions with the most attention."""
        count, frames = prefix.shape[1], patches.shape[1]
        x = self.scale1(rearrange(x, "(b t) n d -> b t n d", t=frames))  # (B, T, P + N, D)
        x = _gated(x, gate)
        # `split` and not two slices, whose gradients would each be a whole tensor of zeros first.
        of_prefix, of_patches = x.split([count, x.shape[2] - count], dim=2)
        # The block returns one prefix per clip: the mean of its copies over the frames.
        prefix, patches = self._add(prefix, of_prefix.mean(1)), self._add(patches, of_patches)
        if scores is not None:
            scores = rearrange(scores[:, count:], "(b t) n -> b t n", t=frames)  # (B, T, N), patches only
            patches = gather_tokens(patches, select_positions(scores, kept))  # (B, T, K, D)
        return prefix, patches

    def _mlp_branch(
        self, prefix: Tensor, patches: Tensor, length: int, weights: Weights, gate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds the MLP branch to all tokens, in one call (eq. 9)."""
        count = prefix.shape[1]
        x = torch.cat([prefix, patches.flatten(1, 2)], dim=1)  # (B, P + T K, D)
        x = self._add(x, self.scale2(self._mlp(self.norm2(x, length), weights)), gate)
        prefix, tokens = x.split([count, x.shape[1] - count], dim=1)
        return prefix, tokens.unflatten(1, patches.shape[1:3])  # (B, P, D), (B, T, K, D)

    def _mlp(self, x: Tensor, weights: Weights) -> Tensor:
        fc1, fc2 = cast(nn.Linear, self.mlp.fc1), cast(nn.Linear, self.mlp.fc2)  # in timm, a Mlp may be convolutions
        return F.linear(self.mlp.act(F.linear(x, *weights(fc1))), *weights(fc2))

    def _add(self, x: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
        return torch.add(x, _gated(branch, gate), alpha=self.residual_scale)  # LV-ViT halves every branch


def _gated(branch: Tensor, gate: Tensor | None) -> Tensor:
    """Returns a branch `(B, ...)` times a factor for each clip `(B,)`."""
    return branch if gate is None else branch * gate.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
