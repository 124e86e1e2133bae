"""Cost of a forward pass in multiply-adds (MACs; the papers write "FLOPs"), computed from the architecture.

Linear layers, convolutions and the two matrix products of attention count. Normalisation, activations, softmax and
additions do not count.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from videoadapt.config.points import Point

STEM_CHANNELS = 64  # width of the convolutions at the start of `embed: stem` (LV-ViT)
_RGB = 3  # input channels


class _Architecture(Protocol):
    """The fields of `ModelConfig` that decide the cost.

    A protocol, because `config.sections` imports this module to sort its points by cost.
    """

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def mlp_ratio(self) -> float: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def points(self) -> tuple[str, ...]: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def drop_blocks(self) -> Collection[int]: ...
    @property
    def temporal(self) -> bool: ...
    @property
    def embed(self) -> str: ...
    @property
    def distill_token(self) -> bool: ...
    @property
    def dense_head(self) -> float | None: ...
    def kernel(self, length: int) -> int: ...


@dataclass(frozen=True)
class Cost:
    """MACs of one view at one point, by component of the model."""

    embedding: int
    temporal_attention: int
    spatial_attention: int
    mlp: int
    head: int

    @property
    def total(self) -> int:
        """Sum over the components."""
        return sum(asdict(self).values())


def point_cost(config: _Architecture, point: str | Point) -> Cost:
    """Returns the MACs of one view (one crop of one clip) at a point."""
    return _cost(config, Point.parse(point), first_block=0)


def backward_macs(config: _Architecture, point: str, frozen: Literal["backbone"] | int | None = None) -> int:
    """Returns the MACs of a backward pass at a point: twice those of the forward pass in the layers that are trained.

    Args:
        config: The model.
        point: The point.
        frozen: `train.freeze`: how many blocks, after the embeddings, or `backbone` for all but the heads.
    """
    if frozen is None:
        return 2 * point_cost(config, point).total
    first_block = config.depth if frozen == "backbone" else min(frozen, config.depth)
    trained = _cost(config, Point.parse(point), first_block)
    return 2 * (trained.total - trained.embedding)


def _cost(config: _Architecture, parsed: Point, first_block: int) -> Cost:
    """Counts the blocks from `first_block` on, the embedding and the heads."""
    width, frames = config.width, config.num_frames
    # Tokens beside the patches: the class token, and for student points the distillation token.
    extra = 2 if config.distill_token and parsed.length < config.lengths[0] else 1
    after_drop = parsed.patches(config.depth, config.drop_blocks)  # patches per frame in the MLP of each block
    # A block drops between attention and MLP, so its attention has the patches of the block before.
    in_attention = (parsed.length**2, *after_drop[:-1])[first_block:]
    head_tokens = extra + (frames * after_drop[-1] if config.dense_head is not None else 0)
    after_drop = after_drop[first_block:]
    spatial = sum(_attention_macs(width, extra + patches) for patches in in_attention)
    # A dropping block computes the class token's row of the attention map once more, as scores (model/drop.py).
    scores = sum((extra + n) * width for n, kept in zip(in_attention, after_drop, strict=True) if kept < n)
    hidden = int(width * config.mlp_ratio)
    return Cost(
        embedding=frames * _embedding_macs(config, parsed.length),
        temporal_attention=sum(_temporal_macs(width, frames, n) for n in in_attention) if config.temporal else 0,
        spatial_attention=frames * (spatial + scores),  # the class token is repeated in each frame
        mlp=sum(extra + frames * n for n in after_drop) * 2 * width * hidden,  # 2: into the hidden layer and back
        head=head_tokens * width * config.num_classes,
    )


def point_macs(config: _Architecture) -> dict[str, int]:
    """Returns the MACs per view of every point of a model, in the order of `config.points` (costliest first)."""
    return {point: point_cost(config, point).total for point in config.points}


def _attention_macs(width: int, tokens: int) -> int:
    """Counts query, key, value and output layers (4 D^2 per token), and the two matrix products (N^2 D each)."""
    return tokens * 4 * width**2 + 2 * tokens**2 * width


def _temporal_macs(width: int, frames: int, patches: int) -> int:
    """Counts attention over the frames at each patch position, and the layer `temporal_fc` (D^2 per token).

    As in the papers: also where the model computes the last layer of attention and `temporal_fc` as one layer.
    """
    return patches * (_attention_macs(width, frames) + frames * width**2)


def _embedding_macs(config: _Architecture, length: int) -> int:
    """Counts the convolutions that make the patch tokens of one frame."""
    kernel = config.kernel(length)
    if config.embed != "stem":
        return length**2 * _RGB * kernel**2 * config.width
    # The stem: one 7 x 7 convolution with stride 2, two 3 x 3, then one over (kernel / 2) x (kernel / 2) patches.
    pixels = (length * kernel // 2) ** 2  # pixels at half the resolution
    stem = pixels * (_RGB * 7**2 * STEM_CHANNELS + 2 * 3**2 * STEM_CHANNELS**2)
    return stem + length**2 * (kernel // 2) ** 2 * STEM_CHANNELS * config.width
