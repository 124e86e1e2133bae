"""Frames of a clip as JPEG files, for pages."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from videoadapt.data.video.frame_sampling import spread

_QUALITY = 80


def jpegs(view: npt.NDArray[np.uint8], *, most: int, side: int) -> list[bytes]:
    """Returns frames of a view as JPEG files.

    Args:
        view: `(C, T, S, S)`.
        most: Number of frames, spread evenly with both ends; a shorter view gives all of its frames.
        side: Pixels of a picture's sides, at most.
    """
    frames = view.transpose(1, 2, 3, 0)  # (C, T, S, S) -> (T, S, S, C)
    return [_jpeg(frames[number], side) for number in spread(len(frames), min(len(frames), most))]


def _jpeg(frame: npt.NDArray[np.uint8], side: int) -> bytes:
    picture, file = Image.fromarray(np.ascontiguousarray(frame)), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return file.getvalue()


def data_uri(jpeg: bytes) -> str:
    """Returns a JPEG file as text that a page can hold."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
