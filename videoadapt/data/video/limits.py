"""Bounds on the size of a video, checked before memory is allocated for it.

A small file can claim large frames, or many of them: compressed black, or a table that states one size for all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from videoadapt.config.sections import DataConfig
from videoadapt.errors import VideoError

_PARENTS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"})  # boxes that hold boxes
_RUNS = frozenset({b"stts", b"ctts"})  # boxes with a run-length code: pairs of a number of samples and a value
_MAX_RUNS = 1 << 22  # that are read
_MAX_DEPTH = 8  # of boxes; ISO/IEC 14496-12 needs 5
# An hour has 108,000 frames at 30 fps, and 170,000 packets of AAC sound.
_OTHER_TRACKS = 4


class Limits(NamedTuple):
    """The largest video that is read. See `data.max_pixels` and `data.max_frames`."""

    max_pixels: int  # of a frame
    max_frames: int

    @classmethod
    def of(cls, data: DataConfig) -> Limits:
        """Returns the limits of a config."""
        return cls(data.max_pixels, data.max_frames)

    def check_pixels(self, path: Path, width: int, height: int) -> None:
        """Raises `VideoError` if a frame of this size is too large."""
        if width * height > self.max_pixels:
            raise VideoError(
                f"{path}: a frame has {width}x{height} = {width * height:,} pixels, more than data.max_pixels "
                f"{self.max_pixels:,}; raise data.max_pixels to read it"
            )

    def check_resized(self, path: Path, width: int, height: int, short_side: int) -> None:
        """Raises `VideoError` if a frame is too large once its short side is resized: a ruler, one pixel high."""
        long_side = max(width, height) * short_side // min(width, height)
        if long_side * short_side > self.max_pixels:
            raise VideoError(
                f"{path}: a frame of {width}x{height} resized to a short side of {short_side} has "
                f"{long_side * short_side:,} pixels, more than data.max_pixels {self.max_pixels:,}; raise "
                "data.max_pixels to read it"
            )

    def check_frames(self, path: Path, frames: int) -> None:
        """Raises `VideoError` if a video has too many frames."""
        if frames > self.max_frames:
            raise VideoError(
                f"{path}: has {frames:,} frames or more, more than data.max_frames {self.max_frames:,}; raise "
                "data.max_frames to read it"
            )

    def check_claims(self, path: Path, file: BinaryIO) -> None:
        """Checks the number of frames that an mp4 or mov states, before FFmpeg allocates an entry for each of them.

        Args:
            path: Its name, for the message.
            file: The open file.

        Raises:
            VideoError: It states too many frames, or too many packets of sound or text.
        """
        frames, others = _claimed_samples(file, os.fstat(file.fileno()).st_size)
        self.check_frames(path, frames)
        if others > _OTHER_TRACKS * self.max_frames:
            raise VideoError(
                f"{path}: states {others:,} packets of sound or text, more than {_OTHER_TRACKS} times data.max_frames "
                f"{self.max_frames:,}; raise data.max_frames to read it"
            )


DEFAULT_LIMITS = Limits.of(DataConfig())


class _Box(NamedTuple):
    """A part of an mp4 or mov; ISO/IEC 14496-12 calls it a box. Its content lies from `start` to `end` of the file."""

    kind: bytes
    start: int
    end: int
    parents: tuple[bytes, ...]


@dataclass
class _Track:
    """What the tables of a track state."""

    kind: bytes = b"vide"
    samples: int = 0
    # Each sample of sound lasts one unit of time. FFmpeg then keeps an entry for a chunk, not for a sample.
    uncompressed: bool = False


def _claimed_samples(file: BinaryIO, size: int) -> tuple[int, int]:
    """Returns the largest number of frames that a video track states, and of packets that another track states.

    Both are 0 for other files. Fragments name no kind of track; they count as video if the file has no other track.
    """
    tracks: list[_Track] = []
    fragmented = 0
    for box in _boxes(file, 0, size, ()):
        if box.kind == b"trak":
            tracks.append(_Track())
        elif box.kind == b"trun":
            fragmented += _number(_read(file, box, 4, 4))
        elif tracks and b"trak" in box.parents:
            _read_table(file, box, tracks[-1])
    frames = max((track.samples for track in tracks if track.kind == b"vide"), default=0)
    others = [0 if track.uncompressed else track.samples for track in tracks if track.kind != b"vide"]
    return (frames, max(*others, fragmented)) if others else (max(frames, fragmented), 0)


def _read_table(file: BinaryIO, box: _Box, track: _Track) -> None:
    if box.kind == b"hdlr" and box.parents[-1] == b"mdia":
        track.kind = _read(file, box, 8, 4)
    elif box.kind in {b"stsz", b"stz2"}:
        track.samples = max(track.samples, _number(_read(file, box, 8, 4)))
    elif box.kind in _RUNS:
        count = _number(_read(file, box, 4, 4))
        data = _read(file, box, 8, 8 * min(count, _MAX_RUNS))
        runs = np.frombuffer(data[: len(data) // 8 * 8], dtype=">u4").reshape(-1, 2)
        if box.kind == b"stts":
            track.uncompressed = track.kind == b"soun" and runs[:, 1].tolist() == [1]
        track.samples = max(track.samples, int(runs[:, 0].sum(dtype=np.int64)))


def _boxes(file: BinaryIO, start: int, end: int, parents: tuple[bytes, ...]) -> Iterator[_Box]:
    """Yields the boxes of an mp4 in the order of the file, parents first, up to the first that is malformed."""
    while start + 8 <= end:
        file.seek(start)
        header = file.read(16)
        length, kind, content = _number(header[:4]), header[4:8], start + 8
        if length == 1 and header[8:]:  # a 64-bit length follows
            length, content = _number(header[8:]), start + 16
        stop = end if length == 0 else start + length  # 0: up to the end
        if not content <= stop <= end:
            return
        yield _Box(kind, content, stop, parents)
        if kind in _PARENTS and len(parents) < _MAX_DEPTH:
            yield from _boxes(file, content, stop, (*parents, kind))
        start = stop


def _read(file: BinaryIO, box: _Box, offset: int, count: int) -> bytes:
    """Reads `count` bytes of a box's content, or fewer at its end."""
    file.seek(box.start + offset)
    return file.read(max(min(count, box.end - box.start - offset), 0))


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
