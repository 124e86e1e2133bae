"""Batch sizes of points: as many views as keep the device busy and fit into its free memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch

from videoadapt.config.cost import point_macs
from videoadapt.config.points import Point
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError, few
from videoadapt.model.timesformer import TimeSformer

Batch: TypeAlias = "Literal['auto'] | int | Mapping[str, int]"

# Tokens of a pass beyond which a batch is no faster per view. More would only delay the results.
_TOKENS = {"cpu": 8_192, "cuda": 262_144}
# MACs of a pass below which launching its operations takes a noticeable part of the time.
_MACS = {"cpu": 2e9, "cuda": 4e11}
_MOST = {"cpu": 256, "cuda": 1024}  # views of a pass
_PER_TOKEN = 24  # numbers of width D that a block holds at once for a token, with some room
_OF_FREE = 0.5  # fraction of the free memory for one pass: another process may take some


def batch_sizes(model: TimeSformer, batch: Batch = "auto") -> dict[str, int]:
    """Returns the views of a forward pass at each point.

    Args:
        model: The model, on its device.
        batch: `auto`, one number for all points, or a number for each point; `auto` for the points that are missing.

    Raises:
        UserError: A number is below 1, or of a point that the model does not have.
    """
    points = model.config.points
    if isinstance(batch, int):
        sizes = dict.fromkeys(points, batch)
    else:
        if isinstance(batch, str) and batch != "auto":
            raise UserError(f"batch: expected auto, a number, or a number for each point, got {batch!r}")
        given = {} if isinstance(batch, str) else dict(batch)
        unknown = [point for point in given if point not in points]
        if unknown:
            raise UserError(f"batch: the model has no point {unknown[0]}; it has the points {few(points)}")
        sizes = _automatic(model) | given
    if any(size < 1 for size in sizes.values()):
        raise UserError(f"batch: expected numbers from 1, got {sizes}")
    return sizes


def _automatic(model: TimeSformer) -> dict[str, int]:
    weight, config = model.head.weight, model.config
    device = weight.device.type if weight.device.type in _TOKENS else "cpu"
    limit = _fitting(config, weight.device, weight.element_size())
    sizes = {}
    for point, macs in point_macs(config).items():
        wanted = max(_TOKENS[device] / _tokens(config, point), _MACS[device] / macs)
        sizes[point] = max(1, min(_power_of_two(wanted), _MOST[device], limit[point]))
    return sizes


def _fitting(config: ModelConfig, device: torch.device, bytes_each: int) -> dict[str, int]:
    """Returns how many views of each point fit into the device's free memory; on a CPU there is no limit."""
    if device.type != "cuda":
        return dict.fromkeys(config.points, max(_MOST.values()))
    free, _ = torch.cuda.mem_get_info(device)
    # Memory that torch has reserved and does not use is free as well.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    pixels = 3 * config.num_frames * config.size**2
    return {
        # Pixels: uint8, float32 twice (before and after resizing), and in the model's precision.
        point: int(free * _OF_FREE / (9 * pixels + bytes_each * (pixels + _PER_TOKEN * tokens * config.width)))
        for point in config.points
        for tokens in [_tokens(config, point)]
    }


def _tokens(config: ModelConfig, point: str) -> int:
    """Returns the patch tokens of a view at a point, before any are dropped."""
    return config.num_frames * Point.parse(point).length ** 2


def _power_of_two(number: float) -> int:
    """Returns the power of two nearest to a number, from 1 on, in ratio."""
    return 1 << max(0, round(math.log2(number)))
