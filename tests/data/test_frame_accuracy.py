"""Every reader returns exactly the requested frames of every kind of file, or raises `VideoError`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_files import cut_by_copy, numbered, numbers_of, write_video
from videoadapt.data.video import decoding
from videoadapt.data.video.decoding import Decoded, DecodeMode, decode, open_source, read_timeline
from videoadapt.data.video.probe import probe
from videoadapt.data.video.readers import DecordReader, PyAVReader, VideoReader, open_video
from videoadapt.data.video.suffixes import VIDEO_SUFFIXES
from videoadapt.errors import UserError, VideoError

COUNT = 60
UNEVEN_MS = np.cumsum(np.random.default_rng(0).integers(5, 90, COUNT)).tolist()
X265 = "log-level=none:pools=1:frame-threads=1"

# Colours that change from line to line: a reader that treats the two fields as one picture mixes them.
_LINES = numbered(COUNT, 96, 128)
_LINES[:, ::4, :, 0] = _LINES[:, 1::4, :, 0] = 255
_LINES[:, 2::4, :, 2] = _LINES[:, 3::4, :, 2] = 0

# Arguments of `write_video` by file name.
KINDS: dict[str, dict[str, Any]] = {
    "gop12.mp4": {"gop": 12},
    "gop250.mp4": {"gop": 250},
    "no_b_frames.mp4": {"b_frames": 0},
    "many_b_frames.mp4": {"gop": 30, "b_frames": 8, "options": {"x264-params": "b-adapt=0:b-pyramid=strict"}},
    "open_gop.mp4": {"b_frames": 3, "options": {"x264-params": "open-gop=1:b-adapt=0:scenecut=0"}},
    "intra_refresh.mp4": {"options": {"x264-params": "intra-refresh=1:scenecut=0"}},
    "intra_only.mp4": {"gop": 1, "b_frames": 0},
    "uneven.mp4": {"times_ms": UNEVEN_MS},
    "fragmented.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "h264.mov": {},
    "h264.mkv": {"options": {"x264-params": "open-gop=1"}},
    "uneven.mkv": {"times_ms": UNEVEN_MS},
    "h264.flv": {},
    "h264.ts": {"options": {"x264-params": "open-gop=1"}},
    "h264.avi": {"b_frames": 0},
    "b_frames.avi": {},  # avi stores no display times, and those that FFmpeg guesses are wrong
    "interlaced.mp4": {"frames": _LINES, "options": {"x264-params": "tff=1"}},
    "interlaced.mkv": {"frames": _LINES, "options": {"flags": "+ilme+ildct"}},
    "ten_bit.mp4": {"pixels": "yuv420p10le"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": X265}},
    "hevc_closed.mp4": {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=0"}},
    "hevc_layers.mp4": {
        "codec": "libx265",
        "options": {"x265-params": f"{X265}:temporal-layers=3:bframes=4:b-adapt=0"},
    },
    "hevc_ten_bit.mkv": {"codec": "libx265", "pixels": "yuv420p10le", "options": {"x265-params": X265}},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "av1.webm": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p", "b_frames": 0},
    **{f"rotated{degrees}.mp4": {"rotation": degrees} for degrees in (90, 180, 270)},
    **{f"width{width}.mp4": {"frames": numbered(COUNT, 32, width), "pixels": "yuv444p"} for width in (16, 24, 48, 72)},
    "odd.mp4": {"frames": numbered(COUNT, 33, 17), "pixels": "yuv444p"},
    "cropped.mp4": {"frames": numbered(COUNT, 62, 98)},  # coded as 112x64
    "one.mp4": {"frames": 1},
    "one.mkv": {"frames": 1},
    "five.mp4": {"frames": 5},
    "five.avi": {"frames": 5, "codec": "mpeg4"},
}
CUTS = {"cut.mp4": "gop12.mp4", "cut_open.mp4": "open_gop.mp4"}  # by stream copy, before frame CUT_AT
CUT_AT = 17
NAMES = [*KINDS, *CUTS]

FAST_MODES: tuple[DecodeMode, ...] = ("skipping", "selective")
REFUSED_BY_FAST_MODES = frozenset({"intra_refresh.mp4"})  # valid, but decoding cannot start at its keyframes


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns files by name. Each is written at the first request."""
    folder = tmp_path_factory.mktemp("videos")

    @functools.cache
    def make(name: str) -> Path:
        if name in CUTS:
            return cut_by_copy(make(CUTS[name]), folder / name, CUT_AT)
        return write_video(folder / name, **{"frames": COUNT, **KINDS[name]})

    return make


def expected(name: str) -> list[int]:
    """The numbers of the frames that a file shows."""
    if name in CUTS:
        return list(range(CUT_AT, COUNT))
    frames = KINDS[name].get("frames", COUNT)
    return list(range(frames if isinstance(frames, int) else len(frames)))


def upright(name: str, frames: np.ndarray) -> np.ndarray:
    """The frames as they were written, without the rotation of the player."""
    return np.rot90(frames, -KINDS.get(name, {}).get("rotation", 0) // 90, axes=(1, 2))


def patterns(count: int) -> dict[str, list[int]]:
    """Typical requests of frame numbers."""
    rng = np.random.default_rng(count)
    return {
        "whole": list(range(count)),
        "strided": list(range(count // 7, count, 8)),
        "first": [0],
        "last": [count - 1],
        "shuffled": rng.integers(0, count, 20).tolist(),
        "backwards": list(range(count))[::-5],
    }


def pyav(path: Path, *modes: DecodeMode) -> VideoReader:
    return PyAVReader(path, probe(path), modes)


def real_clips(shared: Path) -> list[Path]:
    return sorted(path for path in (shared / "data" / "clips").iterdir() if path.suffix in VIDEO_SUFFIXES)


def check(name: str, video: VideoReader, sequential: np.ndarray) -> None:
    """Checks that frames carry the right numbers, and equal those of sequential decoding bit by bit."""
    numbers = expected(name)
    assert len(video) == len(numbers)
    for indices in patterns(len(numbers)).values():
        frames = video.frames(indices)
        assert frames.shape == (len(indices), video.height, video.width, 3)
        assert numbers_of(upright(name, frames)) == [numbers[index] for index in indices]
        assert np.array_equal(frames, sequential[indices])


@pytest.mark.parametrize("name", NAMES)
def test_readers_return_exactly_the_requested_frames(made: Callable[[str], Path], name: str) -> None:
    path = made(name)
    sequential = pyav(path, "sequential").frames(range(len(expected(name))))
    check(name, pyav(path, "sequential"), sequential)
    auto = open_video(path)
    check(name, auto, sequential)
    if isinstance(auto, DecordReader):
        check(name, open_video(path, "pyav"), sequential)
    else:  # `auto` is PyAV, and decord must not read a file that it is not trusted with
        with pytest.raises(UserError):
            open_video(path, "decord")
    for mode in FAST_MODES:
        try:
            check(name, pyav(path, mode), sequential)
        except VideoError:
            assert name in REFUSED_BY_FAST_MODES


@pytest.mark.parametrize("name", ["open_gop.mp4", "hevc.mp4", "mpeg4.avi", "cut.mp4"])
@given(data=st.data())
@settings(max_examples=15)
def test_any_frames_equal_those_of_sequential_decoding(
    made: Callable[[str], Path], name: str, data: st.DataObject
) -> None:
    path = made(name)
    count = len(expected(name))
    indices = data.draw(st.lists(st.integers(0, count - 1), max_size=12))
    frames = open_video(path, "pyav").frames(indices)
    assert np.array_equal(frames, whole(path)[np.array(indices, int)])


@functools.cache
def whole(path: Path) -> np.ndarray:
    return pyav(path, "sequential").frames(range(probe(path).frames))


def test_only_the_packets_that_a_frame_needs_are_decoded(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []

    def watched(codec: Any, packets: Iterable[Any]) -> Iterator[Decoded]:
        fed.append(0)
        for packet in packets:
            fed[-1] += packet is not None
            yield from decode(codec, [packet])

    path = made("gop12.mp4")
    monkeypatch.setattr(decoding, "decode", watched)
    pyav(path, "selective").frames([25, 49])  # keyframes: 24, 48
    pyav(path, "sequential").frames([25, 49])
    selective, sequential = fed
    assert selective <= 10
    assert sequential >= 45


def test_decoding_starts_at_a_keyframe_displayed_no_later_than_the_frame(made: Callable[[str], Path]) -> None:
    with open_source(made("open_gop.mp4")) as source:
        timeline = read_timeline(source)
    assert timeline is not None
    leading = 0
    for packet in timeline.shown.tolist():
        start = timeline.decode_start(packet)
        assert start in timeline.keyframes
        assert timeline.pts[start] <= timeline.pts[packet]
        leading += start != max(key for key in timeline.keyframes if key <= packet)
    assert leading > 0  # some frames are decoded after a keyframe, but need one from before it


def test_packets_of_a_large_file_are_read_again(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_MAX_CACHED_BYTES", 0)
    check("open_gop.mp4", open_video(made("open_gop.mp4"), "pyav"), whole(made("open_gop.mp4")))


def test_all_modes_give_the_same_frames_of_real_footage(shared: Path) -> None:
    fights = sorted((shared / "data" / "fights").glob("*ight/*.mp4"))[::40]
    clips = [*real_clips(shared), *fights]
    assert len(clips) > len(fights) > 0
    for path in clips:
        info = probe(path)
        indices = np.linspace(0, info.frames - 1, 4).astype(int)
        sequential = pyav(path, "sequential").frames(indices)
        assert np.array_equal(open_video(path, "auto", info).frames(indices), sequential), path
        assert np.array_equal(open_video(path, "pyav", info).frames(indices), sequential), path
