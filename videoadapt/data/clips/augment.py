"""Training augmentation: random crops on the CPU (uint8), mixup, cutmix and MixToken on the device.

timm provides RandAugment, random erasing and random resized crops. Resizing is skipped if the size already fits.
Every random draw has a seed, so that it does not depend on the number of workers or ranks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from videoadapt.config.sections import DataConfig, ModelConfig
from videoadapt.data.clips.views import resize, to_cthw, to_tchw
from videoadapt.runtime.seeds import seed_of, seeded

# Left, top, right and bottom of a crop, as fractions of the frame.
Box = tuple[float, float, float, float]

_ASPECT_RATIOS = (3 / 4, 4 / 3)  # aspect ratios of a random resized crop, as in timm and torchvision
# timm's scale ends at 10. At 10, "posterize" keeps 0 bits: a black picture, and from Pillow 13 on an error.
_MAX_MAGNITUDE = 9.99
_TRANSLATE_FRACTION = 0.45  # RandAugment's longest shift, as a fraction of the image side, as in timm's ImageNet recipe


class Crop(NamedTuple):
    """The part of the frame that a training clip shows. `flipped`: mirrored left to right after the crop."""

    box: Box
    flipped: bool


def augment(frames: np.ndarray, data: DataConfig, model: ModelConfig, *, seed: int) -> tuple[Tensor, Crop]:
    """Cuts a random training crop. All frames get the same crop, flip, colours and erased box.

    Without `data.crop_area`, the short side is resized to a random length in `data.short_side` (None: `model.size`) and
    a random square is cut (TimeSformer). With `data.crop_area`, a random part of the frame is resized to a square
    (Inception, DeiT). Then the crop is mirrored with probability `data.flip`, and RandAugment, colour jitter and random
    erasing follow where `data` enables them.

    Args:
        frames: (T, H, W, 3) uint8.
        data: Settings of the augmentation.
        model: The side of the crop, and the mean and standard deviation for erasing.
        seed: The only source of randomness; global generators are neither read nor changed.

    Returns:
        The clip (3, T, size, size) uint8, contiguous, and the position of the crop.
    """
    draw = random.Random(seed)
    images, box = _random_crop(to_tchw(frames), data, model.size, draw)
    flipped = draw.random() < data.flip
    if flipped:
        images = F.horizontal_flip(images)
    return to_cthw(_change_colours(images, data, model, draw.getrandbits(63))), Crop(box, flipped)


def _random_crop(images: Tensor, data: DataConfig, size: int, draw: random.Random) -> tuple[Tensor, Box]:
    """Cuts a random square: (T, C, H, W) -> (T, C, size, size). Also returns its position."""
    if data.crop_area is None:
        low, high = data.short_side or (size, size)
        images = resize(images, [draw.randint(low, high)], data.interpolation, antialias=data.antialias)
        top, left = (draw.randint(0, side - size) for side in images.shape[-2:])
        height = width = size
        square = images[..., top : top + size, left : left + size]  # (T, C, size, size)
    else:
        with seeded(draw.getrandbits(63)):  # timm draws from the global generators
            top, left, height, width = RandomResizedCropAndInterpolation.get_params(
                images, data.crop_area, _ASPECT_RATIOS
            )
        part = F.crop(images, top, left, height, width)
        square = resize(part, [size, size], data.interpolation, antialias=data.antialias)
    frame_height, frame_width = images.shape[-2:]
    box = (left / frame_width, top / frame_height, (left + width) / frame_width, (top + height) / frame_height)
    return square, box


def _change_colours(images: Tensor, data: DataConfig, model: ModelConfig, seed: int) -> Tensor:
    """Applies RandAugment, colour jitter and random erasing if enabled: (T, C, H, W) uint8 -> the same shape.

    Each has a seed of its own: from one seed, erasing would follow the draws that decide RandAugment's first operation.
    """
    if data.rand_augment is not None:
        images = _rand_augment(images, data.rand_augment, data, model, seed=seed)
    if data.color_jitter:
        with seeded(seed_of("jitter", seed)):
            images = v2.ColorJitter(*[data.color_jitter] * 3)(images)  # brightness, contrast, saturation
    if data.erase:
        with seeded(seed_of("erase", seed)):
            images = _erase(images, data.erase, model)
    return images


def _rand_augment(images: Tensor, policy_text: str, data: DataConfig, model: ModelConfig, *, seed: int) -> Tensor:
    settings = {
        "translate_const": int(model.size * _TRANSLATE_FRACTION),
        "img_mean": tuple(round(255 * value) for value in model.mean),  # fills the area that a shift uncovers
        "interpolation": str_to_pil_interp(data.interpolation),
        "magnitude_max": _MAX_MAGNITUDE,
    }
    policy = rand_augment_transform(policy_text, settings)
    frames = []
    for image in images.permute(0, 2, 3, 1).numpy():  # (T, C, H, W) -> T times (H, W, C)
        with seeded(seed):  # again for each frame, so that all frames get the same draws
            frames.append(np.asarray(policy(Image.fromarray(image))))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # (T, H, W, C) -> (T, C, H, W)


def _erase(images: Tensor, probability: float, model: ModelConfig) -> Tensor:
    """Fills a random box with noise that has mean 0 and standard deviation 1 after `normalise` (random erasing)."""
    noise = torch.full(images.shape[1:], math.nan)  # (C, H, W); timm writes noise into a box, NaN marks the rest
    RandomErasing(probability, mode="pixel", device="cpu")(noise)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    pixels = ((noise * std + mean) * 255).clamp(0, 255).nan_to_num().to(torch.uint8)  # inverts `normalise`
    return torch.where(noise.isnan(), images, pixels)  # (C, H, W) broadcasts over the T frames


def mix(  # noqa: PLR0913 - settings, by name
    clips: Tensor,
    labels: Tensor,
    positions: Sequence[int],
    *,
    num_classes: int,
    mixup: float,
    cutmix: float,
    smoothing: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Applies mixup or cutmix to pairs of clips, and makes soft targets.

    The clips at positions 2i and 2i + 1 of a step are mixed with each other. The draws of a pair depend on `seed` and i
    alone, so that the layout of ranks and micro-batches does not change the result. A clip without its partner stays
    unmixed.

    Args:
        clips: (B, C, T, H, W) floating point.
        labels: (B,) int64.
        positions: Position of each of the B clips in the step, counted over all ranks.
        num_classes: Width of the targets.
        mixup: Both parameters of mixup's beta distribution; 0 disables mixup.
        cutmix: The same for cutmix. If both are enabled, each pair draws one of them.
        smoothing: Fraction of each target that is spread over all classes (label smoothing), in [0, 1].
        seed: Seed of the step.

    Returns:
        Clips of the same shape (the same tensor if no pair is mixed), and targets (B, num_classes) float32 whose rows
        add to 1.
    """
    targets = functional.one_hot(labels, num_classes).float()  # (B,) -> (B, num_classes)
    alphas = {kind: alpha for kind, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0}
    pairs = _pairs(positions) if alphas else []
    mixed, mixed_targets = (clips.clone(), targets.clone()) if pairs else (clips, targets)
    for a, b, pair in pairs:
        draw = random.Random(seed_of("mix", seed, pair))
        kind = draw.choice(sorted(alphas))
        kept = draw.betavariate(alphas[kind], alphas[kind])  # fraction of each clip that stays
        if kind == "mixup":
            mixed[a], mixed[b] = torch.lerp(clips[b], clips[a], kept), torch.lerp(clips[a], clips[b], kept)
        else:
            rows, columns = _random_box(clips.shape[-2:], 1.0 - kept, draw)
            for clip, partner in ((a, b), (b, a)):
                mixed[clip, ..., rows, columns] = clips[partner, ..., rows, columns]
            # The border may have cut the box, so its pixels are counted.
            kept = 1.0 - _length(rows) * _length(columns) / (clips.shape[-2] * clips.shape[-1])
        mixed_targets[a] = torch.lerp(targets[b], targets[a], kept)
        mixed_targets[b] = torch.lerp(targets[a], targets[b], kept)
    return mixed, smooth(mixed_targets, smoothing)


def token_swap(positions: Sequence[int], length: int, *, size: int, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the patches that each clip takes from its partner (MixToken: LV-ViT, section 3.3).

    The clips at positions 2i and 2i + 1 of a step are partners. A box is drawn in pixels from `seed` and i alone, and
    rounded to the patches of `length`, so that all lengths swap nearly the same region.

    Args:
        positions: Position of each of the B clips in the step, counted over all ranks.
        length: Patches per side of a frame.
        size: Side of a frame, in pixels.
        alpha: Both parameters of the beta distribution of the box's area.
        seed: Seed of the step.

    Returns:
        Partners (B,) int64, as indices into the batch, and a mask (B, N) bool of the patches that come from the
        partner. A clip without its partner is its own partner, with an empty mask. B is at least 1.
    """
    partners = torch.arange(max(len(positions), 1))
    swapped = torch.zeros(len(partners), length, length, dtype=torch.bool)
    for a, b, pair in _pairs(positions):
        draw = random.Random(seed_of("mix token", seed, pair))
        box = _random_box((size, size), 1.0 - draw.betavariate(alpha, alpha), draw)
        rows, columns = (slice(round(s.start * length / size), round(s.stop * length / size)) for s in box)
        partners[a], partners[b] = b, a
        swapped[[a, b], rows, columns] = True
    return partners, swapped.flatten(1)  # (B, length, length) -> (B, N)


def smooth(targets: Tensor, fraction: float) -> Tensor:
    """Spreads `fraction` of each target evenly over all classes (label smoothing): (..., classes)."""
    return targets * (1.0 - fraction) + fraction / targets.shape[-1]


def _pairs(positions: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns, for each pair i with both clips in the batch, the batch indices of positions 2i and 2i + 1, and i."""
    index_of = {position: index for index, position in enumerate(positions)}
    return [(index_of[p], index_of[p + 1], p // 2) for p in positions if p % 2 == 0 and p + 1 in index_of]


def _random_box(size: Sequence[int], area: float, draw: random.Random) -> tuple[slice, slice]:
    """Draws rows and columns of a box that covers the fraction `area` of an image (CutMix, eq. 2).

    The centre is uniform over the image, and the border cuts the box.
    """
    slices = []
    for side in size:
        centre, half = draw.randrange(side), side * area**0.5 / 2
        slices.append(slice(max(int(centre - half), 0), min(int(centre + half), side)))
    return slices[0], slices[1]


def _length(interval: slice) -> int:
    length: int = interval.stop - interval.start
    return length
