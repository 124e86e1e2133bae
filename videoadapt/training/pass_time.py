"""Times one forward and one backward pass at a point, on random clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.runtime.machine import autocast, now, pick_device
from videoadapt.training.losses import point_loss


@dataclass(frozen=True)
class PassTime:
    """Seconds of one forward and one backward pass."""

    forward_s: float
    backward_s: float


def time_pass(forward: Callable[..., Any], point: str, clips: int, config: Config) -> PassTime:
    """Times the passes of a training step at one point. Their gradients are added to those of the parameters.

    Args:
        forward: The model, or its compiled forward pass.
        point: The point.
        clips: The batch size.
        config: Gives the model, the losses, the device and the precision.
    """
    model, device = config.model, pick_device(config.run.device)
    frames = torch.randn(clips, 3, model.num_frames, model.size, model.size, device=device)  # B C T H W
    targets = torch.full((clips, model.num_classes), 1 / model.num_classes, device=device)
    # Uniform probabilities cost as much as real logits. The costliest point has no teacher.
    teacher = None if point == model.points[0] else targets
    begin = now(device)
    with autocast(device, config.run.precision):
        heads = forward(frames, point, heads=True)
    dropped = Point.parse(point).keep < 1
    # Points that drop tokens have no dense loss: labels per patch need all patches.
    dense = None if dropped or heads.dense is None else torch.full_like(heads.dense, 1 / model.num_classes)
    loss = point_loss(heads, targets, teacher, config.loss, dropped=dropped, dense=dense).sum()
    middle = now(device)
    loss.backward()
    return PassTime(middle - begin, now(device) - middle)
