"""The model: TimeSformer at several operating points.

One class serves video and images: an image is a clip of one frame, and an image model has no temporal attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from einops import repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from videoadapt.config.points import Point, canonical
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError, few
from videoadapt.model.attention import has_kernel
from videoadapt.model.block import Block, Branch
from videoadapt.model.embed import PatchEmbed, PositionEmbed, Projection
from videoadapt.model.layout import Shape
from videoadapt.model.norm import LengthNorm

# Patch tokens of a batch. With fewer, the GPU waits for the host, which takes longer to call the fused kernels than
# torch's own (docs/results/gpu.md: measured at 12,544 and 50,176 tokens).
_LEAST_FUSED = 32_768


class Heads(NamedTuple):
    """Logits of each head of the model, kept apart because the training loss treats them differently.

    Attributes:
        cls: Logits of the class token, `(B, classes)`.
        dist: Logits of the distillation token, `(B, classes)`; None at points without that token.
        dense: Logits of every patch token, `(B, T K, classes)`; None if the model has no auxiliary head (LV-ViT).
        dense_weight: Factor of `dense` in inference.
    """

    cls: Tensor
    dist: Tensor | None = None
    dense: Tensor | None = None
    dense_weight: float = 0.0

    def logits(self) -> Tensor:
        """Returns the logits of inference, `(B, classes)`.

        They are the mean of the class and distillation heads (DeiT), plus `dense_weight` times each class's maximum
        over patches (LV-ViT).
        """
        logits = self.cls if self.dist is None else (self.cls + self.dist) / 2
        return logits if self.dense is None else logits + self.dense_weight * self.dense.amax(1)


class TimeSformer(nn.Module):
    """Divided space-time attention (TimeSformer) at any operating point: a length (ReViT) and a keep (SuperViT).

    Each length has its own patch embedding, position embedding and LayerNorm parameters, unless the config shares
    them. All lengths share attention, MLP, class token, time embedding and heads.

    Args:
        config: The model's section of the config.
        class_names: The names of the classes in label order; may be empty.

    Attributes:
        class_names: As given; a loaded model has those of its training. `class_names[i]` names the class of
            `logits[i]`.

    Example:
        >>> model = TimeSformer(ModelConfig(points=("14", "7")))
        >>> model(torch.zeros(1, 3, 8, 224, 224), "7").shape
        torch.Size([1, 400])
    """

    def __init__(self, config: ModelConfig, class_names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.class_names = class_names
        self.activation_checkpointing = False  # the training loop sets it; it saves memory and does not change results
        self.points = {p: Point.parse(p) for p in config.points}
        # For each point, how many patch tokens per frame each block outputs: (196, 196, ...).
        self.patches = {p: point.patches(config.depth, config.drop_blocks) for p, point in self.points.items()}
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = PositionEmbed(config)
        if config.temporal:
            self.time_embed = nn.Parameter(torch.zeros(config.num_frames, config.width))
        # Drop path rates grow with depth. `linspace` runs on the CPU even under `torch.device("meta")`, because
        # `tolist` needs its values.
        drops = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, drop_path=rate) for rate in drops)
        self.norm = LengthNorm(config.width, config.lengths, eps=config.norm_eps, shared=config.share_norm)
        self.head = nn.Linear(config.width, config.num_classes)
        students = {p for p, point in self.points.items() if point.length < config.lengths[0]}
        self.distilled = frozenset(students if config.distill_token else ())  # points with a distillation token
        if self.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, config.width))
            self.head_dist = nn.Linear(config.width, config.num_classes)
        if config.dense_head is not None:
            self.aux_head = nn.Linear(config.width, config.num_classes)
        # On the model's device, so that normalising copies nothing from the host. As bits, because `model.to(dtype)`
        # would round floats. They come from the config, so no checkpoint holds them.
        statistics = torch.tensor([config.mean, config.std], dtype=torch.float32)
        self.register_buffer("_statistics", statistics.view(torch.int32), persistent=False)
        initialise(self)

    def forward(
        self, clips: Tensor, point: str | Point, *, heads: bool = False, swap: tuple[Tensor, Tensor] | None = None
    ) -> Tensor | Heads:
        """Returns the logits of a batch of clips at an operating point.

        The point is an argument and never state of the module: calls are safe under threads and data parallelism, and
        `torch.compile` makes one graph per point.

        Args:
            clips: Normalised floating-point clips `(B, C, T, H, W)` with `T = config.num_frames` and
                `H = W = config.size`, at every point: the model resizes them itself. Or with `H = W = side(point)`, if
                they are resized already, as `preprocess(model, clips, point)` does.
            point: One of `config.points`, such as `"14"` or `"14@0.7"`.
            heads: Return the logits of each head apart, for the training loss.
            swap: Mix clips by their patch tokens (token labelling, LV-ViT): for each clip the index `(B,)`, int64, of
                its partner in the batch, and a mask `(B, N)`, bool, of the patches to take from the partner.

        Returns:
            Logits `(B, classes)`; with `heads`, a `Heads`.

        Raises:
            UserError: The model does not have the point, or the clips have another shape.
        """
        key = str(point)
        # Text in the form of `config.points` is not parsed, because torch.compile traces this code.
        if key not in self.points:
            key = canonical(key)
        self._check(clips, key)
        length = self.points[key].length
        prefix, patches = self._embed(clips, key, length, swap)  # (B, P, D), (B, T, N, D)
        run = self._run_fused if _fuses(patches) else self._run
        prefix, patches = run(prefix, patches, length, self.patches[key])
        prefix = self.norm(prefix, length)
        dist = self.head_dist(prefix[:, 1]) if key in self.distilled else None
        dense, weight = None, self.config.dense_head
        if weight is not None:
            dense = self.aux_head(self.norm(patches.flatten(1, 2), length))  # (B, T K, classes)
        by_head = Heads(self.head(prefix[:, 0]), dist, dense, weight or 0.0)
        return by_head if heads else by_head.logits()

    @property
    def mean(self) -> Tensor:
        """The mean of pixels in [0, 1] by channel, `(C,)` float32, on the model's device."""
        return self._statistics[0].view(torch.float32)  # type: ignore[index]

    @property
    def std(self) -> Tensor:
        """The standard deviation of pixels in [0, 1] by channel, `(C,)` float32, on the model's device."""
        return self._statistics[1].view(torch.float32)  # type: ignore[index]

    def side(self, point: str) -> int:
        """Returns the height and width in pixels to which the frames are resized at a point of `config.points`."""
        return self.patch_embed.side(self.points[point].length)

    def _run(
        self, prefix: Tensor, patches: Tensor, length: int, kept_by_block: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Runs all blocks on prefix and patches."""
        for block, kept in zip(self.blocks, kept_by_block, strict=True):
            prefix, patches = self._call(block, prefix, patches, length, kept)  # (B, P, D), (B, T, K, D)
        return prefix, patches

    def _run_fused(
        self, prefix: Tensor, patches: Tensor, length: int, kept_by_block: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Runs all blocks on one tensor of all tokens, with fused residual branches."""
        shape = Shape(prefix.shape[1], patches.shape[1])
        x = torch.cat([prefix, patches.flatten(1, 2)], dim=1)  # (B, P + T N, D)
        branch: Branch | None = None
        for block, kept in zip(self.blocks, kept_by_block, strict=True):
            x, branch = self._call(cast(Block, block).fused, x, branch, shape, length, kept)
        return shape.split(x if branch is None else branch.added_to(x, self.config.residual_scale))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a part of the model, and computes it again in the backward pass if that is set, to save memory."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _embed(self, clips: Tensor, key: str, length: int, swap: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Returns prefix and patch tokens of the clips, with positions added."""
        patches = self.patch_embed(clips, length)  # (B, T, N, D)
        if swap is not None:  # before positions are added: a swapped patch gets the position of its new place
            partners, from_partner = swap
            patches = torch.where(from_partner[:, None, :, None], patches[partners], patches)  # same mask in all frames
        prefix: Tensor = repeat(self.cls_token, "1 1 d -> b 1 d", b=clips.shape[0])  # (B, 1, D)
        if key in self.distilled:
            dist = repeat(self.dist_token, "1 1 d -> b 1 d", b=clips.shape[0])
            prefix = torch.cat([prefix, dist], dim=1)  # (B, 2, D)
        prefix, patches = self.pos_embed(prefix, patches, length)
        if self.config.temporal:
            patches = patches + self.time_embed[:, None]  # (T, 1, D): one row for all positions of a frame
        return prefix, patches

    def _check(self, clips: Tensor, key: str) -> None:
        if key not in self.points:
            raise UserError(f"point {key}: this model has the points {few(self.points)}")
        config = self.config
        expected = (3, config.num_frames, config.size, config.size)
        resized = (*expected[:2], self.side(key), self.side(key))
        if clips.ndim != 5 or tuple(clips.shape[1:]) not in (expected, resized):  # noqa: PLR2004
            raise UserError(f"clips: expected shape (B, {', '.join(map(str, expected))}), got {tuple(clips.shape)}")


def _fuses(patches: Tensor) -> bool:
    """Returns whether the blocks run with fused residual branches on patches `(B, T, N, D)`."""
    clips, frames, positions, _ = patches.shape
    return has_kernel(patches) and clips * frames * positions >= _LEAST_FUSED


def compiled(model: TimeSformer, module: nn.Module | None = None) -> nn.Module:
    """Returns the compiled model, with a recompile limit that allows one graph per point and batch size.

    By default torch compiles a function for 8 different calls and runs all further calls uncompiled. Each combination
    of point and batch size is a different call.

    Args:
        model: The model.
        module: What is compiled: `model`, or a module around it, such as DDP.

    Side effect: in older versions of torch, `torch.compile` has no argument `recompile_limit`, and one limit applies to
    the whole process. It is raised and stays raised, because torch reads it while the compiled model runs.
    """
    limit = 2 * len(model.points) + 8  # two batch sizes per point (the last batch may be smaller), and torch's own 8
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return torch.compile(module or model, recompile_limit=limit)  # type: ignore[call-overload]
    limits: Any = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, limit)  # torch 2.7 renamed it and kept both names
    return torch.compile(module or model)  # type: ignore[return-value]


def initialise(model: TimeSformer) -> None:
    """Initialises all parameters in place, as in TimeSformer but for one weight.

    Weights and tokens are drawn from a truncated normal distribution with deviation `config.init_std`; biases are zero.
    `temporal_fc` is zero in all blocks but the first, so that temporal attention starts without effect there. In
    TimeSformer's code it is zero in the first one, too; from random weights no difference was seen (docs/log.md).
    """
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
        if model.config.time_init_std:  # zero, as in TimeSformer, draws no random numbers
            nn.init.normal_(model.time_embed, std=model.config.time_init_std)
        for block in list(model.blocks)[1:]:
            nn.init.zeros_(block.get_parameter("temporal_fc.weight"))
