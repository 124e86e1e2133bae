"""Damaged files: a reader returns intact frames or raises a `VideoError`. It does not crash and does not hang."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
from pebble import ProcessPool
from PIL import Image
from test_frame_accuracy import real_clips

from video_files import numbered, numbers_of, write_video
from videoadapt.data.video.decoding import DECODE_MODES, DecodeMode, decode, open_source
from videoadapt.data.video.probe import VideoInfo, probe
from videoadapt.data.video.readers import PyAVReader, open_video
from videoadapt.errors import VideoError

FRAMES, FPS, GOP = 40, 8, 20  # five seconds, two keyframes
FLIPPED_FILES = 100
TIMEOUT_S = 20
CLIP = np.linspace(0, FRAMES - 1, 8).astype(int)  # as in training: 8 frames spread over the video

InProcesses = Callable[[Callable[[Path], Any], Sequence[Path]], list[Any]]


class Digests(NamedTuple):
    """Hashes of the clip's frames by plain decoding and by two readers. None: an error was raised."""

    plain: str | None
    pyav: str | None
    auto: str | None


def digest(frames: np.ndarray) -> str:
    return hashlib.blake2b(frames.tobytes()).hexdigest()


def plain(path: Path) -> np.ndarray:
    """Returns the clip, (8, H, W, 3), decoded without a check for damage."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        wanted = {n: f.to_ndarray(format="rgb24") for n, f in enumerate(container.decode(video=0)) if n in CLIP}
    return np.stack([wanted[number] for number in CLIP])


def digests(path: Path) -> Digests:
    def attempt(read: Callable[[], np.ndarray], errors: Any = VideoError) -> str | None:
        try:
            return digest(read())
        except errors:
            return None

    return Digests(
        attempt(lambda: plain(path), (av.FFmpegError, LookupError, AttributeError, UnicodeDecodeError)),
        attempt(lambda: open_video(path, "pyav").frames(CLIP)),
        attempt(lambda: open_video(path).frames(CLIP)),
    )


def error_message(path: Path) -> str:
    """Returns the message of the error that a reader raises, or an empty string."""
    try:
        open_video(path).frames([0])
    except VideoError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def in_processes() -> Iterator[InProcesses]:
    """Returns a function that calls another one for each file. It raises if a process crashes or exceeds TIMEOUT_S."""
    # Not fork: pebble forks in a thread, and a PyAV scaler that the main thread holds then waits for ever in the child.
    with ProcessPool(max_workers=2, context=multiprocessing.get_context("forkserver")) as pool:
        yield lambda function, paths: list(pool.map(function, paths, timeout=TIMEOUT_S).result())


def textured(frames: int, height: int, width: int) -> np.ndarray:
    """Returns a moving grainy picture, (T, H, W, 3) uint8. A flat one would leave few bits to damage."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((width // 2, height // 2)).resize((width, height)))
    return np.stack([np.roll(picture, (number, 2 * number), axis=(0, 1)) for number in range(frames)])


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "a.mp4"
    return write_video(path, textured(FRAMES, 256, 340), fps=FPS, gop=GOP, options={"crf": "28"})


def flipped(data: bytes, seed: int) -> bytes:
    """Returns the data with 1, 3, 10 or 30 bits flipped."""
    rng, out = random.Random(seed), bytearray(data)
    for _ in range(rng.choice([1, 3, 10, 30])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def test_flipped_bits_are_detected(
    in_processes: InProcesses, intact: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    data, good = intact.read_bytes(), digest(plain(intact))
    paths = [tmp_path / f"{seed}.mp4" for seed in range(FLIPPED_FILES)]
    for seed, path in enumerate(paths):
        path.write_bytes(flipped(data, seed))
    files = in_processes(digests, paths)
    silent = [a for a in files if a.plain not in {None, good}]
    counts = {
        "refused by plain decoding": sum(a.plain is None for a in files),
        "unchanged": sum(a.plain == good for a in files),
        "silently damaged": len(silent),
        "of these detected by pyav": sum(a.pyav in {None, good} for a in silent),
        "of these detected by auto": sum(a.auto in {None, good} for a in silent),
    }
    print(counts)
    for name, count in counts.items():
        record_property(name, count)
    assert len(silent) > FLIPPED_FILES / 2
    assert counts["of these detected by pyav"] >= 0.95 * len(silent)


FORMATS = {
    "h264.mkv": "libx264",
    "h264.ts": "libx264",
    "h264.flv": "libx264",
    "hevc.mp4": "libx265",
    "vp9.webm": "libvpx-vp9",
    "av1.mp4": "libsvtav1",
    "mpeg4.avi": "mpeg4",
    "mpeg2.mpg": "mpeg2video",
}


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bits_in_any_format_give_frames_or_an_error(
    in_processes: InProcesses, tmp_path: Path, name: str
) -> None:
    data = write_video(tmp_path / name, 30, codec=FORMATS[name]).read_bytes()
    paths = [tmp_path / f"{seed}{name}" for seed in range(25)]
    for seed, path in enumerate(paths):
        path.write_bytes(flipped(data, seed))
    for shape in in_processes(shape_of_clip, paths):
        assert shape in {None, (2, 3)}


def shape_of_clip(path: Path) -> tuple[int, int] | None:
    """Returns number of frames and channels, the same for both readers. None: a reader raised a `VideoError`."""
    try:
        both = [open_video(path, "pyav").frames([0, 20]), open_video(path).frames([0, 20])]
    except VideoError:
        return None
    assert both[0].shape == both[1].shape
    return both[0].shape[0], both[0].shape[3]


def test_a_hole_never_becomes_a_picture(in_processes: InProcesses, intact: Path, tmp_path: Path) -> None:
    data, good = intact.read_bytes(), digest(plain(intact))
    paths = []
    for seed in range(30):
        rng = random.Random(seed)
        length = rng.choice([100, 1000, 4096])
        start = rng.randrange(len(data) - length)
        paths.append(tmp_path / f"{seed}.mp4")
        paths[-1].write_bytes(data[:start] + bytes(length) + data[start + length :])
    files = in_processes(digests, paths)
    assert {a.pyav for a in files} <= {None, good}
    assert any(a.plain not in {None, good} for a in files)


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "a.mkv", "a.ts", "a.avi"])
def test_frames_before_the_cut_of_a_shortened_file_are_intact(
    in_processes: InProcesses, tmp_path: Path, name: str
) -> None:
    muxer = {"movflags": "faststart"} if name == "fast.mp4" else None
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = write_video(tmp_path / name, 60, codec=codec, muxer=muxer)
    whole, data = open_video(path).frames(range(60)), path.read_bytes()
    paths = [tmp_path / f"{percent}{name}" for percent in range(5, 100, 12)]
    for percent, short in zip(range(5, 100, 12), paths, strict=True):
        short.write_bytes(data[: len(data) * percent // 100])
    for frames in in_processes(readable_frames, paths):
        for number, frame in frames.items():
            # Just before the cut, frames may be missing, so that a number gets one of the next two frames.
            assert any(np.array_equal(frame, whole[later]) for later in range(number, min(number + 3, 60)))


def readable_frames(path: Path) -> dict[int, np.ndarray]:
    """Returns the frames that can still be read, by number."""
    frames: dict[int, np.ndarray] = {}
    try:
        video = open_video(path, "pyav")
    except VideoError:
        return frames
    for number in range(len(video)):
        try:
            frames[number] = video.frames([number])[0]
        except VideoError:
            continue
    return frames


def damaged_in_the_first_half(tmp_path: Path) -> tuple[Path, VideoInfo]:
    """Writes a video of two keyframes and overwrites a packet of its first half with random bytes."""
    path = write_video(
        tmp_path / "a.mp4", textured(40, 64, 96), gop=20, b_frames=0, options={"x264-params": "scenecut=0"}
    )
    with open_source(path) as source:
        packet = list(source.packets)[8]
        assert packet.pos is not None
        start, length = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start + 20 : start + length] = random.Random(0).randbytes(length - 20)
    path.write_bytes(data)
    return path, probe(path)


@pytest.mark.parametrize("modes", [DECODE_MODES, *((mode,) for mode in DECODE_MODES)], ids=str)
def test_damage_reaches_the_frames_up_to_the_next_keyframe(tmp_path: Path, modes: tuple[DecodeMode, ...]) -> None:
    path, info = damaged_in_the_first_half(tmp_path)
    video = PyAVReader(path, info, modes)
    assert len(video.frames([0, 7, 20, 30, 39])) == 5
    for number in (8, 9, 19):
        with pytest.raises(VideoError, match=rf"a.mp4: frame {number} is damaged"):
            video.frames([0, number, 39])


def test_damage_of_the_first_packet_leaves_the_later_keyframes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(60), gop=20, b_frames=0, options={"x264-params": "scenecut=0"})
    with av.open(str(path)) as container:
        first = next(packet for packet in container.demux(video=0))
    assert first.pos is not None
    data = bytearray(path.read_bytes())
    data[first.pos : first.pos + first.size] = random.Random(0).randbytes(first.size)
    path.write_bytes(data)
    video = open_video(path)
    assert numbers_of(video.frames([20, 39, 59])) == [20, 39, 59]
    for number in (0, 19):
        with pytest.raises(VideoError, match=rf"a.mp4: frame {number} is damaged"):
            video.frames([number])


def test_files_that_are_not_videos_are_refused(in_processes: InProcesses, tmp_path: Path) -> None:
    rng = random.Random(0)
    contents = {
        "text.mp4": b"no video\n" * 999,
        "empty.mp4": b"",
        "random.mp4": rng.randbytes(9999),
        "zeros.avi": bytes(9999),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(numbered(1)[0]).save(tmp_path / "png.mp4", format="png")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    paths = sorted(tmp_path.iterdir())
    messages = in_processes(error_message, paths)
    assert len(messages) == len(contents) + 3
    for path, message in zip(paths, messages, strict=True):
        assert message.startswith(f"{path}: ")


def test_no_false_alarm_on_real_footage(shared: Path) -> None:
    fights = sorted((shared / "data" / "fights").glob("*ight/*.mp4"))[::20]
    damaged_frames = {}
    for path in [*real_clips(shared), *fights]:
        with open_source(path) as source:
            damaged_frames[path.name] = sum(
                decoded.damaged for decoded in decode(source.codec, [*source.packets, None])
            )
    assert len(damaged_frames) > len(fights) > 0
    assert not Counter(damaged_frames).total()
