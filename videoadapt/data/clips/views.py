"""Evaluation views, thumbnails for the assigner, and normalising on the device.

Resizing is antialiased. It is skipped where the size already fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from videoadapt.data.video.frame_sampling import spread


def crops(
    frames: np.ndarray, *, size: int, count: int, short_side: int | None = None, interpolation: str = "bilinear"
) -> Tensor:
    """Cuts the spatial crops of an evaluation (TimeSformer: 3 crops).

    The crops lie along the long side, and in the middle of the short side: 1 crop in the centre, 2 at both ends, 3 at
    left, centre and right (in portrait: top, centre and bottom).

    Args:
        frames: (T, H, W, 3) uint8.
        size: Side of a crop, in pixels.
        count: Number of crops; 0 gives an empty tensor.
        short_side: The short side of the frames after resizing; None means `size`.
        interpolation: A value of torchvision's `InterpolationMode`.

    Returns:
        (count, 3, T, size, size) uint8.
    """
    mode = InterpolationMode(interpolation)
    images = F.resize(to_tchw(frames), [short_side or size], interpolation=mode, antialias=True)
    height, width = images.shape[-2:]
    # Position of each crop on the long side: 0 = first pixel, 1 = last.
    fractions = [0.5] if count == 1 else np.linspace(0.0, 1.0, count).tolist()
    out = torch.empty((count, 3, len(frames), size, size), dtype=torch.uint8)
    for crop, fraction in zip(out, fractions, strict=True):
        y = round((fraction if height > width else 0.5) * (height - size))
        x = round((0.5 if height > width else fraction) * (width - size))
        crop.copy_(images[..., y : y + size, x : x + size].transpose(0, 1))  # (T, C, S, S) -> (C, T, S, S)
    return out


def thumbnail(frames: np.ndarray, *, frames_kept: int, size: int) -> Tensor:
    """Makes a small copy of a whole clip for the assigner.

    Each frame is squashed to a square, not cropped, so that no part of the picture is lost.

    Args:
        frames: (T, H, W, 3) uint8.
        frames_kept: Number of frames, spread evenly over the clip with both ends included; 1 is the middle frame.
        size: Side of the square, in pixels.

    Returns:
        (3, frames_kept, size, size) uint8.
    """
    images = to_tchw(frames[spread(len(frames), frames_kept)])
    return to_cthw(F.resize(images, [size, size], antialias=True))


def normalise(clips: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Returns `(x / 255 - mean) / std` per channel.

    Args:
        clips: (B, C, T, H, W) uint8, on any device.
        mean: C values, for pixels in [0, 1].
        std: C values, for pixels in [0, 1].
        dtype: Type of the result. The arithmetic is float32.

    Returns:
        (B, C, T, H, W) on the device of `clips`.
    """
    # Mean and std are scaled by 255 instead of the pixels: one operation less on the large tensor.
    shift, scale = (torch.tensor(values, device=clips.device).mul(255).view(-1, 1, 1, 1) for values in (mean, std))
    return clips.to(torch.float32).sub_(shift).div_(scale).to(dtype)


def to_tchw(frames: np.ndarray) -> Tensor:
    """Returns frames (T, H, W, C) as (T, C, H, W), the order of torchvision's transforms. No copy is made."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # (T, H, W, C) -> (T, C, H, W)


def to_cthw(images: Tensor) -> Tensor:
    """Returns images (T, C, H, W) as (C, T, H, W), the order of the model, contiguous."""
    return images.transpose(0, 1).contiguous()  # (T, C, H, W) -> (C, T, H, W)
