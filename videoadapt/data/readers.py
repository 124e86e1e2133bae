"""Frames of a video file by number: decord where it is right, PyAV elsewhere, Pillow for images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from videoadapt.data.probe import (
    VideoInfo,
    decord_module,
    file_size,
    open_container,
    probe,
    read_image,
    reason,
    upright,
)
from videoadapt.errors import UserError, VideoError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Indices = Sequence[int] | np.ndarray


class VideoReader(Protocol):
    """An open video; `width` and `height` are those of the frames that `frames` returns."""

    path: Path
    num_frames: int
    fps: float
    width: int
    height: int

    def __len__(self) -> int: ...

    def frames(self, indices: Indices) -> np.ndarray:
        """Frames by number, (T, H, W, 3) uint8 RGB, in the order asked for; repeats are allowed.

        Raises `VideoError` for an index below 0 or beyond the last frame, and for frames that cannot be decoded.
        """
        ...


def open_video(
    path: str | Path, reader: Literal["auto", "decord", "pyav"] = "auto", info: VideoInfo | None = None
) -> VideoReader:
    """Open a video or an image. `auto` takes the reader that `probe` trusts; images have a reader of their own.

    `info`, from an earlier `probe` of the same file, saves probing it again. Raises `VideoError` for whatever cannot be
    read (missing, a folder, empty, torn, no video in it), `UserError` if decord is asked for and not installed.
    """
    path = Path(path)
    if info is None:
        info = probe(path)
    elif (size := file_size(path)) != info.bytes:
        raise VideoError(f"{path}: has {size} bytes, but had {info.bytes} when it was indexed; run `videoadapt index`")
    if info.reader == "image":
        return ImageReader(path)
    if reader == "decord" and decord_module() is None:
        raise UserError("reader decord: it is not installed, or has no wheel for this platform; use auto or pyav")
    if reader == "decord":
        return DecordReader(path, info)
    # A manifest may come from a machine that has decord.
    if reader == "auto" and info.reader == "decord" and decord_module() is not None:
        try:
            return DecordReader(path, info)
        except VideoError:
            pass  # it refuses some sound files, such as mkv of one frame; PyAV judges the others
    return PyAVReader(path, info)


class DecordReader:
    """Decodes only what the wanted frames need. From a path, never from bytes: damaged ones crash the process."""

    def __init__(self, path: Path, info: VideoInfo) -> None:
        decord = decord_module()
        assert decord is not None
        self._error = decord.DECORDError
        self.path, self.fps, self.width, self.height = path, info.fps, info.width, info.height
        try:
            # More threads cost more CPU in all; the workers of a loader are the parallelism.
            self._video = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=1)
        except (self._error, RuntimeError, AssertionError) as error:
            raise VideoError(f"{path}: decord cannot open it: {reason(error)}") from None
        self.num_frames = len(self._video)
        if self.num_frames != info.frames:
            raise VideoError(
                f"{path}: decord finds {self.num_frames} frames in it, PyAV {info.frames}; use reader auto or pyav"
            )

    def __len__(self) -> int:
        return self.num_frames

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        wanted = _checked(self.path, indices, self.num_frames)
        if not len(wanted):
            return np.empty((0, self.height, self.width, 3), np.uint8)
        try:
            frames: np.ndarray = self._video.get_batch(wanted).asnumpy()
        except self._error as error:
            raise VideoError(f"{self.path}: decord cannot decode it: {reason(error)}") from None
        return frames


class PyAVReader:
    """Decodes from the start to the last wanted frame, and looks whether FFmpeg calls a frame damaged."""

    def __init__(self, path: Path, info: VideoInfo) -> None:
        self.path, self.num_frames, self.fps = path, info.frames, info.fps
        self.width, self.height = info.width, info.height

    def __len__(self) -> int:
        return self.num_frames

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        wanted = _checked(self.path, indices, self.num_frames)
        out = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        if not len(wanted):
            return out
        with open_container(self.path) as (container, stream):
            number = -1
            for number, frame in enumerate(container.decode(stream)):
                # Later frames may be predicted from a damaged one, wanted or not.
                if frame.is_corrupt:
                    raise VideoError(f"{self.path}: frame {number} is damaged")
                if (places := wanted == number).any():
                    out[places] = self._rgb(frame)
                if number == wanted.max():
                    return out
        raise VideoError(f"{self.path}: ended after {number + 1} of {self.num_frames} frames")

    def _rgb(self, frame: VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8, turned as to be shown; if a stream changes its size, as large as its first frame."""
        height, width = upright((self.height, self.width), frame.rotation)
        rgb = frame.reformat(width=width, height=height, format="rgb24", threads=1).to_ndarray()
        return np.rot90(rgb, frame.rotation // 90)


class ImageReader:
    """An image as a video of one frame, at 1 frame a second."""

    def __init__(self, path: Path) -> None:
        self._frame = read_image(path)
        self.path, self.num_frames, self.fps = path, 1, 1.0
        self.height, self.width = self._frame.shape[:2]

    def __len__(self) -> int:
        return 1

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        return self._frame[None][_checked(self.path, indices, 1)]


def _checked(path: Path, indices: Indices, total: int) -> np.ndarray:
    wanted = np.asarray(indices, dtype=np.int64)
    outside = wanted[(wanted < 0) | (wanted >= total)]
    if len(outside):
        raise VideoError(f"{path}: frame {outside[0]} was asked for, but it has frames 0 to {total - 1}")
    return wanted
