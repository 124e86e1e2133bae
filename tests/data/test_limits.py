"""Files that claim large frames, or many of them, are refused before memory is allocated for them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from video_files import numbered, write_video
from videoadapt.config.load import make_config
from videoadapt.config.sections import DataConfig
from videoadapt.data.clips.datasets import read_views
from videoadapt.data.index.probe_pool import probe_files
from videoadapt.data.video.limits import Limits
from videoadapt.data.video.probe import probe
from videoadapt.data.video.readers import open_video
from videoadapt.data.video.verify import verify
from videoadapt.errors import VideoError

SMALL = Limits(max_pixels=64 * 96, max_frames=20)
SAMPLES = 50_000_000


def black_png(path: Path, width: int, height: int) -> Path:
    """Writes a grey PNG of zeros, row by row: the file is a thousandth of the picture."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    framed = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    return path


def claim_samples(path: Path, count: int = SAMPLES) -> Path:
    """Rewrites an mp4 so that its track states `count` frames of one byte, as a run of equal ones."""
    write_video(path, 6, b_frames=0)
    data = bytearray(path.read_bytes())
    size, time = data.index(b"stsz"), data.index(b"stts")
    data[size + 8 : size + 16] = struct.pack(">II", 1, count)
    data[time + 12 : time + 16] = struct.pack(">I", count)
    path.write_bytes(data)
    return path


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(VideoError) as caught:
        call()
    return str(caught.value)


def test_an_image_of_13000_by_13000_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = black_png(tmp_path / "bomb.png", 13_000, 130)
    data = bytearray(path.read_bytes())
    data[20:24] = struct.pack(">I", 13_000)  # the header states the full height
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    message = refused(lambda: probe(path))
    assert message == (
        f"{path}: a frame has 13000x13000 = 169,000,000 pixels, more than data.max_pixels 64,000,000; raise "
        "data.max_pixels to read it"
    )


def test_data_max_pixels_alone_bounds_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = black_png(tmp_path / "large.png", 96, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit, which is otherwise 89 million
    assert open_video(path, limits=Limits(6144, 1)).frames([0]).shape == (1, 64, 96, 3)
    assert "more than data.max_pixels 6,143" in refused(lambda: probe(path, limits=Limits(6143, 1)))
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_an_mp4_that_states_50_million_frames_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = claim_samples(tmp_path / "many.mp4")
    monkeypatch.setattr("av.open", lambda *_, **__: pytest.fail("opened"))
    for call in (probe, open_video, verify):
        message = refused(partial(call, path))
        assert message.startswith(f"{path}: has 50,000,000 frames or more, more than data.max_frames 2,000,000; raise ")


def test_a_stated_number_of_frames_counts_for_the_video_alone(tmp_path: Path) -> None:
    path = claim_samples(tmp_path / "sound.mp4")
    data = path.read_bytes()
    path.write_bytes(data.replace(bytes(4) + b"vide", bytes(4) + b"soun"))
    assert "states 50,000,000 packets of sound or text" in refused(lambda: probe(path))
    # Uncompressed sound has a sample for each unit of time; FFmpeg keeps an entry for a chunk alone.
    delta = data.index(b"stts") + 16
    pcm = data[:delta] + struct.pack(">I", 1) + data[delta + 4 :]
    path.write_bytes(pcm.replace(bytes(4) + b"vide", bytes(4) + b"soun"))
    assert "packets" not in refused(lambda: probe(path))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_larger_videos_are_refused_by_every_call(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", 21)
    fits = Limits(64 * 96, 21)
    info = probe(path, limits=fits)
    assert open_video(path, info=info, limits=fits).frames([20]).shape == (1, 64, 96, 3)
    narrow = replace_pixels(fits)
    for limits, words in ((SMALL, r"2[01] frames or more"), (narrow, "96x64 = 6,144 pixels")):
        for call in (probe, open_video, verify):
            with pytest.raises(VideoError, match=words):
                call(path, limits=limits)
        with pytest.raises(VideoError, match=words):
            open_video(path, info=info, limits=limits)


def replace_pixels(limits: Limits) -> Limits:
    return limits._replace(max_pixels=limits.max_pixels - 1)


def test_images_and_folders_of_images_have_the_same_limits(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number, picture in enumerate(numbered(21)):
        Image.fromarray(picture).save(folder / f"{number}.bmp")
    assert "21 frames or more" in refused(lambda: open_video(folder, limits=SMALL))
    assert "96x64 = 6,144 pixels" in refused(lambda: open_video(folder, limits=replace_pixels(Limits(64 * 96, 21))))
    assert "96x64 = 6,144 pixels" in refused(lambda: probe(folder / "0.bmp", limits=replace_pixels(SMALL)))
    Image.fromarray(np.zeros((65, 96, 3), np.uint8)).save(folder / "3.bmp")  # a later one is larger
    video = open_video(folder, limits=Limits(64 * 96, 21))
    assert "96x65 = 6,240 pixels" in refused(lambda: video.frames([3]))


def test_a_result_in_the_cache_does_not_pass_lower_limits(tmp_path: Path) -> None:
    path, cache = str(write_video(tmp_path / "a.mp4", 21)), tmp_path / "probed.jsonl"
    results = [
        probe_files([path], full=False, cache=cache, workers=1, timeout_s=60.0, limits=limits)[path]
        for limits in (Limits(64 * 96, 21), SMALL)
    ]
    assert results[0] == probe(path)
    assert "more than data.max_frames 20" in str(results[1])


def test_the_limits_are_those_of_the_config() -> None:
    data = DataConfig(max_pixels=5, max_frames=7)
    assert Limits.of(data) == (5, 7)
    assert refused(lambda: Limits.of(data).check_frames(Path("a.mp4"), 8)).startswith("a.mp4: has 8 frames or more")


def test_a_picture_that_is_too_large_once_resized_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ruler.png"
    Image.new("RGB", (65_000, 1)).save(path)
    with pytest.raises(VideoError, match=r"ruler.png: a frame of 65000x1 resized to a short side of 224 has 3,2"):
        read_views(open_video(path), make_config({}), temporal_views=1, spatial_crops=1)
