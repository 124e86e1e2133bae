"""The test views of TimeSformer's public code, written again from its description, with numpy alone."""

from __future__ import annotations

import math

import numpy as np


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation without antialiasing, by its definition: (H, W, C) to (height, width, C), float64."""

    def along_first_axis(values: np.ndarray, size: int) -> np.ndarray:
        centres = np.maximum((np.arange(size) + 0.5) * len(values) / size - 0.5, 0)
        below = centres.astype(int)
        fraction = (centres - below)[:, None, None]
        return values[below] * (1 - fraction) + values[np.minimum(below + 1, len(values) - 1)] * fraction

    wide = along_first_axis(image.astype(np.float64).swapaxes(0, 1), width).swapaxes(0, 1)
    return along_first_axis(wide, height)


def three_crops(image: np.ndarray, size: int) -> list[np.ndarray]:
    """The three test crops (size, size, C) of an image (H, W, C), before they are rounded to grey levels."""
    height, width = image.shape[:2]
    new_height = size if height <= width else math.floor(height / width * size)
    new_width = size if width <= height else math.floor(width / height * size)
    resized = bilinear(image, new_height, new_width)
    top, left = math.ceil((new_height - size) / 2), math.ceil((new_width - size) / 2)
    if new_height > new_width:
        corners = [(y, left) for y in (0, top, new_height - size)]
    else:
        corners = [(top, x) for x in (0, left, new_width - size)]
    return [resized[y : y + size, x : x + size] for y, x in corners]


def first_clip(total: int, clip_frames: int, num_frames: int) -> list[int]:
    """The frames of the only clip of a video: it starts at frame 0, and the last frame repeats if it is too long."""
    return np.clip(np.linspace(0, clip_frames - 1, num_frames), 0, total - 1).astype(int).tolist()
