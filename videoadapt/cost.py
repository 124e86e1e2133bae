"""Costs in multiply-adds (MACs; the papers' "FLOPs"), from the architecture alone.

Linear layers, convolutions and the two attention products count; norms, activations, softmax and additions do not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from videoadapt.config import ModelConfig
from videoadapt.model.embed import Stem
from videoadapt.points import Point


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


def point_cost(config: ModelConfig, point: str | Point) -> Cost:
    """The cost of one view (one crop of one clip) at a point, of any batch divided by its size."""
    length = Point.parse(point).length
    width, frames = config.width, config.num_frames
    prefix = 2 if config.distill_token and str(point) != config.points[0] else 1
    patches = length * length
    return Cost(
        embedding=frames * _embedding(config, length),
        temporal_attention=config.depth * _temporal(width, frames, patches) if config.temporal else 0,
        spatial_attention=config.depth * frames * _attention(width, prefix + patches),
        mlp=config.depth * (prefix + frames * patches) * 2 * width * int(width * config.mlp_ratio),
        head=(prefix + (frames * patches if config.dense_head is not None else 0)) * width * config.num_classes,
    )


def point_macs(config: ModelConfig) -> dict[str, int]:
    """MACs per view of every point of a model, costliest first."""
    return {point: point_cost(config, point).total for point in config.points}


def _attention(width: int, tokens: int) -> int:
    """Queries, keys, values, output (4 D^2 a token) and the two products over all pairs of tokens."""
    return tokens * 4 * width**2 + 2 * tokens**2 * width


def _temporal(width: int, frames: int, patches: int) -> int:
    return patches * (_attention(width, frames) + frames * width**2)  # and temporal_fc


def _embedding(config: ModelConfig, length: int) -> int:
    kernel = config.kernel(length)
    if config.embed != "stem":
        return length**2 * 3 * kernel**2 * config.width
    half, channels = (length * kernel // 2) ** 2, Stem.CHANNELS
    convolutions = half * (3 * 7**2 * channels + 2 * 3**2 * channels**2)
    return convolutions + length**2 * (kernel // 2) ** 2 * channels * config.width
