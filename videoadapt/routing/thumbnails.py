"""The thumbnails of the labelled clips, in one file that a later call goes on with.

The file is written with ordinary writes and not through a memory map: a map whose disk is full ends the process with
SIGBUS, and a file that was cut off would be continued with black frames.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError, UserError, plural
from videoadapt.routing.label_rules import Bools
from videoadapt.routing.scores import VERSION, files_digest
from videoadapt.runtime.console import Bar, say
from videoadapt.runtime.files import read_json, write_json
from videoadapt.runtime.inputs import Inputs
from videoadapt.runtime.signals import StopRequest

_LARGE_BYTES = 1e9  # a file above it is announced
SAVE_EVERY = 500  # thumbnails; after an interruption at most so many are read again
# Settings of the model's views. A thumbnail is the whole frame.
_CROPS = ("evaluate.average", "evaluate.spatial_crops", "evaluate.crop_offset", "evaluate.crop_pct")
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # by file systems that cannot reserve space


def read_thumbnails(
    manifest: Manifest, rows: npt.NDArray[np.int64], config: Config
) -> tuple[npt.NDArray[np.uint8], Bools]:
    """Reads the thumbnails of clips into a file under `assigner/`, and resumes where an earlier call stopped.

    The clips that an earlier call could not read are tried again, and so are damaged ones.

    Args:
        manifest: The videos.
        rows: Manifest row of each clip, `(n,)`.
        config: The run's config; `assign` has the size of a thumbnail.

    Returns:
        The thumbnails, uint8 `(n, C, A, s, s)`, which stay on the disk until they are used, and whether each clip could
        be read, `(n,)`.

    Raises:
        RunError: The disk has no space for the file.
        Stopped: A signal asked for a stop; what was read is saved.
    """
    dataset = EvalVideos(manifest, config, temporal_views=1, spatial_crops=1, views=False)
    shape = (len(rows), 3, config.assign.frames, config.assign.size, config.assign.size)
    # Whatever changes a thumbnail is in the file's name.
    inputs = Inputs.of(config, manifest.hash, None, "data", "model", "evaluate")
    digest = inputs.digest(VERSION, rows.tolist(), shape, files_digest(manifest, rows.tolist()), without=_CROPS)
    file = ThumbnailFile(config.run.dir / "assigner" / f"thumbnails-{digest}.npy", shape)
    file.open()
    numbers = np.flatnonzero(~file.found)
    videos = stream(dataset, rows[numbers].tolist())
    bar = Bar("thumbnails", total=len(rows), unit="clips", start=len(rows) - len(numbers))
    with file.writing(), bar, StopRequest() as stop:
        for number, video in zip(numbers.tolist(), videos, strict=True):
            if isinstance(video, VideoViews):
                file.write(number, video.thumbnails[0].numpy())
            else:
                say(f"left out of the fit: {video.path}: {video.cause}")
            bar.step()
            if (number + 1) % SAVE_EVERY == 0 or number == numbers[-1] or stop.requested:
                file.save(number + 1)
            if stop.requested:
                stop.stop()
    return np.load(file.path, mmap_mode="r"), file.found


class ThumbnailFile:
    """A `.npy` file of thumbnails, and beside it a JSON file with its progress and a checksum of each thumbnail.

    Attributes:
        path: The `.npy` file.
        found: Whether the file has the thumbnail of each clip, `(n,)`.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self._progress = path, path.with_suffix(".json")
        self._shape, self._clip_bytes = shape, int(np.prod(shape[1:]))
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self._header = header.getvalue()
        self._bytes = len(self._header) + shape[0] * self._clip_bytes
        self._count = 0  # an earlier call tried the first `_count` clips
        self._checksums = np.zeros(shape[0], dtype=np.uint32)
        self.found: Bools = np.zeros(shape[0], dtype=bool)

    def open(self) -> None:
        """Finds out which thumbnails an earlier call has written. If there are none, reserves the space for all.

        Raises:
            RunError: The disk has no space for the file.
        """
        if not self._resume():
            self._count, self.found[:] = 0, False
            self._reserve()

    def _resume(self) -> bool:
        """Returns whether the file and its progress can be used; says why if not."""
        if not (self.path.exists() and self._progress.exists()):
            return False
        try:
            progress = read_json(self._progress, "it is made again", ["count", "failed"])
            self._count = int(progress["count"])
            self.found[: self._count] = True
            self.found[np.array(progress["failed"], dtype=np.int64)] = False
            if "checksums" in progress:
                self._checksums[: self._count] = progress["checksums"]
        except (UserError, ValueError, TypeError, IndexError, OverflowError) as error:
            text = str(error) if isinstance(error, UserError) else f"{self._progress}: damaged"
            say(f"{text}; all thumbnails are read again")
            return False
        if self.path.stat().st_size != self._bytes:
            say(f"{self.path}: has {self.path.stat().st_size} bytes, not {self._bytes}; all thumbnails are read again")
            return False
        if "checksums" not in progress:
            say(f"{self.path}: was written without checksums, by an older version; damage in it cannot be found")
            return True
        self._drop_damaged()
        return True

    def _drop_damaged(self) -> None:
        with self.path.open("rb") as file:
            if file.read(len(self._header)) != self._header:
                say(f"{self.path}: its header is damaged and is written again")
            damaged = []
            for number in range(self._count):
                thumbnail = file.read(self._clip_bytes)
                if self.found[number] and zlib.crc32(thumbnail) != self._checksums[number]:
                    damaged.append(number)
        self.found[damaged] = False
        if damaged:
            say(f"{self.path}: {len(damaged)} of its {self._count} thumbnails are damaged; these are read again")

    def _reserve(self) -> None:
        """Creates the file at its full size, so that a lack of space shows now and not after hours."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._progress.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if self._bytes > _LARGE_BYTES:
            clips = plural(self._shape[0], "clip")
            say(f"{self.path}: {self._bytes / 1e9:.1f} GB for the thumbnails of {clips}; {free / 1e9:.1f} GB are free")
        if free < self._bytes:
            raise RunError(self._no_space("the disk has too little space"))
        with self.path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._bytes)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    self.path.unlink()
                    raise RunError(self._no_space(os.strerror(error.errno or 0))) from error
                file.truncate(self._bytes)

    def _no_space(self, why: str) -> str:
        return (
            f"{self.path}: {why}, it needs {self._bytes / 1e9:.2f} GB for the thumbnails of "
            f"{plural(self._shape[0], 'clip')}; "
            "free some, or lower assign.frames or assign.size"
        )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Opens the file for `write` and `save`; writes its header.

        Raises:
            RunError: A write fails, for example because the disk is full.
        """
        try:
            with self.path.open("r+b") as self._file:
                self._file.write(self._header)
                yield
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RunError(self._no_space(os.strerror(errno.ENOSPC))) from error

    def write(self, number: int, thumbnail: npt.NDArray[np.uint8]) -> None:
        """Writes the thumbnail of a clip, uint8 `(C, A, s, s)`."""
        content = thumbnail.tobytes()
        self._file.seek(len(self._header) + number * self._clip_bytes)
        self._file.write(content)
        self.found[number], self._checksums[number] = True, zlib.crc32(content)

    def save(self, count: int) -> None:
        """Records that the first `count` clips have been tried."""
        self._file.flush()
        os.fsync(self._file.fileno())  # before the progress file, which must not count thumbnails that a crash loses
        self._count = max(self._count, count)
        failed = np.flatnonzero(~self.found[: self._count]).tolist()
        checksums = self._checksums[: self._count].tolist()
        write_json(self._progress, {"count": self._count, "failed": failed, "checksums": checksums})
