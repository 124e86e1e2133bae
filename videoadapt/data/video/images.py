"""Image files, and folders of images that are one video."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from videoadapt.data.video.files import cause_of, file_size, reason
from videoadapt.errors import VideoError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


# Of the frames of one video the names differ by numbers alone. Optical flow often lies beside them.
_NUMBER = re.compile(r"[0-9]+")


_PATTERNS_SHOWN = 4


_FLOW = re.compile(r"flow.*|[xy]_?#\..*")


IMAGE_FOLDER_FPS = 30.0  # assumed: images do not say how fast they are to be shown


def image_files(folder: Path) -> list[Path]:
    """The frames of a folder of images, in the order of their names, in which numbers count as numbers.

    Names of frames have numbers and differ by these alone, as `img_00001.jpg`; optical flow (`flow_x_00001.jpg`) and
    images without a number are left. Raises `VideoError` if there are no images, or frames of several such names.
    """
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]  # macOS leaves `._` files about
    except OSError as error:
        raise VideoError(f"{folder}: {error.strerror or error}") from None
    patterns: dict[str, list[str]] = {}
    for name in names:
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            patterns.setdefault(_NUMBER.sub("#", name.lower()), []).append(name)
    if not patterns:
        raise VideoError(f"{folder}: a folder without images, not a video")
    frames = [pattern for pattern in patterns if "#" in pattern and not _FLOW.fullmatch(pattern)]
    if len(patterns) == 1:
        frames = list(patterns)
    if len(frames) != 1:
        raise VideoError(
            f"{folder}: holds images named {', '.join(sorted(patterns)[:_PATTERNS_SHOWN])}; expected the frames of one "
            "video, whose names differ by their numbers (#) alone"
        )
    return [folder / name for name in sorted(patterns[frames[0]], key=_natural)]


@contextmanager
def naming(folder: Path, image: Path) -> Iterator[None]:
    """Within it, errors of an image of a folder begin with the folder, as those of a video do."""
    try:
        yield
    except VideoError as error:
        raise VideoError(f"{folder}: {image.name}: {cause_of(str(image), error)}") from None


def _natural(name: str) -> tuple[list[int], str]:
    # All names have the same texts around their numbers, but for capitals.
    return [int(number) for number in _NUMBER.findall(name)], name


def _image_codec(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def read_image(path: Path) -> np.ndarray:
    """An image, (H, W, 3) uint8 RGB, turned as its EXIF orientation says. Raises `VideoError` if it cannot be read."""
    from PIL import Image, ImageOps

    file_size(path)
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        said = reason(error).replace(f" {str(path)!r}", "")
        raise VideoError(f"{path}: cannot be read as an image: {said}") from None
