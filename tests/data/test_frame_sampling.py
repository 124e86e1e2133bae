"""Starts of clips, and the frames inside them."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videoadapt.config.sections import ModelConfig
from videoadapt.data.video.frame_sampling import clip_seconds, clip_starts, frame_indices, segment_indices, spread

durations = st.floats(0.05, 1000.0)
seeds = st.integers(0, 2**63 - 1)


@given(durations, durations, st.integers(1, 10))
def test_uniform_starts_equal_those_of_timesformer(duration_s: float, clip_s: float, clips: int) -> None:
    delta = max(duration_s - clip_s, 0.0)
    expected = [k * delta / clips for k in range(clips)]
    assert clip_starts("uniform", duration_s=duration_s, clip_s=clip_s, clips=clips) == pytest.approx(expected)


@given(durations, durations)
def test_the_centre_clip_leaves_equal_time_before_and_after(duration_s: float, clip_s: float) -> None:
    (start,) = clip_starts("centre", duration_s=duration_s, clip_s=clip_s)
    assert start == pytest.approx(max(duration_s - clip_s, 0.0) / 2)


@given(durations, durations, seeds)
def test_random_starts_lie_inside_the_video_and_depend_only_on_the_seed(
    duration_s: float, clip_s: float, seed: int
) -> None:
    random.seed(1)
    before = random.getstate()
    (start,) = clip_starts("random", duration_s=duration_s, clip_s=clip_s, seed=seed)
    assert random.getstate() == before
    random.seed(2)
    assert clip_starts("random", duration_s=duration_s, clip_s=clip_s, seed=seed) == [start]
    assert 0.0 <= start <= max(duration_s - clip_s, 0.0)


def test_random_starts_cover_the_whole_range_and_need_a_seed() -> None:
    starts = [clip_starts("random", duration_s=10, clip_s=2, seed=seed)[0] for seed in range(300)]
    assert min(starts) < 0.5
    assert max(starts) > 7.5
    with pytest.raises(ValueError, match="seed"):
        clip_starts("random", duration_s=10, clip_s=2)


@given(
    start_s=st.floats(0, 100),
    total_frames=st.integers(1, 3000),
    file_fps=st.floats(0.5, 240),
    num_frames=st.integers(1, 96),
    stride_frames=st.integers(1, 64),
    fps=st.none() | st.floats(1, 60),
)
def test_indices_are_frames_of_the_video_in_order(  # noqa: PLR0917
    start_s: float, total_frames: int, file_fps: float, num_frames: int, stride_frames: int, fps: float | None
) -> None:
    indices = frame_indices(
        start_s,
        total_frames=total_frames,
        file_fps=file_fps,
        num_frames=num_frames,
        stride_frames=stride_frames,
        fps=fps,
    )
    assert indices.shape == (num_frames,)
    assert indices.dtype == np.int64
    assert indices.min() >= 0
    assert indices.max() < total_frames
    assert (np.diff(indices) >= 0).all()


@given(st.integers(0, 200), st.sampled_from([24.0, 25.0, 30000 / 1001, 30.0, 60.0]))
def test_a_start_at_the_time_of_a_frame_takes_this_frame(frame: int, fps: float) -> None:
    indices = frame_indices(frame / fps, total_frames=999, file_fps=fps, num_frames=8, stride_frames=1, fps=None)
    assert indices.tolist() == list(range(frame, frame + 8))


def timesformer_indices(total: int, clip_index: int, clips: int, file_fps: float, model: ModelConfig) -> list[int]:
    """`get_start_end_idx` and `temporal_sampling` of TimeSformer's `timesformer/datasets/decoder.py`."""
    clip_size = model.stride_frames * model.num_frames / (model.fps or file_fps) * file_fps
    start = max(total - clip_size, 0) * clip_index / clips
    index = np.linspace(start, start + clip_size - 1, model.num_frames)
    return [int(i) for i in np.clip(index, 0, total - 1) + 1e-6]


@pytest.mark.parametrize("total", [300, 250, 40, 1])
@pytest.mark.parametrize("file_fps", [30.0, 25.0, 15.0])
@pytest.mark.parametrize("clip", [0, 1, 2])
def test_uniform_clips_take_the_frames_that_timesformer_takes(total: int, file_fps: float, clip: int) -> None:
    model = ModelConfig()
    clip_s = clip_seconds(model, file_fps)
    start_s = clip_starts("uniform", duration_s=total / file_fps, clip_s=clip_s, clips=3)[clip]
    indices = frame_indices(start_s, total_frames=total, file_fps=file_fps, num_frames=8, stride_frames=32, fps=30.0)
    assert indices.tolist() == timesformer_indices(total, clip, 3, file_fps, model)


def test_a_video_shorter_than_a_clip_repeats_its_last_frame() -> None:
    indices = frame_indices(0.0, total_frames=5, file_fps=30, num_frames=8, stride_frames=2, fps=30)
    assert indices.tolist() == [0, 2, 4, 4, 4, 4, 4, 4]


def test_a_clip_of_one_frame_is_the_frame_at_its_start() -> None:
    assert frame_indices(2.0, total_frames=300, file_fps=30, num_frames=1, stride_frames=32, fps=30).tolist() == [60]


def test_clip_seconds_use_the_rate_of_the_model_or_else_of_the_file() -> None:
    assert clip_seconds(ModelConfig(num_frames=8, stride_frames=32, fps=30), 25) == pytest.approx(256 / 30)
    assert clip_seconds(ModelConfig(num_frames=8, stride_frames=32, fps=None), 25) == pytest.approx(256 / 25)


@pytest.mark.parametrize(("total", "frames"), [(48, 8), (30, 8), (5, 8), (1, 8), (117, 16), (8, 1)])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_segments_are_sampled_as_in_tsn(total: int, frames: int, views: int) -> None:
    for view in range(views):
        exact = [(i + (view + Fraction(1, 2)) / views) * total / frames for i in range(frames)]
        indices = segment_indices(total_frames=total, file_fps=12.0, num_frames=frames, view=(view, views))
        assert indices.tolist() == [math.floor(position) for position in exact]
    assert indices.dtype == np.int64


def test_segments_of_a_video_of_something_something() -> None:
    clips = [segment_indices(total_frames=48, file_fps=12.0, num_frames=8, view=(view, 2)).tolist() for view in (0, 1)]
    assert clips == [[1, 7, 13, 19, 25, 31, 37, 43], [4, 10, 16, 22, 28, 34, 40, 46]]
    short = segment_indices(total_frames=5, file_fps=12.0, num_frames=8)
    assert short.tolist() == [0, 0, 1, 2, 2, 3, 4, 4]


@given(st.integers(1, 500), st.integers(1, 32), seeds)
def test_training_takes_a_random_frame_of_each_segment(total: int, frames: int, seed: int) -> None:
    indices = segment_indices(total_frames=total, file_fps=30.0, num_frames=frames, seed=seed)
    again = segment_indices(total_frames=total, file_fps=30.0, num_frames=frames, seed=seed)
    assert indices.tolist() == again.tolist()
    for number, index in enumerate(indices.tolist()):
        assert math.floor(number * total / frames) <= index < math.ceil((number + 1) * total / frames)


def test_training_takes_every_frame_of_a_segment() -> None:
    drawn = [segment_indices(total_frames=32, file_fps=30.0, num_frames=8, seed=seed) for seed in range(100)]
    assert set(np.stack(drawn)[:, 3].tolist()) == {12, 13, 14, 15}


def test_segments_of_uneven_frames_are_equal_in_time() -> None:
    times_s = np.array([0.0, 0.1, 0.2, 0.3, 2.0, 2.1, 3.9, 4.2])  # a mean of 7 / 4.2 frames a second, 4.8 s
    indices = segment_indices(total_frames=8, file_fps=7 / 4.2, num_frames=4, times_s=times_s)
    assert indices.tolist() == [3, 3, 5, 7]  # at 0.6, 1.8, 3.0 and 4.2 s


@given(st.integers(1, 100), st.integers(2, 100))
def test_spread_includes_both_ends_in_even_steps(total: int, kept: int) -> None:
    positions = spread(total, kept)
    assert positions[0] == 0
    assert positions[-1] == total - 1
    assert np.ptp(np.diff(positions)) <= 1


def test_spread_keeps_all_or_the_middle_one() -> None:
    assert spread(8, 8).tolist() == list(range(8))
    assert spread(9, 1).tolist() == [4]
    assert spread(8, 0).tolist() == []
