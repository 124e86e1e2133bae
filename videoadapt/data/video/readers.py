"""Returns the frames of a video by number: decord where it is exact, PyAV elsewhere, Pillow for images."""

from __future__ import annotations

import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from videoadapt.data.video.decoding import (
    DECODE_MODES,
    DecodeMode,
    display_times,
    frames_by_count,
    frames_by_time,
    open_source,
    read_timeline,
)
from videoadapt.data.video.files import reason
from videoadapt.data.video.images import errors_named_after, image_files, read_image
from videoadapt.data.video.limits import DEFAULT_LIMITS, Limits
from videoadapt.data.video.orientation import Orientation
from videoadapt.data.video.probe import VideoInfo, check_unchanged, probe
from videoadapt.errors import UserError, VideoError, plural

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from typing_extensions import Self  # of `typing` since Python 3.11

Indices = Sequence[int] | np.ndarray

_DECORD_BATCH = 8  # frames per call: decord holds a copy of all frames of a call, on top of ours


class VideoReader(ABC):
    """An open video, such as `with open_video("a.mp4") as video: video.frames([0, 8, 16])`.

    `width` and `height` are the size of the frames that `frames` returns. `times_s` has the seconds after the first
    frame at which each frame is displayed, (F,) float64. It is None if the frames are evenly spaced.

    At the end of the `with` block, or by `close`, files are closed and memory of the decoder is freed.
    """

    path: Path
    num_frames: int
    fps: float
    times_s: np.ndarray | None
    width: int
    height: int

    def __len__(self) -> int:
        return self.num_frames

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        size = f"{self.num_frames} frames of {self.width}x{self.height}, {self.fps:.5g} per second"
        return f"<{type(self).__name__} {self.path}: {size}>"

    def close(self) -> None:  # noqa: B027 - most readers open their file anew in each call of `frames`
        """Closes the video. A second call does nothing."""

    @abstractmethod
    def frames(self, indices: Indices) -> np.ndarray:
        """Reads frames.

        Args:
            indices: T frame numbers in any order; repeats are allowed.

        Returns:
            (T, H, W, 3) uint8 RGB, in the order of `indices`.

        Raises:
            VideoError: An index is below 0 or beyond the last frame, a frame cannot be decoded, or the video is closed.
        """


def open_video(
    path: str | Path,
    reader: Literal["auto", "decord", "pyav"] = "auto",
    info: VideoInfo | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> VideoReader:
    """Opens a video, an image, or a folder of images.

    Args:
        path: The file or folder.
        reader: `auto` takes the reader that `probe` trusts with the file.
        info: Result of an earlier `probe` of the same file. It saves the time of another `probe`.
        limits: The largest video that is read.

    Raises:
        VideoError: The file cannot be read (missing, empty, damaged, not a video, larger than the limits), or `reader`
            is `decord` and decord is not exact for the file.
        UserError: `reader` is `decord`, and decord is not installed.
    """
    if _ADDRESS.match(str(path)) and not os.path.exists(path):
        raise VideoError(f"{path}: an address; expected a file: download it, or record the camera to a file")
    path = Path(path)
    if info is None:
        info = probe(path, content=False, limits=limits)
    else:
        limits.check_pixels(path, info.width, info.height)
        limits.check_frames(path, info.frames)
        check_unchanged(path, info)  # a stored result may be older than the file
    if info.reader == "image":
        return ImageReader(path, info, limits)
    if reader == "decord":
        return _trusted_decord(path, info, limits)
    if reader == "auto" and info.reader == "decord" and decord_module() is not None:
        try:
            return DecordReader(path, info, limits)
        except VideoError:
            pass  # decord refuses some valid files, such as mkv of one frame; PyAV reports real errors
    return PyAVReader(path, info, limits=limits)


# Of the text as the user gave it: a Path has one slash where an address has two.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


@functools.cache
def decord_module() -> ModuleType | None:
    """Imports decord and silences its log. Returns None if it is not installed: it has wheels for few platforms."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _trusted_decord(path: Path, info: VideoInfo, limits: Limits) -> DecordReader:
    if decord_module() is None:
        raise UserError("reader decord: it is not installed, or has no wheel for this platform; use auto or pyav")
    if info.reader != "decord":
        why = f"damaged, {info.damage}" if info.damage else f"{info.codec} in {info.container}, {info.width} wide"
        raise VideoError(f"{path}: decord may return wrong frames of this file ({why}); use reader auto or pyav")
    return DecordReader(path, info, limits)


class DecordReader(VideoReader):
    """Reads with decord, which decodes only the packets that the requested frames need.

    It opens a path, never bytes: on damaged bytes decord crashes the process.
    """

    def __init__(self, path: Path, info: VideoInfo, limits: Limits = DEFAULT_LIMITS) -> None:
        decord = decord_module()
        assert decord is not None
        self._error = decord.DECORDError
        self.path, self.fps, self.width, self.height = path, info.fps, info.width, info.height
        self.times_s = _times(path, info, limits)
        try:
            # One thread: the workers of a loader are the parallelism, and more threads cost more CPU in total.
            self._video: Any = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=1)
        except (self._error, RuntimeError, AssertionError) as error:
            raise VideoError(f"{path}: decord cannot open it: {reason(error)}") from None
        self.num_frames = len(self._video)
        if self.num_frames != info.frames:  # a frame number would then mean different frames in the two readers
            raise VideoError(
                f"{path}: decord finds {plural(self.num_frames, 'frame')} in it, PyAV {info.frames}; use reader auto "
                "or pyav"
            )

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        wanted = _checked(self.path, indices, self.num_frames)
        if self._video is None:
            raise VideoError(f"{self.path}: is closed; open it again with open_video")
        out = np.empty((len(wanted), self.height, self.width, 3), np.uint8)  # (T, H, W, C)
        try:
            for start in range(0, len(wanted), _DECORD_BATCH):
                batch = slice(start, start + _DECORD_BATCH)
                out[batch] = self._video.get_batch(wanted[batch]).asnumpy()
        except self._error as error:
            raise VideoError(f"{self.path}: decord cannot decode it: {reason(error)}") from None
        return out

    def close(self) -> None:
        """See `VideoReader.close`."""
        self._video = None  # decord closes the file when its last reference is gone


class PyAVReader(VideoReader):
    """Reads with PyAV, which decodes the packets that the requested frames need. Damaged frames are refused.

    Args:
        path: The video.
        info: Result of `probe`.
        modes: Tried in turn until one returns all frames. The error of the last mode is raised.
        limits: The largest video that is read.
    """

    def __init__(
        self,
        path: Path,
        info: VideoInfo,
        modes: Sequence[DecodeMode] = DECODE_MODES,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.path, self._limits = path, limits
        self.num_frames, self.fps = info.frames, info.fps
        self.width, self.height, self._modes = info.width, info.height, modes
        self.times_s = _times(path, info, limits)

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        wanted = _checked(self.path, indices, self.num_frames)
        if not len(wanted):
            return np.empty((0, self.height, self.width, 3), np.uint8)
        with open_source(self.path, self._limits) as source:
            timeline = read_timeline(source)
            if timeline is None:
                return self._to_rgb(wanted, frames_by_count(source, set(wanted.tolist())))
            if len(timeline.shown) != self.num_frames:
                raise _changed(self.path, len(timeline.shown), self.num_frames)
            *fast, safe = (frames_by_time(source, timeline, set(wanted.tolist()), mode) for mode in self._modes)
            for frames in fast:
                with suppress(VideoError):  # a fast mode also fails on valid files with unusual keyframes
                    return self._to_rgb(wanted, frames)
            return self._to_rgb(wanted, safe)

    def _to_rgb(self, wanted: np.ndarray, frames: Iterable[tuple[int, VideoFrame]]) -> np.ndarray:
        """Converts numbered frames, in any order, to (T, H, W, 3) uint8 RGB in the order of `wanted`."""
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()  # shared by all frames, because it caches its conversion tables
        out = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        for number, frame in frames:
            # A stream may change its size: every frame is resized to the size of the first one.
            orientation = Orientation.of(frame, self.path)
            height, width = orientation.size((self.height, self.width))  # of the stored frame
            rgb = reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
            out[wanted == number] = orientation.turned(rgb)  # a frame may be wanted several times
        return out


class ImageReader(VideoReader):
    """Reads an image as a video of one frame, or a folder of images as one video. Opens only the requested images."""

    def __init__(self, path: Path, info: VideoInfo, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self.path, self.num_frames, self.fps = path, info.frames, info.fps
        self.width, self.height = info.width, info.height
        self.times_s = None
        self._images = image_files(path) if info.container == "folder" else [path]

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        wanted = _checked(self.path, indices, self.num_frames)
        out = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        for number in set(wanted.tolist()):  # each image is read once
            image = self._images[number]
            with errors_named_after(self.path, image) if image != self.path else nullcontext():
                out[wanted == number] = self._read(image)
        return out

    def _read(self, image: Path) -> np.ndarray:
        frame = read_image(image, self._limits)
        if frame.shape[:2] != (self.height, self.width):
            raise VideoError(
                f"{image}: is {frame.shape[1]}x{frame.shape[0]}, but the first image of its video is "
                f"{self.width}x{self.height}; all must have one size"
            )
        return frame


class FrameReader(VideoReader):
    """Reads a video whose frames are in memory, such as those of a camera.

    Args:
        name: Stands for the path in messages and predictions.
        frames: (F, H, W, 3) uint8 RGB.
        fps: Frames per second.
    """

    def __init__(self, name: str, frames: np.ndarray, fps: float) -> None:
        self.path, self.fps, self.times_s, self._frames = Path(name), fps, None, frames
        self.num_frames, self.height, self.width = frames.shape[:3]

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        return self._frames[_checked(self.path, indices, self.num_frames)]


def _times(path: Path, info: VideoInfo, limits: Limits) -> np.ndarray | None:
    """Returns `VideoReader.times_s`. Raises `VideoError` if it cannot be read, or the file has changed."""
    if not info.variable_rate:
        return None
    times_s = display_times(path, limits)
    if len(times_s) != info.frames:
        raise _changed(path, len(times_s), info.frames)
    return times_s


def _changed(path: Path, frames: int, frames_before: int) -> VideoError:
    return VideoError(f"{path}: has {plural(frames, 'frame')}, but had {frames_before} when it was probed")


def _checked(path: Path, indices: Indices, total: int) -> np.ndarray:
    """Returns the indices as (T,) int64. Raises `VideoError` if one is not a frame of the video."""
    wanted = np.asarray(indices, dtype=np.int64)
    outside = wanted[(wanted < 0) | (wanted >= total)]
    if len(outside):
        raise VideoError(f"{path}: has no frame {outside[0]}; it has frames 0 to {total - 1}")
    return wanted
