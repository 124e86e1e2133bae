"""Views for evaluation, thumbnails for the assigner, and normalising on the device."""

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
    """The crops of an evaluation: frames (T, H, W, 3) uint8 -> (count, 3, T, size, size) uint8.

    The short side is resized to `short_side` (none: `size`). The crops lie along the long side, in the middle of the
    short one: 1 in the centre, 2 at both ends, 3 at left, centre and right (in portrait, top, centre and bottom).
    """
    mode = InterpolationMode(interpolation)
    images = F.resize(_to_tchw(frames), [short_side or size], interpolation=mode, antialias=True)
    height, width = images.shape[-2:]
    shares = [0.5] if count == 1 else np.linspace(0.0, 1.0, count).tolist()
    out = torch.empty((count, 3, len(frames), size, size), dtype=torch.uint8)
    for crop, share in zip(out, shares, strict=True):
        y = round((share if height > width else 0.5) * (height - size))
        x = round((0.5 if height > width else share) * (width - size))
        crop.copy_(images[..., y : y + size, x : x + size].transpose(0, 1))  # T C H W -> C T H W
    return out


def thumbnail(frames: np.ndarray, *, frames_kept: int, size: int) -> Tensor:
    """A small copy of a whole clip: frames (T, H, W, 3) uint8 -> (3, frames_kept, size, size) uint8.

    The frames kept are spread evenly over the clip, first and last included (one alone: the middle one); each is
    squashed to a square whole, so that nothing of it is lost at the sides.
    """
    images = _to_tchw(frames[spread(len(frames), frames_kept)])
    return _to_cthw(F.resize(images, [size, size], antialias=True))


def _to_tchw(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(
        0, 3, 1, 2
    )  # T H W C -> T C H W, as it lies in memory


def _to_cthw(images: Tensor) -> Tensor:
    return images.transpose(0, 1).contiguous()  # T C H W -> C T H W


def normalise(clips: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(B, C, T, H, W) uint8 -> `(x / 255 - mean) / std` per channel, in `dtype`, on the device of the clips."""
    shift, scale = (torch.tensor(values, device=clips.device).mul(255).view(-1, 1, 1, 1) for values in (mean, std))
    return clips.to(torch.float32).sub_(shift).div_(scale).to(dtype)
