"""The file of thumbnails: no memory map is written, damage is read again, and a full disk is an error."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import small_runs as runs
from videoadapt.data.index.manifest import SCHEMA, Manifest
from videoadapt.errors import RunError
from videoadapt.routing import thumbnails as module
from videoadapt.routing.thumbnails import ThumbnailFile

SHAPE = (5, 3, 2, 4, 4)
CLIPS = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)


def opened(folder: Path) -> ThumbnailFile:
    file = ThumbnailFile(folder / "assigner" / "thumbnails-1.npy", SHAPE)
    file.open()
    return file


def written(folder: Path, *numbers: int, count: int = 5) -> ThumbnailFile:
    file = opened(folder)
    with file.writing():
        for number in numbers:
            file.write(number, CLIPS[number])
        file.save(count)
    return file


def test_the_file_is_an_array_with_the_thumbnails(tmp_path: Path) -> None:
    file = written(tmp_path, *range(5))
    assert np.array_equal(np.load(file.path), CLIPS)
    assert opened(tmp_path).found.all()
    assert file.path.stat().st_blocks * 512 >= CLIPS.nbytes  # not sparse


def test_a_later_call_goes_on_and_tries_what_could_not_be_read(tmp_path: Path) -> None:
    written(tmp_path, 0, 2, count=3)
    assert opened(tmp_path).found.tolist() == [True, False, True, False, False]
    written(tmp_path, 1, 3, 4)
    assert np.array_equal(np.load(tmp_path / "assigner" / "thumbnails-1.npy"), CLIPS)


@pytest.mark.parametrize("cut", ["array", "progress", "no progress", "progress of other clips"])
def test_a_file_that_was_cut_off_is_read_again_and_not_continued_with_black_frames(
    tmp_path: Path, cut: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, *range(5))
    progress = file.path.with_suffix(".json")
    if cut == "array":
        os.truncate(file.path, 400)
    elif cut == "progress":
        os.truncate(progress, 20)
    elif cut == "no progress":
        progress.unlink()
    else:
        progress.write_text(json.dumps({"count": 5, "failed": [7], "checksums": [1] * 5}))
    assert not opened(tmp_path).found.any()
    assert ("all thumbnails are read again" in capfd.readouterr().err) == (cut != "no progress")
    assert not written(tmp_path, 1).found[0]


def test_other_files_of_the_same_videos_have_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = []
    monkeypatch.setattr(module, "ThumbnailFile", lambda path, _: named.append(path))
    for content in ("old", "new", "new"):
        row = {"path": "a.mp4", "video": "a", "label": 0, "split": "holdout", "status": "ok", "content": content}
        manifest = Manifest(pa.Table.from_pylist([row], schema=SCHEMA), ("x",))
        with pytest.raises(AttributeError):  # nothing is read
            module.read_thumbnails(manifest, np.array([0]), runs.config(tmp_path, tmp_path / "run"))
    assert named[0] != named[1] == named[2]


def test_damaged_thumbnails_are_read_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, *range(5))
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    content[3] ^= 1  # in the header, which is written anew
    file.path.write_bytes(content)
    assert opened(tmp_path).found.tolist() == [True] * 4 + [False]
    assert "thumbnails-1.npy: 1 of its 5 thumbnails are damaged" in capfd.readouterr().err
    written(tmp_path, 4)
    assert np.array_equal(np.load(file.path), CLIPS)


def test_a_file_of_an_older_version_is_continued_with_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, *range(5), count=5)
    array = np.lib.format.open_memmap(file.path, "w+", np.uint8, SHAPE)
    array[:] = CLIPS
    array.flush()
    file.path.with_suffix(".json").write_text(json.dumps({"count": 4, "failed": [1]}))
    assert opened(tmp_path).found.tolist() == [True, False, True, True, False]
    assert "was written without checksums, by an older version" in capfd.readouterr().err


def test_a_disk_without_space_is_an_error_before_the_first_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match=r"thumbnails-1\.npy: the disk has too little space.*lower assign\.frames"):
        opened(tmp_path)
    monkeypatch.undo()

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"thumbnails-1\.npy: No space left on device, it needs"):
        opened(tmp_path)
    assert not list((tmp_path / "assigner").iterdir())


def test_a_disk_that_fills_up_while_writing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(module.os, "posix_fallocate", unsupported)
    file = opened(tmp_path)
    with pytest.raises(RunError, match=r"thumbnails-1\.npy: No space left on device"), file.writing():
        raise OSError(errno.ENOSPC, "No space left on device")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # an ordinary write fails; a memory map would get SIGBUS
    try:
        with pytest.raises(OSError, match="File too large"), file.writing():
            file.write(4, CLIPS[4])
            file.save(5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
