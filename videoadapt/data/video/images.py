"""Image files, and folders of images that form one video."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from videoadapt.data.video.files import cause_of, digest, file_size, hash_file, reason
from videoadapt.data.video.limits import DEFAULT_LIMITS, Limits
from videoadapt.data.video.suffixes import is_image
from videoadapt.errors import VideoError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FOLDER_FPS = 30.0  # assumed, because images carry no frame rate

_NUMBER = re.compile(r"[0-9]+")
_FLOW_PATTERN = re.compile(r"flow.*|[xy]_?#\..*")  # optical flow is often stored in the folder of its frames
_MAX_PATTERNS_IN_MESSAGE = 4
_OPENING = Lock()
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # Pillow would give PostScript, under any name, to Ghostscript
_ORIENTATION = 0x0112  # the EXIF tag


def image_files(folder: Path) -> list[Path]:
    """Finds the frames in a folder of images.

    The names of frames differ only by their numbers, as in `img_00001.jpg`. Optical flow (`flow_x_00001.jpg`) and
    images without a number are ignored, unless the folder has no other images.

    Returns:
        The frames, sorted by the numbers in their names (2 before 10).

    Raises:
        VideoError: The folder cannot be read, has no images, or has frames of several name patterns.
    """
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]  # macOS leaves `._` files
    except OSError as error:
        raise VideoError(f"{folder}: {error.strerror or error}") from None
    patterns: dict[str, list[str]] = {}  # `img_#.jpg` -> its names
    for name in names:
        if is_image(name):
            patterns.setdefault(_NUMBER.sub("#", name.lower()), []).append(name)
    if not patterns:
        raise VideoError(f"{folder}: a folder without images, not a video")
    frames = [pattern for pattern in patterns if "#" in pattern and not _FLOW_PATTERN.fullmatch(pattern)]
    if len(patterns) == 1:  # unambiguous: a single image without a number is a video of one frame
        frames = list(patterns)
    if len(frames) != 1:
        raise VideoError(
            f"{folder}: holds images named {', '.join(sorted(patterns)[:_MAX_PATTERNS_IN_MESSAGE])}; expected the "
            "frames of one video, whose names differ only by their numbers (#)"
        )
    return [folder / name for name in sorted(patterns[frames[0]], key=_numeric_key)]


def _numeric_key(name: str) -> tuple[list[int], str]:
    # The text around the numbers is the same in all names, except for capitals.
    return [int(number) for number in _NUMBER.findall(name)], name


def hash_images(folder: Path) -> str:
    """Returns 32 hex digits, the hash of the names and bytes of a folder's frames.

    Raises:
        VideoError: The frames cannot be found or read.
    """
    lines = []
    for image in image_files(folder):
        with errors_named_after(folder, image):
            lines.append(f"{image.name}\t{hash_file(image)}\n")
    return digest("".join(lines).encode(errors="surrogateescape")).hexdigest()


@contextmanager
def errors_named_after(folder: Path, image: Path) -> Iterator[None]:
    """Rewrites a `VideoError` about an image, so that the message starts with the folder, the path in the manifest."""
    try:
        yield
    except VideoError as error:
        raise VideoError(f"{folder}: {image.name}: {cause_of(str(image), error)}") from None


def image_codec(path: Path) -> str:
    """Returns the name stored as the codec of an image: its suffix, in lower case and without the dot."""
    return path.suffix.lower().lstrip(".")


def _refuse_animated(path: Path, image: Image.Image) -> None:
    """Raises `VideoError` for an image that is a video: its first frame alone would stand for it.

    The further pictures of a JPEG (MPO, of phones and cameras) are views or previews of the same moment.
    """
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise VideoError(
            f"{path}: an animated image of {getattr(image, 'n_frames', 'several')} frames; convert it to a video, or "
            "to a folder of images"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF orientation demands.

    Pillow's `exif_transpose` also writes the EXIF anew, and fails at any other tag that it cannot write.
    """
    from PIL.Image import Transpose

    turns = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )  # of the orientations 2 to 8
    turn = dict(enumerate(turns, start=2)).get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns a grey PNG of 16 bits with its upper 8 bits: Pillow's own conversion makes nearly all of it white."""
    if not image.mode.startswith("I"):  # of 16 bits, or of 32 in older versions of Pillow
        return image
    from PIL import Image

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _open(path: Path) -> Image.Image:
    """Opens an image of any size, and decodes nothing. Pillow's own limit would hold even where ours is higher."""
    from PIL import Image, WebPImagePlugin  # noqa: F401 - the import makes WebP one of the formats

    with _OPENING:  # the limit is Pillow's alone, for all threads
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_image(path: Path, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Reads an image, turned as its EXIF orientation demands.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        VideoError: The image cannot be read, or is larger than the limits.
    """
    file_size(path)
    try:
        with _open(path) as image:
            limits.check_pixels(path, *image.size)  # nothing is decoded yet
            _refuse_animated(path, image)
            return np.asarray(_eight_bits(_upright(image)).convert("RGB"))
    except VideoError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        cause = reason(error).replace(f" {str(path)!r}", "")  # Pillow repeats the path
        raise VideoError(f"{path}: cannot be read as an image: {cause}") from None
