"""From decoded frames to what the model takes: crops of uint8 on the host, normalising and mixing on the device.

Resizing is antialiased, bilinear but where `data.interpolation` says otherwise, and not done where the size fits.
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
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from videoadapt.config.sections import DataConfig, ModelConfig
from videoadapt.data.clips.views import _to_cthw, _to_tchw
from videoadapt.runtime.seeds import seed_of, seeded


class Crop(NamedTuple):
    """Where a crop lies: left, top, right and bottom as shares of the frame, and whether it was flipped then."""

    box: tuple[float, float, float, float]
    flipped: bool


def augment(frames: np.ndarray, data: DataConfig, model: ModelConfig, *, seed: int) -> tuple[Tensor, Crop]:
    """A random crop for training: frames (T, H, W, 3) uint8 -> (3, T, size, size) uint8, and where it lies.

    The short side is resized to a random length in `data.short_side` (none: `model.size`) and a random square is cut;
    with `data.crop_area`, a random part of the frame is resized to a square instead. It is flipped left to right with
    probability `data.flip`, and what else `data` asks for is done; all of it the same for all frames. Depends on
    `frames`, the settings and `seed` alone.
    """
    draw = random.Random(seed)
    images, box = _cut(_to_tchw(frames), data, model.size, draw)
    flipped = draw.random() < data.flip
    if flipped:
        images = F.horizontal_flip(images)
    return _to_cthw(recolour(images, data, model, draw.getrandbits(63))), Crop(box, flipped)


def _cut(
    images: Tensor, data: DataConfig, size: int, draw: random.Random
) -> tuple[Tensor, tuple[float, float, float, float]]:
    mode = InterpolationMode(data.interpolation)
    if data.crop_area is None:
        low, high = data.short_side or (size, size)
        images = F.resize(images, [draw.randint(low, high)], interpolation=mode, antialias=True)
        top, left = (draw.randint(0, side - size) for side in images.shape[-2:])
        height = width = size
        square = images[..., top : top + size, left : left + size]
    else:
        top, left, height, width = area_crop(images, data.crop_area, draw.getrandbits(63))
        square = F.resized_crop(images, top, left, height, width, [size, size], interpolation=mode, antialias=True)
    down, along = images.shape[-2:]
    return square, (left / along, top / down, (left + width) / along, (top + height) / down)


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
    """Mixup or cutmix of the clips at positions 2i and 2i + 1 of a step with each other, and soft targets.

    Clips (B, C, T, H, W) floating point and labels (B,) int64 -> clips of the same shape and targets (B, num_classes)
    float32, rows adding to 1. `mixup` and `cutmix` are the alphas of their beta distributions, 0 is off; with both on,
    one is drawn. A pair's draws depend on `seed` and i alone, so that it does not matter which clips are in the batch
    beside it; a clip without its partner is left as it is. `smoothing` spreads that share of the targets over all
    classes.
    """
    targets = functional.one_hot(labels, num_classes).float()
    alphas = {kind: alpha for kind, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0}
    pairs = _pairs(positions) if alphas else []
    mixed, truths = (clips.clone(), targets.clone()) if pairs else (clips, targets)
    for a, b, number in pairs:
        draw = random.Random(seed_of("mix", seed, number))
        kind = draw.choice(sorted(alphas))
        kept = draw.betavariate(alphas[kind], alphas[kind])
        if kind == "mixup":
            mixed[a], mixed[b] = torch.lerp(clips[b], clips[a], kept), torch.lerp(clips[a], clips[b], kept)
        else:
            rows, columns = _box(clips.shape[-2:], 1.0 - kept, draw)
            for here, other in ((a, b), (b, a)):
                mixed[here, ..., rows, columns] = clips[other, ..., rows, columns]
            kept = 1.0 - _length(rows) * _length(columns) / (clips.shape[-2] * clips.shape[-1])
        truths[a], truths[b] = torch.lerp(targets[b], targets[a], kept), torch.lerp(targets[a], targets[b], kept)
    return mixed, smooth(truths, smoothing)


def token_swap(positions: Sequence[int], length: int, *, size: int, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cutmix of tokens: each clip's partner (B,) int64, and the patches (B, N) bool that it takes from there.

    The clips at positions 2i and 2i + 1 of a step are partners. Boxes are drawn on `size` pixels, for seed and i alone,
    and taken to the nearest patches of the length, so that all lengths mix nearly the same; a clip without its
    partner is its own.
    """
    partners = torch.arange(max(len(positions), 1))
    taken = torch.zeros(len(partners), length, length, dtype=torch.bool)
    for a, b, number in _pairs(positions):
        draw = random.Random(seed_of("mix token", seed, number))
        box = _box((size, size), 1.0 - draw.betavariate(alpha, alpha), draw)
        rows, columns = (slice(round(s.start * length / size), round(s.stop * length / size)) for s in box)
        partners[a], partners[b] = b, a
        taken[[a, b], rows, columns] = True
    return partners, taken.flatten(1)


def smooth(targets: Tensor, share: float) -> Tensor:
    """Soft targets (..., classes) with this share spread over all classes."""
    return targets * (1.0 - share) + share / targets.shape[-1]


def _pairs(positions: Sequence[int]) -> list[tuple[int, int, int]]:
    """The places in a batch of the clips at positions 2i and 2i + 1, and i, for each i of which both are there."""
    place = {position: number for number, position in enumerate(positions)}
    return [(place[p], place[p + 1], p // 2) for p in positions if p % 2 == 0 and p + 1 in place]


def _box(size: Sequence[int], share: float, draw: random.Random) -> tuple[slice, slice]:
    """Rows and columns of a box with this share of the area, around any point, cut at the border (CutMix, eq. 2)."""
    slices = []
    for side in size:
        centre, half = draw.randrange(side), side * share**0.5 / 2
        slices.append(slice(max(int(centre - half), 0), min(int(centre + half), side)))
    return slices[0], slices[1]


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length


_RATIOS = (3 / 4, 4 / 3)  # of a random resized crop's sides


_MOST = 9.99  # of 10: there timm posterizes to 0 bits, which is black, and from Pillow 13 on an error


def area_crop(images: Tensor, area: tuple[float, float], seed: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of images (T, C, H, W), its share of them between two limits."""
    with seeded(seed):
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(images, area, _RATIOS)
    return top, left, height, width


def recolour(images: Tensor, data: DataConfig, model: ModelConfig, seed: int) -> Tensor:
    """RandAugment, colour jitter and random erasing, as far as `data` asks for them: (T, C, H, W) uint8, twice."""
    if data.rand_augment is not None:
        images = _rand_augment(images, data.rand_augment, data, model, seed=seed)
    with seeded(seed):
        if data.color_jitter:
            images = v2.ColorJitter(*[data.color_jitter] * 3)(images)
        return _erase(images, data.erase, model) if data.erase else images


def _rand_augment(images: Tensor, text: str, data: DataConfig, model: ModelConfig, *, seed: int) -> Tensor:
    settings = {
        "translate_const": int(model.size * 0.45),
        "img_mean": tuple(round(255 * value) for value in model.mean),
        "interpolation": str_to_pil_interp(data.interpolation),
        "magnitude_max": _MOST,
    }
    policy = rand_augment_transform(text, settings)
    frames = []
    for image in images.permute(0, 2, 3, 1).numpy():  # H W C
        with seeded(seed):  # every frame is drawn for alike
            frames.append(np.asarray(policy(Image.fromarray(image))))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _erase(images: Tensor, probability: float, model: ModelConfig) -> Tensor:
    """A box of noise that is normal once `mean` and `std` have normalised it."""
    noise = torch.full(images.shape[1:], math.nan)
    RandomErasing(probability, mode="pixel", device="cpu")(noise)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    pixels = ((noise * std + mean) * 255).clamp(0, 255).nan_to_num().to(torch.uint8)
    return torch.where(noise.isnan(), images, pixels)
