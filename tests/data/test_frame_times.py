"""Frame rates measured from timestamps, and frames of clips chosen by time."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_files import numbered, numbers_of, without_default_duration, write_list, write_video
from videoadapt.config.load import make_config
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.index.manifest import index
from videoadapt.data.video.frame_sampling import frame_indices
from videoadapt.data.video.frame_times import Rate, frame_rate
from videoadapt.data.video.probe import probe
from videoadapt.data.video.readers import VideoReader, open_video

MS = Fraction(1, 1000)
# Times of a webcam: uneven, with a mean of 20 frames a second.
WEBCAM_MS = [0, *np.cumsum(np.random.default_rng(1).permutation([30, 50, 70] * 13)).tolist()]
UNEVEN = {
    "cam.mp4": "libx264",
    "cam.mov": "libx264",
    "cam.mkv": "libx264",  # its header states 30 frames a second
    "cam.flv": "libx264",
    "cam.ts": "libx264",
    "cam.webm": "libvpx",
    "cam.wmv": "wmv2",
    "cam.avi": "mjpeg",
}
rates = st.sampled_from([10, 12, 15, 24, 25, 30, 50, 60, 120]) | st.sampled_from([24, 30, 60]).map(
    lambda rate: Fraction(rate * 1000, 1001)
)


@given(rates, st.integers(2, 500), st.sampled_from(["nearest", "down"]), st.sampled_from([MS, Fraction(1, 90_000)]))
def test_evenly_spaced_frames_keep_the_stated_rate(rate: Fraction, count: int, rounding: str, tick_s: Fraction) -> None:
    exact = [Fraction(number) / rate / tick_s for number in range(count)]
    ticks = [round(time) if rounding == "nearest" else int(time) for time in exact]
    assert frame_rate(ticks, tick_s, [Fraction(rate)], None) == Rate(float(rate), variable=False)
    without_header = frame_rate(ticks, tick_s, [None, Fraction(1000)], None)
    assert without_header is not None
    assert without_header.fps == pytest.approx(float(rate), rel=2 * float(tick_s * rate) / (count - 1))


@pytest.mark.parametrize("stated", [30, 1000, None])
def test_a_stated_rate_that_the_timestamps_contradict_is_not_used(stated: int | None) -> None:
    header = [Fraction(stated) if stated else None]
    assert frame_rate(list(range(0, 4000, 40)), MS, header, None) == Rate(25.0, variable=False)
    assert frame_rate(WEBCAM_MS, MS, header, None) == Rate(20.0, variable=True)
    assert frame_rate(WEBCAM_MS[::-1], MS, header, None) == Rate(20.0, variable=True)


@pytest.mark.parametrize(
    "ticks",
    [
        [None, *range(0, 4000, 40)],
        [0] * 50,
        [0] * 25 + list(range(25)),  # half are equal
        [7],
        list(range(0, 50)),  # one tick apart: 90,000 frames a second
    ],
)
def test_without_usable_timestamps_the_stated_rate_is_used(ticks: list[int | None]) -> None:
    tick_s = Fraction(1, 90_000)
    assert frame_rate(ticks, tick_s, [Fraction(90_000)], Fraction(25)) == Rate(25.0, variable=False)
    assert frame_rate(ticks, tick_s, [Fraction(90_000)], None) is None


def test_two_frames_of_one_tick_do_not_spoil_the_timestamps() -> None:
    ticks = [0, 40, 40, 80, 130, 200]
    assert frame_rate(ticks, MS, [], Fraction(30)) == Rate(25.0, variable=True)


@pytest.mark.parametrize("fps", [960, 1000, 1200])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_files_of_high_speed_cameras_are_read(tmp_path: Path, fps: int, suffix: str) -> None:
    path = write_video(tmp_path / f"high.{suffix}", 30, fps=fps, b_frames=0)
    info = probe(path)
    assert info.fps == pytest.approx(fps, rel=0.01)  # some states of the header are a little off
    assert not info.variable_rate
    assert numbers_of(open_video(path, info=info).frames([29, 3])) == [29, 3]


@pytest.fixture(scope="module")
def webcam(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The frames of a webcam in eight containers."""
    folder = tmp_path_factory.mktemp("webcam")
    for name, codec in UNEVEN.items():
        pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        path = write_video(folder / name, len(WEBCAM_MS), codec=codec, b_frames=0, pixels=pixels, times_ms=WEBCAM_MS)
        if path.suffix == ".webm":
            without_default_duration(path)  # browsers write none
    return [folder / name for name in UNEVEN]


def test_a_clip_takes_the_frames_displayed_at_even_instants_in_every_container(webcam: list[Path]) -> None:
    # 8 frames, 5 frames of 1 / 20 s apart, from 0.2 s on.
    instants_ms = [200 + round(k * (40 - 1) / 7 * 1000 / 20, 3) for k in range(8)]
    expected = [max(n for n, ms in enumerate(WEBCAM_MS) if ms <= instant) for instant in instants_ms]
    assert np.ptp(np.diff(expected)) > 1  # by number, other frames would come
    for path in webcam:
        video = open_video(path)
        assert (video.num_frames, probe(path).variable_rate) == (len(WEBCAM_MS), True), path
        assert video.fps == pytest.approx(20.0, rel=0.01), path
        assert video.times_s is not None
        assert video.times_s * 1000 == pytest.approx(WEBCAM_MS, abs=1.01), path
        assert numbers_of(video.frames(clip(video, 0.2, stride_frames=5, fps=None))) == expected, path


def clip(video: VideoReader, start_s: float, stride_frames: int, fps: float | None) -> np.ndarray:
    return frame_indices(
        start_s,
        total_frames=video.num_frames,
        file_fps=video.fps,
        num_frames=8,
        stride_frames=stride_frames,
        fps=fps,
        times_s=video.times_s,
    )


@given(
    rates,
    st.integers(1, 400),
    st.floats(0, 10),
    st.integers(1, 32),
    st.none() | st.floats(5, 60),
)
def test_even_times_give_the_frames_of_the_rate(
    rate: Fraction, total: int, start_s: float, stride: int, fps: float | None
) -> None:
    indices = partial(
        frame_indices, start_s, total_frames=total, file_fps=float(rate), num_frames=8, stride_frames=stride, fps=fps
    )
    by_rate, by_time = indices(), indices(times_s=np.arange(total) / float(rate))
    assert by_time.tolist() == by_rate.tolist()


def test_the_views_of_an_indexed_video_are_chosen_by_time(tmp_path: Path) -> None:
    write_video(tmp_path / "cam.mkv", numbered(len(WEBCAM_MS), 64, 64), times_ms=WEBCAM_MS)
    config = make_config(
        {
            "run": {"dir": str(tmp_path / "run")},
            "data": {"val": {"annotations": str(write_list(tmp_path / "val.txt", [("cam.mkv", 0)]))}, "workers": 0},
            "model": {"size": 32, "points": [2], "num_classes": 1, "num_frames": 4, "stride_frames": 6, "fps": 30},
        }
    )
    manifest = index(config)
    assert manifest.row(0).variable_rate
    assert manifest.row(0).fps == pytest.approx(20.0)
    views = EvalVideos(manifest, config, temporal_views=2, spatial_crops=1, thumbnails=False)[0]
    assert isinstance(views, VideoViews)
    # 24 frames of 1 / 30 s are 16 of 1 / 20 s; of 2 s, the second clip starts half of the rest later.
    for found, start_s in zip(views.views, (0.0, (2 - 0.8) / 2), strict=True):
        instants_ms = [round((start_s + k * 15 / 3 / 20) * 1000, 3) for k in range(4)]
        expected = [max(n for n, ms in enumerate(WEBCAM_MS) if ms <= instant) for instant in instants_ms]
        assert numbers_of(found[0].permute(1, 2, 3, 0).numpy()) == expected  # (C, T, S, S) -> (T, S, S, C)
