"""Costs in multiply-adds (MACs; the papers' "FLOPs"), from the architecture alone.

Linear layers, convolutions and the two attention products count; norms, activations, softmax and additions do not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Protocol

from videoadapt.config.points import Point

STEM_CHANNELS = 64  # of the convolutions that `embed: stem` begins with


class _Architecture(Protocol):
    """What of a model's config decides its costs; the config itself needs them, to put its points in order."""

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
    """MACs of one view at one point, by part."""

    embedding: int
    temporal_attention: int
    spatial_attention: int
    mlp: int
    head: int

    @property
    def total(self) -> int:
        """MACs of the view."""
        return sum(asdict(self).values())


def point_cost(config: _Architecture, point: str | Point) -> Cost:
    """The cost of one view (one crop of one clip) at a point, of any batch divided by its size."""
    parsed = Point.parse(point)
    width, frames = config.width, config.num_frames
    prefix = 2 if config.distill_token and parsed.length < config.lengths[0] else 1
    left = parsed.patches(config.depth, config.drop_blocks)
    entered = (parsed.length**2, *left[:-1])
    spatial = sum(_attention(width, prefix + patches) for patches in entered)
    # Where tokens are dropped, the class token's row of attention is computed once more (model/drop.py).
    scores = sum((prefix + n) * width for n, after in zip(entered, left, strict=True) if after < n)
    return Cost(
        embedding=frames * _embedding(config, parsed.length),
        temporal_attention=sum(_temporal(width, frames, patches) for patches in entered) if config.temporal else 0,
        spatial_attention=frames * (spatial + scores),
        mlp=sum(prefix + frames * patches for patches in left) * 2 * width * int(width * config.mlp_ratio),
        head=(prefix + (frames * left[-1] if config.dense_head is not None else 0)) * width * config.num_classes,
    )


def point_macs(config: _Architecture) -> dict[str, int]:
    """MACs per view of every point of a model, costliest first."""
    return {point: point_cost(config, point).total for point in config.points}


def _attention(width: int, tokens: int) -> int:
    """Queries, keys, values, output (4 D^2 a token) and the two products over all pairs of tokens."""
    return tokens * 4 * width**2 + 2 * tokens**2 * width


def _temporal(width: int, frames: int, patches: int) -> int:
    return patches * (_attention(width, frames) + frames * width**2)  # and temporal_fc


def _embedding(config: _Architecture, length: int) -> int:
    kernel = config.kernel(length)
    if config.embed != "stem":
        return length**2 * 3 * kernel**2 * config.width
    half, channels = (length * kernel // 2) ** 2, STEM_CHANNELS
    convolutions = half * (3 * 7**2 * channels + 2 * 3**2 * channels**2)
    return convolutions + length**2 * (kernel // 2) ** 2 * channels * config.width
