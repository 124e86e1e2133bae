"""Decoding whole files: intact files pass, and damage is reported with its place."""

from __future__ import annotations

import random
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from video_files import cut_by_copy, write_video
from videoadapt.data.video.probe import probe
from videoadapt.data.video.verify import verify
from videoadapt.errors import VideoError

FRAMES = 40


def moving(seed: int) -> np.ndarray:
    """Returns a moving texture, (FRAMES, 96, 128, 3) uint8. A flat picture would leave few bits to damage."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (24, 48, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
    frames = np.stack([np.roll(coarse, 3 * t, axis=1)[:96, :128] for t in range(FRAMES)]).astype(int)
    return (frames + rng.integers(-12, 12, frames.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("intact") / "intact.mp4", moving(0), gop=20)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.mp4", "libx265"), ("a.avi", "mpeg4"),
        ("a.webm", "libvpx-vp9"), ("a.mp4", "libsvtav1"),
    ],
)  # fmt: skip
def test_intact_files_have_no_damage(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, FRAMES, codec=codec)
    info = verify(path)
    assert info.damage == ""
    assert (info.reader, info.content) == (probe(path).reader, probe(path).content)


def test_hidden_frames_are_not_damage(tmp_path: Path, intact: Path) -> None:
    path = cut_by_copy(intact, tmp_path / "cut.mp4", 7)
    assert verify(path).damage == ""


def test_images_and_folders_of_images_are_decoded(tmp_path: Path) -> None:
    for number in range(5):
        Image.fromarray(moving(1)[number]).save(tmp_path / f"{number}.png")
    assert verify(tmp_path / "0.png").damage == ""
    assert verify(tmp_path).damage == ""
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    assert verify(tmp_path).damage == "1 of 5 frames damaged, the first 3"
    assert verify(tmp_path).reader == "image"


def test_damage_is_reported_with_its_place_and_selects_pyav(tmp_path: Path, intact: Path) -> None:
    content = bytearray(intact.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    assert probe(path).damage is None
    assert probe(path).reader == probe(intact).reader
    info = verify(path)
    count, of, total, *rest = str(info.damage).split()
    assert (of, total, rest[:4]) == ("of", "40", ["frames", "damaged,", "the", "first"])
    assert 1 <= int(count) <= 20
    assert 5 < int(rest[4]) < 35
    assert info.reader == "pyav"


def test_frames_that_the_decoder_does_not_return_are_reported(tmp_path: Path) -> None:
    """MPEG-4 has pictures that are not coded. The decoder accepts them and returns no frame."""
    intact, path = write_video(tmp_path / "intact.avi", moving(0), codec="mpeg4", b_frames=0), tmp_path / "short.avi"
    not_coded = bytes.fromhex("000001b6505f")  # start code, a P picture, times, and the bit `not coded`
    with av.open(str(intact)) as old, av.open(str(path), "w") as new:
        video = old.streams.video[0]
        copied = new.add_stream_from_template(video)
        for number, packet in enumerate(packet for packet in old.demux(video) if packet.size):
            kept = packet if number < 35 else av.Packet(not_coded)
            kept.pts, kept.dts, kept.time_base, kept.stream = packet.pts, packet.dts, packet.time_base, copied
            new.mux(kept)
    assert re.fullmatch(r"ends after 3[4-6] of 40 frames", str(verify(path).damage))


def test_a_file_without_an_intact_frame_is_refused(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "one.mp4", moving(0)[:1]).read_bytes()
    path = tmp_path / "damaged.mp4"
    path.write_bytes(whole[: len(whole) // 3] + bytes(40) + whole[len(whole) // 3 + 40 :])
    assert probe(path).frames == 1
    with pytest.raises(VideoError, match=r"damaged\.mp4: none of its frames can be decoded"):
        verify(path)
    path.write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"damaged\.mp4: cannot be read"):
        verify(path)


def pixels(path: Path) -> list[np.ndarray]:
    """Returns all frames in grey, or an empty list if decoding fails."""
    try:
        with av.open(str(path)) as container:
            return [frame.to_ndarray(format="gray").astype(int) for frame in container.decode(video=0)]
    except av.FFmpegError:
        return []


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Returns the content with 1 to 20 bits flipped, none in the first and last tenth."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 20)):
        changed[rng.randrange(len(changed) // 10, len(changed) * 9 // 10)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_flipped_bits_that_change_the_picture_are_found(tmp_path: Path, intact: Path) -> None:
    rng = random.Random(0)
    original, path = pixels(intact), tmp_path / "flipped.mp4"
    visible = found = 0
    for _ in range(60):
        path.write_bytes(flipped(intact.read_bytes(), rng))
        now = pixels(path)
        if len(now) == FRAMES and all(abs(a - b).max() <= 16 for a, b in zip(now, original, strict=True)):
            continue
        try:
            damage = verify(path).damage
        except VideoError as error:
            damage = str(error)
        visible += 1
        found += bool(damage)
    assert visible >= 40
    assert found >= 0.95 * visible
