"""Evaluation views, thumbnails for the assigner, and normalising on the device.

Resizing is skipped where the size already fits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from videoadapt.data.video.frame_sampling import spread
from videoadapt.model.embed import resize_frames
from videoadapt.model.timesformer import TimeSformer

_FLOATS = 2**19  # of the clips that a CPU resizes at once: 2 MB, about the second-level cache of a core


def crops(  # noqa: PLR0913 - settings, by name
    frames: np.ndarray,
    *,
    size: int,
    count: int,
    short_side: int | None = None,
    interpolation: str = "bilinear",
    antialias: bool = True,
    offset: Literal["round", "ceil"] = "round",
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
        antialias: See `resize`.
        offset: The first pixel of a crop that lies between two pixels: the even one (`round`, as torchvision's centre
            crop) or the next one (`ceil`, as TimeSformer's code).

    Returns:
        (count, 3, T, size, size) uint8.
    """
    images = resize(to_tchw(frames), [short_side or size], interpolation, antialias=antialias)
    height, width = images.shape[-2:]
    # Position of each crop on the long side: 0 = first pixel, 1 = last.
    fractions = [0.5] if count == 1 else np.linspace(0.0, 1.0, count).tolist()
    out = torch.empty((count, 3, len(frames), size, size), dtype=torch.uint8)
    for crop, fraction in zip(out, fractions, strict=True):
        y = _to_pixel((fraction if height > width else 0.5) * (height - size), offset)
        x = _to_pixel((0.5 if height > width else fraction) * (width - size), offset)
        crop.copy_(images[..., y : y + size, x : x + size].transpose(0, 1))  # (T, C, S, S) -> (C, T, S, S)
    return out


def _to_pixel(position: float, offset: Literal["round", "ceil"]) -> int:
    if offset == "round":
        return round(position)  # of two pixels that are equally near, the even one
    return math.ceil(round(position, 6))  # rounded first, because a third of 300 may give 100.000...01


def resize(images: Tensor, size: Sequence[int], interpolation: str, *, antialias: bool) -> Tensor:
    """Resizes images (T, C, H, W) uint8.

    Args:
        images: The images. They are returned unchanged if they have the size already.
        size: Height and width, or the short side alone; the long side is then rounded down.
        interpolation: A value of torchvision's `InterpolationMode`.
        antialias: Smooth before making images smaller, as Pillow does. TimeSformer's code does not.

    Returns:
        The resized images, uint8.
    """
    mode = InterpolationMode(interpolation)
    if antialias:
        return F.resize(images, list(size), interpolation=mode, antialias=True)
    # In float32, because torch's resize of uint8 is a whole grey level off without antialiasing. TimeSformer's code
    # keeps the floats: its pixels differ from these by the rounding, half a grey level at most.
    floats = F.resize(images.float(), list(size), interpolation=mode, antialias=False)
    return floats.round_().clamp_(0, 255).to(torch.uint8)  # bicubic overshoots


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


def pixel_draws(views: Tensor) -> npt.NDArray[np.float64]:
    """Returns a number for each clip that looks random and depends on the clip's pixels alone.

    A policy that mixes two points draws with it, so that a clip gets the same point in every batch and every run.

    Args:
        views: uint8 `(clips, crops, C, T, S, S)`.

    Returns:
        Numbers in [0, 1), float64 `(clips,)`: a checksum of the middle frame of the middle crop.
    """
    clips, crop_count, _, frames, *_ = views.shape
    middle = views[:, crop_count // 2, :, frames // 2].cpu().contiguous()  # (clips, C, S, S)
    # BLAKE2 rather than CRC-32: images that differ in few bits still give independent numbers.
    digests = (hashlib.blake2b(middle[clip].numpy().tobytes(), digest_size=6).digest() for clip in range(clips))
    return np.array([int.from_bytes(digest, "big") / 2**48 for digest in digests], dtype=np.float64)


def normalise(
    clips: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns `(x / 255 - mean) / std` per channel.

    Args:
        clips: (B, C, T, H, W) uint8, or float32 from 0 to 255, which is overwritten; on any device.
        mean: C values, for pixels in [0, 1]. A tensor on the device of `clips`, such as `TimeSformer.mean`, saves a
            copy from the host, for which the host would wait.
        std: C values, for pixels in [0, 1].
        dtype: Type of the result. The arithmetic is float32.

    Returns:
        (B, C, T, H, W) on the device of `clips`.
    """
    # Mean and std are scaled by 255 instead of the pixels: one operation less on the large tensor.
    shift, scale = (torch.as_tensor(values, device=clips.device).mul(255).view(-1, 1, 1, 1) for values in (mean, std))
    return clips.to(torch.float32).sub_(shift).div_(scale).to(dtype)


def preprocess(model: TimeSformer, clips: Tensor, point: str | None = None) -> Tensor:
    """Makes the input of a model from clips: on its device, in its precision, normalised with its mean and std.

    Args:
        model: The model.
        clips: (B, C, T, S, S) uint8, as `ClipDataset` and `DataLoader` give them.
        point: The point that will run, one of `model.config.points`. The clips are then resized to its frames already,
            before they are normalised: that is faster, and equal up to rounding.

    Returns:
        (B, C, T, S, S), for `model(clips, point)`. The model itself resizes it to the size of a point. With `point`,
        S is the side of the point's frames.
    """
    weight = model.head.weight
    clips = clips.to(weight.device)
    side = clips.shape[-1] if point is None else model.side(point)
    if side == clips.shape[-1]:
        return normalise(clips, model.mean, model.std, weight.dtype)
    if not clips.is_cuda:
        # Few clips at a time: as floats, all of a large batch fit into no cache, and their memory is new each time.
        few = max(1, _FLOATS // clips[0].numel())
        parts = [_small(part, side, model) for part in clips.split(few)]
        return torch.cat(parts)
    return _small(clips, side, model)


def _small(clips: Tensor, side: int, model: TimeSformer) -> Tensor:
    """Resizes clips (B, C, T, S, S) uint8 to frames of a side, and normalises them."""
    planes = resize_frames(
        clips.float().flatten(1, 2), side, align_corners=model.config.align_corners
    )  # (B, C T, side, side)
    # The weights of a resize add up to 1, so that mean and std may follow. That is less work on fewer pixels.
    return normalise(planes.unflatten(1, clips.shape[1:3]), model.mean, model.std, model.head.weight.dtype)


def to_tchw(frames: np.ndarray) -> Tensor:
    """Returns frames (T, H, W, C) as (T, C, H, W), the order of torchvision's transforms. No copy is made."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # (T, H, W, C) -> (T, C, H, W)


def to_cthw(images: Tensor) -> Tensor:
    """Returns images (T, C, H, W) as (C, T, H, W), the order of the model, contiguous."""
    return images.transpose(0, 1).contiguous()  # (T, C, H, W) -> (C, T, H, W)
