"""A video is read as players show it: turned and mirrored by its display matrix."""

from __future__ import annotations

import shutil
import struct
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from video_files import write_video
from videoadapt.data.video.probe import probe
from videoadapt.data.video.readers import open_video
from videoadapt.errors import VideoError

HEIGHT, WIDTH, ONE = 48, 64, 1 << 16
QUARTERS = {(-1, -1): 30, (1, -1): 90, (-1, 1): 150, (1, 1): 210}  # (x, y) of a quarter of the stored frame: its grey
EIGHT = [(s, 0, 0, t) for s, t in product((1, -1), repeat=2)] + [(0, s, t, 0) for s, t in product((1, -1), repeat=2)]


def with_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """A video of four grey quarters, in which a pixel at (x, y) is displayed at (a x + c y, b x + d y)."""
    frame = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for (x, y), grey in QUARTERS.items():
        rows, columns = (slice(n // 2, n) if v > 0 else slice(0, n // 2) for n, v in ((HEIGHT, y), (WIDTH, x)))
        frame[rows, columns] = grey
    write_video(path, np.stack([frame] * 5))
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd") + 44  # of the matrix in the header of the track
    assert struct.unpack_from(">i", data, start) == (ONE,)
    numbers = (a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, start, *map(int, numbers))
    path.write_bytes(data)
    return path


def quarters(frame: np.ndarray) -> dict[tuple[int, int], int]:
    """The grey in the middle of each quarter of a frame."""
    height, width, _ = frame.shape
    found = {(x, y): frame[(2 + y) * height // 4, (2 + x) * width // 4, 1] for x, y in QUARTERS}
    return {place: min(QUARTERS.values(), key=lambda grey: abs(grey - int(value))) for place, value in found.items()}


@pytest.mark.parametrize("matrix", EIGHT)
def test_frames_are_turned_and_mirrored(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = with_matrix(tmp_path / "a.mp4", *matrix)
    a, b, c, d = matrix
    shown = open_video(path).frames([3])[0]
    assert shown.shape == ((HEIGHT, WIDTH, 3) if a else (WIDTH, HEIGHT, 3))
    assert quarters(shown) == {(a * x + c * y, b * x + d * y): grey for (x, y), grey in QUARTERS.items()}
    if ffmpeg := shutil.which("ffmpeg"):
        command = [ffmpeg, "-v", "error", "-i", str(path), "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        assert quarters(np.frombuffer(raw, np.uint8).reshape(shown.shape)) == quarters(shown)


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1)])
def test_a_matrix_without_an_inverse_turns_nothing(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = with_matrix(tmp_path / "a.mp4", *matrix)
    assert probe(path).rotation == 0
    assert quarters(open_video(path).frames([3])[0]) == QUARTERS


def test_other_angles_are_refused(tmp_path: Path) -> None:
    path = with_matrix(tmp_path / "a.mp4", 0.8, 0.6, -0.6, 0.8)
    with pytest.raises(VideoError, match=r"a\.mp4: it is to be turned by 37 degrees .* encode it upright"):
        probe(path)
