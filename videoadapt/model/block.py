"""One transformer block with divided space-time attention (TimeSformer, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from videoadapt.config.sections import ModelConfig
from videoadapt.model.attention import attend, attend_over_time, has_kernel
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
        return torch.add(x, self.x if self.gate is None else self.x * self.gate[:, None, None], alpha=scale)


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

    def over_time(self, x: Tensor) -> Tensor:
        """Maps tokens `(B, T, N, D)` to `(B, T, N, D)`: each position attends to itself in all frames of its clip."""
        return self.proj(attend_over_time(self.qkv(x), self.heads))

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
        if self.temporal:
            x, y = self._add_norm(x, before, self.temporal_norm, shape, length, target=PATCHES)  # y (B, T, N, D)
            y = self.temporal_scale(self._temporal_with_kernel(y))
            before = Branch(y, PATCHES, None if self.drops_sequences else self._gate(y.shape[0], y.device))
        x, y = self._add_norm(x, before, self.norm1, shape, length, target=FRAMES)  # y (F, P + N, D), F = B T
        y, scores = self._spatial(y, drops=kept < y.shape[1] - shape.prefix)
        if scores is None:
            gate = None if self.drops_sequences else self._gate(x.shape[0], x.device)
            x, y = self._add_norm(x, Branch(self.scale1(y), FRAMES, gate), self.norm2, shape, length, target=TOKENS)
        else:
            prefix, patches = shape.split(x)
            prefix, patches = self._add_within_frames(prefix, patches, y, scores, kept)
            x = torch.cat([prefix, patches.flatten(1, 2)], dim=1)  # (B, P + T K, D)
            y = self.norm2(x, length)
        return x, Branch(self.scale2(self.mlp(y)), TOKENS, self._gate(x.shape[0], x.device))

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

    def _gate(self, clips: int, device: torch.device) -> Tensor | None:
        """Returns a factor `(B,)` of a branch for each clip, which drop path draws; None if it drops nothing."""
        if not self.training or isinstance(self.drop_path, nn.Identity):
            return None
        return self.drop_path(torch.ones(clips, 1, device=device)).flatten()

    def _attend_over_time(self, patches: Tensor, length: int) -> Tensor:
        """Computes the temporal branch: each position attends to the same position in all frames (eq. 11)."""
        x = self.temporal_norm(patches, length)  # (B, T, N, D)
        if has_kernel(x):
            x = self._temporal_with_kernel(x)
        else:  # other kernels want contiguous sequences, and D numbers of a token are moved faster than 3 D
            x = self.temporal_attn(rearrange(x, "b t n d -> (b n) t d"))  # (B N, T, D)
            if self.drops_sequences:  # a dropped position still gets the bias of `temporal_fc`, as in their code
                x = self.drop_path(x)
            x = rearrange(self.temporal_fc(x), "(b n) t d -> b t n d", b=patches.shape[0])  # (B, T, N, D)
        x = self.temporal_scale(x)
        return x if self.drops_sequences else self.drop_path(x)

    def _temporal_with_kernel(self, x: Tensor) -> Tensor:
        """Computes temporal attention and `temporal_fc` on CUDA, `(B, T, N, D)` to `(B, T, N, D)`."""
        x = self.temporal_attn.over_time(x)
        return self.temporal_fc(x * self._drop_of_positions(x) if self.drops_sequences else x)

    def _drop_of_positions(self, x: Tensor) -> Tensor:
        """Returns the factors of drop path `(B, 1, N, 1)`, one for each position of each clip."""
        factors = self.drop_path(x.new_ones(x.shape[0] * x.shape[2], 1))  # (B N, 1)
        return rearrange(factors, "(b n) 1 -> b 1 n 1", b=x.shape[0])

    def _attend_within_frames(self, prefix: Tensor, patches: Tensor, length: int, kept: int) -> tuple[Tensor, Tensor]:
        """Adds the spatial branch: the tokens of a frame and a copy of the prefix attend to each other (eq. 6 to 8)."""
        frames = patches.shape[1]
        x = torch.cat([repeat(prefix, "b p d -> b t p d", t=frames), patches], dim=2)  # (B, T, P + N, D)
        x = rearrange(self.norm1(x, length), "b t n d -> (b t) n d")  # (F, P + N, D), F = B T
        x, scores = self._spatial(x, drops=kept < patches.shape[2])
        return self._add_within_frames(prefix, patches, x, scores, kept)

    def _spatial(self, x: Tensor, *, drops: bool) -> tuple[Tensor, Tensor | None]:
        """Attends within frames `(F, P + N, D)`. With `drops`, also returns scores `(F, P + N)`."""
        x, scores = self.attn.with_class_attention(x) if drops else (self.attn(x), None)
        return self.drop_path(x) if self.drops_sequences else x, scores

    def _add_within_frames(
        self, prefix: Tensor, patches: Tensor, x: Tensor, scores: Tensor | None, kept: int
    ) -> tuple[Tensor, Tensor]:
        """Adds the spatial branch `(F, P + N, D)`. With scores, keeps the positions with the most attention."""
        count, frames = prefix.shape[1], patches.shape[1]
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
