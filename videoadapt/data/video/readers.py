"""Frames of a video by number: decord where it is right, PyAV elsewhere, Pillow for images and folders of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from videoadapt.data.video.decoding import Way, frames_by_count, frames_by_time, open_source, read_timeline
from videoadapt.data.video.files import reason
from videoadapt.data.video.images import image_files, naming, read_image
from videoadapt.data.video.probe import VideoInfo, check_unchanged, decord_module, probe, upright
from videoadapt.errors import UserError, VideoError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Indices = Sequence[int] | np.ndarray

_DECORD_FRAMES = 8  # at a time

WAYS: tuple[Way, ...] = ("skipping", "selective", "sequential")


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
    """Open a video, an image, or a folder of images. `auto` takes the reader that `probe` trusts with the file.

    `info`, from an earlier `probe` of the same file, saves probing it again. Raises `VideoError` for whatever cannot be
    read (missing, empty, torn, no video in it), and for `decord` on a file that it is not trusted with; `UserError` if
    decord is asked for and not installed.
    """
    path = Path(path)
    if info is None:
        info = probe(path, content=False)
    else:
        check_unchanged(path, info)
    if info.reader == "image":
        return ImageReader(path, info)
    if reader == "decord":
        return _trusted_decord(path, info)
    if reader == "auto" and info.reader == "decord" and decord_module() is not None:
        try:
            return DecordReader(path, info)
        except VideoError:
            pass  # it refuses some sound files, such as mkv of one frame; PyAV judges the others
    return PyAVReader(path, info)


def _trusted_decord(path: Path, info: VideoInfo) -> DecordReader:
    if decord_module() is None:
        raise UserError("reader decord: it is not installed, or has no wheel for this platform; use auto or pyav")
    if info.reader != "decord":
        why = f"damaged, {info.damage}" if info.damage else f"{info.codec} in {info.container}, {info.width} wide"
        raise VideoError(f"{path}: decord may return wrong frames of this file ({why}); use reader auto or pyav")
    return DecordReader(path, info)


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
        out = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        try:
            for start in range(0, len(wanted), _DECORD_FRAMES):  # it copies what it returns
                part = slice(start, start + _DECORD_FRAMES)
                out[part] = self._video.get_batch(wanted[part]).asnumpy()
        except self._error as error:
            raise VideoError(f"{self.path}: decord cannot decode it: {reason(error)}") from None
        return out


class PyAVReader:
    """Decodes what the wanted frames need, and looks whether FFmpeg finds it damaged.

    `ways` are tried in turn, see `frames_by_time`; the last one has the last word on frames that cannot be had.
    """

    def __init__(self, path: Path, info: VideoInfo, ways: Sequence[Way] = WAYS) -> None:
        self.path, self.num_frames, self.fps = path, info.frames, info.fps
        self.width, self.height, self._ways = info.width, info.height, ways

    def __len__(self) -> int:
        return self.num_frames

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        wanted = _checked(self.path, indices, self.num_frames)
        if not len(wanted):
            return np.empty((0, self.height, self.width, 3), np.uint8)
        with open_source(self.path) as source:
            timeline = read_timeline(source)
            if timeline is None:
                return self._gather(wanted, frames_by_count(source, set(wanted.tolist())))
            if len(timeline.shown) != self.num_frames:
                raise VideoError(
                    f"{self.path}: has {len(timeline.shown)} frames, but had {self.num_frames} when it was probed"
                )
            *first, last = (frames_by_time(source, timeline, set(wanted.tolist()), way) for way in self._ways)
            for frames in first:
                with suppress(VideoError):
                    return self._gather(wanted, frames)
            return self._gather(wanted, last)

    def _gather(self, wanted: np.ndarray, frames: Iterable[tuple[int, VideoFrame]]) -> np.ndarray:
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()  # one for all frames: it keeps its tables
        out = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        for number, frame in frames:
            # Upright; if a stream changes its size, as large as its first frame.
            height, width = upright((self.height, self.width), frame.rotation)
            rgb = reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
            out[wanted == number] = np.rot90(rgb, frame.rotation // 90)
        return out


class ImageReader:
    """An image as a video of one frame, or the frames of a folder as one video; opens those that are wanted."""

    def __init__(self, path: Path, info: VideoInfo) -> None:
        self.path, self.num_frames, self.fps = path, info.frames, info.fps
        self.width, self.height = info.width, info.height
        self._images = image_files(path) if path.is_dir() else [path]

    def __len__(self) -> int:
        return self.num_frames

    def frames(self, indices: Indices) -> np.ndarray:
        """See `VideoReader.frames`."""
        wanted = _checked(self.path, indices, self.num_frames)
        out = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        for number in set(wanted.tolist()):
            image = self._images[number]
            with naming(self.path, image) if image != self.path else nullcontext():
                out[wanted == number] = self._read(image)
        return out

    def _read(self, image: Path) -> np.ndarray:
        frame = read_image(image)
        if frame.shape[:2] != (self.height, self.width):
            raise VideoError(
                f"{image}: is {frame.shape[1]}x{frame.shape[0]}, but the first image of its video is "
                f"{self.width}x{self.height}; all must have one size"
            )
        return frame


def _checked(path: Path, indices: Indices, total: int) -> np.ndarray:
    wanted = np.asarray(indices, dtype=np.int64)
    outside = wanted[(wanted < 0) | (wanted >= total)]
    if len(outside):
        raise VideoError(f"{path}: frame {outside[0]} was asked for, but it has frames 0 to {total - 1}")
    return wanted
