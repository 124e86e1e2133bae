"""timm's augmentations of images, the same for all frames of a clip: random resized crops, RandAugment, erasing.

timm draws from the global generators of Python, NumPy and torch: `seeded` must surround every call.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision.transforms import v2

from videoadapt.config.sections import DataConfig, ModelConfig
from videoadapt.runtime.seeds import seeded

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
