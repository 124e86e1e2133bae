"""TimeSformer at several token lengths: one class for video and, with one frame and no temporal attention, images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from videoadapt.config.load import Config
from videoadapt.config.points import Point, canonical
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError
from videoadapt.model.block import Block
from videoadapt.model.embed import PatchEmbed, PositionEmbed, Projection
from videoadapt.model.norm import LengthNorm


class Heads(NamedTuple):
    """Logits `(B, classes)` of the class head, of the distillation head where the point has its token, and of patches.

    `dense` are the logits `(B, T * N, classes)` of the head on patches, where the model has one.
    """

    cls: Tensor
    dist: Tensor | None = None
    dense: Tensor | None = None
    dense_weight: float = 0.0

    def logits(self) -> Tensor:
        """Those of inference: the mean of both heads (DeiT), plus a share of each class's best on patches (LV-ViT)."""
        logits = self.cls if self.dist is None else (self.cls + self.dist) / 2
        return logits if self.dense is None else logits + self.dense_weight * self.dense.amax(1)


class TimeSformer(nn.Module):
    """Divided space-time attention (TimeSformer) at any operating point: length (ReViT) and keep (SuperViT).

    Per length: patch embedding, position embedding, the affine of every LayerNorm. Shared: all else.

    Example:
        >>> model = TimeSformer(ModelConfig(points=("14", "7")))
        >>> model(torch.zeros(1, 3, 8, 224, 224), "7").shape
        torch.Size([1, 400])
    """

    def __init__(self, config: ModelConfig, class_names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.class_names = class_names
        self.activation_checkpointing = False
        self.points = {p: Point.parse(p) for p in config.points}
        self.patches = {p: point.patches(config.depth, config.drop_blocks) for p, point in self.points.items()}
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = PositionEmbed(config)
        if config.temporal:
            self.time_embed = nn.Parameter(torch.zeros(config.num_frames, config.width))
        drops = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()  # not meta
        self.blocks = nn.ModuleList(Block(config, drop_path=rate) for rate in drops)
        self.norm = LengthNorm(config.width, config.lengths, eps=config.norm_eps, shared=config.share_norm)
        self.head = nn.Linear(config.width, config.num_classes)
        students = {p for p, point in self.points.items() if point.length < config.lengths[0]}
        self.distilled = frozenset(students if config.distill_token else ())
        if self.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, config.width))
            self.head_dist = nn.Linear(config.width, config.num_classes)
        if config.dense_head is not None:
            self.aux_head = nn.Linear(config.width, config.num_classes)
        initialise(self)

    def forward(
        self, clips: Tensor, point: str | Point, *, heads: bool = False, swap: tuple[Tensor, Tensor] | None = None
    ) -> Tensor | Heads:
        """Logits of normalised float clips `(B, C, T, H, W)` with `H = W = config.size` at an operating point.

        The point is an argument, never state: calls are safe under threads and compile to one graph per point.
        Returns `(B, classes)`; with `heads`, the heads' logits apart (for the training loss). `swap` mixes tokens: each
        clip's partner `(B,)` int64, and the patches `(B, N)` bool that it takes from there. Raises `UserError` for a
        point that the model lacks and for clips of another shape.
        """
        key = str(point)
        if key not in self.points:  # torch.compile need not trace the parsing of a point that is written as ours
            key = canonical(key)
        self._check(clips, key)
        length = self.points[key].length
        prefix, patches = self._embed(clips, key, length, swap)
        for block, kept in zip(self.blocks, self.patches[key], strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                prefix, patches = checkpoint(block, prefix, patches, length, kept, use_reentrant=False)
            else:
                prefix, patches = block(prefix, patches, length, kept)
        prefix = self.norm(prefix, length)
        dist = self.head_dist(prefix[:, 1]) if key in self.distilled else None
        dense, weight = None, self.config.dense_head
        if weight is not None:
            dense = self.aux_head(self.norm(patches.flatten(1, 2), length))  # (B, T N, classes)
        every = Heads(self.head(prefix[:, 0]), dist, dense, weight or 0.0)
        return every if heads else every.logits()

    def _embed(self, clips: Tensor, key: str, length: int, swap: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        patches = self.patch_embed(clips, length)  # (B, T, N, D)
        if swap is not None:
            partners, taken = swap
            patches = torch.where(taken[:, None, :, None], patches[partners], patches)
        prefix: Tensor = repeat(self.cls_token, "1 1 d -> b 1 d", b=clips.shape[0])
        if key in self.distilled:
            prefix = torch.cat([prefix, repeat(self.dist_token, "1 1 d -> b 1 d", b=clips.shape[0])], dim=1)
        prefix, patches = self.pos_embed(prefix, patches, length)
        if self.config.temporal:
            patches = patches + self.time_embed[:, None]
        return prefix, patches

    def _check(self, clips: Tensor, key: str) -> None:
        if key not in self.points:
            raise UserError(f"point {key}: this model has the points {', '.join(self.points)}")
        config = self.config
        expected = (3, config.num_frames, config.size, config.size)
        if clips.ndim != 5 or tuple(clips.shape[1:]) != expected:  # noqa: PLR2004
            raise UserError(f"clips: expected shape (B, {', '.join(map(str, expected))}), got {tuple(clips.shape)}")


def build_model(config: Config) -> TimeSformer:
    """A freshly initialised model of a config; `load_weights` fills it."""
    return TimeSformer(config.model)


def compiled(model: TimeSformer) -> nn.Module:
    """The model by `torch.compile`, with room for all its points.

    Torch compiles a module for 8 different calls at most and runs all further ones uncompiled; here each point is one,
    and another for batches of another size.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(model.points) + 8)
    return torch.compile(model)  # type: ignore[return-value]


def initialise(model: TimeSformer) -> None:
    """Truncated normal weights, zero biases; `temporal_fc` zero in all blocks but the first, as TimeSformer."""
    std = model.config.init_std
    for module in model.modules():
        if isinstance(module, (nn.Linear, Projection)):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for parameter in (model.cls_token, *model.pos_embed.parameters()):
        nn.init.trunc_normal_(parameter, std=std)
    if model.distilled:
        nn.init.trunc_normal_(model.dist_token, std=std)
    if model.config.temporal:
        if model.config.time_init_std:
            nn.init.normal_(model.time_embed, std=model.config.time_init_std)
        for block in list(model.blocks)[1:]:
            nn.init.zeros_(block.get_parameter("temporal_fc.weight"))
