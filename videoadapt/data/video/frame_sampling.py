"""Chooses the frames of a clip: its start by pytorchvideo's samplers, the frames inside it by TimeSformer's rule.

The functions only compute numbers. They open no video.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from videoadapt.config.sections import ModelConfig
from videoadapt.runtime.seeds import seeded

_DECIMALS = 6  # of positions and seconds; far below the distance of two frames


def clip_seconds(model: ModelConfig, file_fps: float) -> float:
    """Returns the seconds that a clip spans: `num_frames` strides at `model.fps` (None: at `file_fps`)."""
    return model.stride_frames * model.num_frames / (model.fps or file_fps)


def clip_starts(
    kind: Literal["random", "uniform", "centre"],
    *,
    duration_s: float,
    clip_s: float,
    clips: int = 1,
    seed: int | None = None,
) -> list[float]:
    """Chooses the starts of clips in a video.

    The latest start `delta` is `duration_s - clip_s`, or 0 if the video is shorter than a clip.

    Args:
        kind: `random` draws from [0, delta]. `uniform` is `k * delta / clips` for k = 0, 1, ... (TimeSformer's
            multi-view testing). `centre` is one clip at `delta / 2`, whatever `clips` is.
        duration_s: Length of the video in seconds.
        clip_s: Length of a clip in seconds.
        clips: Number of clips.
        seed: The only source of randomness for `random`.

    Returns:
        The starts in seconds, at least 0.

    Raises:
        ValueError: `kind` is `random`, and `seed` is None.
    """
    from pytorchvideo.data.clip_sampling import make_clip_sampler  # its import takes seconds

    if kind == "random":
        if seed is None:
            raise ValueError("random clip starts need a seed")
        sampler = make_clip_sampler("random", clip_s)
        with seeded(seed):  # pytorchvideo draws from the global generator
            return [float(sampler(0.0, duration_s, {}).clip_start_sec) for _ in range(clips)]
    if kind == "centre":
        # The second of two uniform clips starts at delta / 2.
        return clip_starts("uniform", duration_s=duration_s, clip_s=clip_s, clips=2)[1:]
    sampler = make_clip_sampler("constant_clips_per_video", clip_s, clips)
    return [float(sampler(0.0, duration_s, {}).clip_start_sec) for _ in range(clips)]


def frame_indices(  # noqa: PLR0913 - facts of the file and of the model, by name
    start_s: float,
    *,
    total_frames: int,
    file_fps: float,
    num_frames: int,
    stride_frames: int,
    fps: float | None,
    times_s: np.ndarray | None = None,
) -> np.ndarray:
    """Chooses the frames of a clip (TimeSformer, `datasets/decoder.py`).

    The clip spans `stride_frames * num_frames / fps * file_fps` frames of the file. `num_frames` positions are spread
    evenly over the span, both ends included, and each takes the frame that is displayed then. After the end of the
    video, its last frame repeats. A clip of one frame is the frame at its start; with `centre` it lies half a stride
    before the middle of the video.

    Args:
        start_s: Start of the clip in seconds.
        total_frames: Frames in the file.
        file_fps: Frame rate of the file.
        num_frames: Frames in the clip.
        stride_frames: Distance between two frames of the clip, in frames at the rate `fps`.
        fps: The frame rate of the strides; None means `file_fps`.
        times_s: Seconds after the first frame at which each frame is displayed, (total_frames,) ascending; None means
            evenly spaced at `file_fps`.

    Returns:
        (num_frames,) int64 in [0, total_frames - 1], in ascending order, repeats possible.
    """
    clip_frames = max(stride_frames * num_frames * (file_fps / fps if fps else 1.0), 1.0)
    start = start_s * file_fps
    # Rounded before truncation, because seconds times frame rate may give 13.999...98 in place of 14.
    positions = np.linspace(start, start + clip_frames - 1, num_frames).round(_DECIMALS)
    return _frames_at(positions, total_frames, file_fps, times_s)


def segment_indices(
    *,
    total_frames: int,
    file_fps: float,
    num_frames: int,
    view: tuple[int, int] = (0, 1),
    seed: int | None = None,
    times_s: np.ndarray | None = None,
) -> np.ndarray:
    """Chooses one frame of each of `num_frames` equal segments of a video (TSN, arXiv 1608.00859).

    Segment i spans the positions from `i * total_frames / num_frames` to `(i + 1) * total_frames / num_frames`. A video
    of fewer frames than segments repeats frames.

    Args:
        total_frames: Frames in the file.
        file_fps: Frame rate of the file.
        num_frames: Segments, and frames of the clip.
        view: (j, k): view j of k takes the position `(j + 0.5) / k` of each segment; (0, 1) is the centre.
        seed: If given, a random position of each segment is taken instead (training).
        times_s: See `frame_indices`.

    Returns:
        (num_frames,) int64 in [0, total_frames - 1], in ascending order, repeats possible.
    """
    segments = np.arange(num_frames)
    if seed is not None:
        positions = (segments + np.random.default_rng(seed).random(num_frames)) * total_frames / num_frames
    else:
        number, count = view
        # One division of integers: a sum of fractions may end just below the integer that it should be.
        positions = (2 * count * segments + 2 * number + 1) * total_frames / (2 * count * num_frames)
    return _frames_at(positions, total_frames, file_fps, times_s)


def _frames_at(positions: np.ndarray, total_frames: int, file_fps: float, times_s: np.ndarray | None) -> np.ndarray:
    """Returns the frames displayed at some positions, (T,) int64; before and after the video, its first and last.

    Args:
        positions: (T,) float64, in frames of the mean rate after the first frame: seconds times `file_fps`.
        total_frames: Frames in the file.
        file_fps: Its frame rate.
        times_s: See `frame_indices`.
    """
    if times_s is not None:
        instants_s = (positions / file_fps).round(_DECIMALS)
        positions = np.searchsorted(times_s.round(_DECIMALS), instants_s, side="right") - 1
    return np.clip(positions, 0, total_frames - 1).astype(np.int64)


def spread(total: int, kept: int) -> np.ndarray:
    """Returns `kept` indices of `range(total)`, spread evenly with both ends included: (kept,) int64.

    A single index is the middle one.
    """
    if kept == 1:
        return np.array([total // 2], dtype=np.int64)
    return np.linspace(0, total - 1, kept).round().astype(np.int64)
