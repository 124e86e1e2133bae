"""Which frames make a clip: pytorchvideo's samplers choose where it starts, TimeSformer's rule the frames inside it.

Arithmetic alone: no video is opened here.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from videoadapt.config.sections import ModelConfig
from videoadapt.runtime.seeds import seeded


def clip_seconds(model: ModelConfig, file_fps: float) -> float:
    """Seconds that a clip spans in a file of `file_fps` frames a second: `num_frames` strides at `model.fps`."""
    return model.stride_frames * model.num_frames / (model.fps or file_fps)


def clip_starts(
    kind: Literal["random", "uniform", "centre"],
    *,
    duration_s: float,
    clip_s: float,
    clips: int = 1,
    seed: int | None = None,
) -> list[float]:
    """Where `clips` clips of `clip_s` seconds start in a video of `duration_s` seconds; seconds, not before 0.

    `delta`, the latest start, is `duration_s - clip_s`, or 0 in a video shorter than a clip. `random` draws from
    [0, delta] and depends on `seed` alone, which it needs; `uniform` is `k * delta / clips` for k = 0, 1, ...
    (TimeSformer's multi-view testing: a lone clip is the first); `centre` is one clip at `delta / 2`.
    """
    from pytorchvideo.data.clip_sampling import make_clip_sampler

    if kind == "random":
        if seed is None:
            raise ValueError("random clip starts need a seed")
        sampler = make_clip_sampler("random", clip_s)
        with seeded(seed):
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
) -> np.ndarray:
    """The frames of a clip, (num_frames,) int64 in [0, total_frames - 1], never falling (TimeSformer's `decoder.py`).

    The clip spans `stride_frames * num_frames / fps * file_fps` of the file's frames (`fps` none: the strides count
    the file's own frames); `num_frames` indices are spread evenly over them, first and last included, and truncated.
    Past the end of the video its last frame repeats. A clip of one frame is the frame at its start, so that with
    `centre` it lies half a stride before the middle of the video.
    """
    clip_frames = max(stride_frames * num_frames * (file_fps / fps if fps else 1.0), 1.0)
    start = start_s * file_fps
    # Seconds times frames a second may give 13.999...98 for 14: rounded before it is truncated.
    indices = np.linspace(start, start + clip_frames - 1, num_frames).round(6)
    return np.clip(indices, 0, total_frames - 1).astype(np.int64)


def spread(total: int, kept: int) -> np.ndarray:
    """(kept,) int64: positions spread evenly over `range(total)`, both ends included; one alone is the middle one."""
    if kept == 1:
        return np.array([total // 2], dtype=np.int64)
    return np.linspace(0, total - 1, kept).round().astype(np.int64)
