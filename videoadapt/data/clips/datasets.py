"""Datasets that return one item per video: a training clip, or all views of an evaluation.

A video that cannot be read becomes a `Failure`. It is never replaced by another video.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from videoadapt.config.load import Config
from videoadapt.config.sections import ModelConfig
from videoadapt.data.clips.augment import augment
from videoadapt.data.clips.token_labels import LabelMap, label_map_file, read_label_map
from videoadapt.data.clips.views import crops, thumbnail
from videoadapt.data.index.manifest import Manifest, Row
from videoadapt.data.video.files import cause_of
from videoadapt.data.video.frame_sampling import clip_seconds, clip_starts, frame_indices, segment_indices, spread
from videoadapt.data.video.limits import Limits
from videoadapt.data.video.readers import VideoReader, open_video
from videoadapt.errors import VideoError
from videoadapt.runtime.seeds import seed_of


class Failure(NamedTuple):
    """A video that could not be read.

    Attributes:
        video: Its row in the manifest.
        path: Its path.
        cause: The reason why it could not be read, without the path.
    """

    video: int
    path: str
    cause: str


@dataclass
class Clip:
    """A clip for training.

    Attributes:
        frames: (C, T, S, S) uint8.
        label: Class of its video.
        video: Row of its video in the manifest.
        tokens: Its label map, with `data.token_labels`.
    """

    frames: Tensor
    label: int
    video: int
    tokens: LabelMap | None = None

    def pin_memory(self) -> Clip:
        """Returns a copy in page-locked memory. DataLoader calls it, by this name, if `pin_memory` is set."""
        return replace(self, frames=self.frames.pin_memory())


@dataclass
class VideoViews:
    """All views of a video for evaluation.

    Attributes:
        views: (K, X, C, T, S, S) uint8; X is 0 if only thumbnails are requested.
        thumbnails: (K, C, A, s, s) uint8, for the assigner; A is 0 if only views are requested.
        starts_s: Start of each of the K clips, in seconds.
        label: Class of the video.
        video: Row of the video in the manifest.
        cpu_s: Processor seconds of the process that decoded it, meanwhile.
    """

    views: Tensor
    thumbnails: Tensor
    starts_s: list[float]
    label: int
    video: int
    cpu_s: float


class TrainClips(Dataset[Any]):
    """One augmented random clip per video and epoch; the key is (epoch, row of the manifest).

    All random draws depend on (run.seed, epoch, video id) alone, so that every rank and worker makes the same clip.
    """

    def __init__(self, manifest: Manifest, config: Config) -> None:
        self.manifest, self.config = manifest, config

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: tuple[int, int]) -> Clip | Failure:
        epoch, number = key
        row = self.manifest.row(number)
        try:
            frames, tokens = self._clip(row, epoch)
        except VideoError as error:
            return _failure(number, row, error)
        return Clip(frames, row.label, number, tokens)

    def _clip(self, row: Row, epoch: int) -> tuple[Tensor, LabelMap | None]:
        model, data = self.config.model, self.config.data
        reader = _open(row, self.config)
        if data.crop_area is None:
            short_side = (data.short_side or (model.size,))[-1]
            Limits.of(data).check_resized(reader.path, reader.width, reader.height, short_side)
        identity = (self.config.run.seed, epoch, row.video)
        # Two seeds, so that a change of the crop's draws does not change the clip's start.
        frames = reader.frames(_training_indices(reader, self.config, seed_of("start", *identity)))  # (T, H, W, C)
        clip, crop = augment(frames, data, model, seed=seed_of("crop", *identity))
        if data.token_labels is None:
            return clip, None
        file = label_map_file(data.token_labels, row.path)
        return clip, read_label_map(file, crop, model.num_classes)


class EvalVideos(Dataset[Any]):
    """All views of a video; the key is its row in the manifest. Each video is decoded once for all views.

    Args:
        manifest: The videos.
        config: Settings for the sampling of frames and the sizes of views and thumbnails.
        temporal_views: Number of clips per video: 1 is the clip at `evaluate.single_clip`, more are spread as in
            TimeSformer. With `data.sampling: segments`, each is spread over the whole video.
        spatial_crops: Number of crops per clip.
        views: Whether to make the views.
        thumbnails: Whether to make the thumbnails. Frames that no output needs are not decoded.
    """

    def __init__(  # noqa: PLR0913 - settings, by name
        self,
        manifest: Manifest,
        config: Config,
        *,
        temporal_views: int,
        spatial_crops: int,
        views: bool = True,
        thumbnails: bool = True,
    ) -> None:
        self.manifest, self.config = manifest, config
        self.temporal_views, self.spatial_crops = temporal_views, spatial_crops
        self.views, self.thumbnails = views, thumbnails

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, number: int) -> VideoViews | Failure:
        row, before_s = self.manifest.row(number), time.process_time()
        try:
            views, thumbnails, starts_s = read_views(
                _open(row, self.config),
                self.config,
                temporal_views=self.temporal_views,
                spatial_crops=self.spatial_crops,
                views=self.views,
                thumbnails=self.thumbnails,
            )
        except VideoError as error:
            return _failure(number, row, error)
        return VideoViews(views, thumbnails, starts_s, row.label, number, time.process_time() - before_s)


def read_views(  # noqa: PLR0913 - settings, by name
    reader: VideoReader,
    config: Config,
    *,
    temporal_views: int,
    spatial_crops: int,
    views: bool = True,
    thumbnails: bool = True,
) -> tuple[Tensor, Tensor, list[float]]:
    """Reads the views and thumbnails of an open video. See `EvalVideos` for the arguments.

    Returns:
        Views, thumbnails and the starts of the clips in seconds, with the shapes of `VideoViews`.

    Raises:
        VideoError: A frame cannot be decoded.
    """
    model, assign, data = config.model, config.assign, config.data
    starts_s, indices = _evaluation_indices(reader, config, temporal_views)  # K starts, (K, T)
    if not views:
        indices = indices[:, spread(model.num_frames, assign.frames)]  # (K, T) -> (K, A)
    # The clips of a short video overlap: each frame is decoded once, and then copied to its clips.
    unique, inverse = np.unique(indices, return_inverse=True)
    frames = reader.frames(unique)  # (unique frames, H, W, C)
    short_side = int(model.size / config.evaluate.crop_pct)
    if views:
        Limits.of(data).check_resized(reader.path, reader.width, reader.height, short_side)
    crop_count, frames_kept = spatial_crops * views, assign.frames * thumbnails  # 0 where not requested
    cut = partial(
        crops,
        size=model.size,
        count=crop_count,
        short_side=short_side,
        interpolation=data.interpolation,
        antialias=data.antialias,
        offset=config.evaluate.crop_offset,
    )
    made: list[tuple[Tensor, Tensor]] = []
    for numbers in inverse.reshape(indices.shape):
        clip = frames[numbers]  # (T or A, H, W, C), one copy at a time: frames of many clips are large
        made.append((cut(clip), thumbnail(clip, frames_kept=frames_kept, size=assign.size)))
    views_of, thumbnails_of = (torch.stack(parts) for parts in zip(*made, strict=True))
    return views_of, thumbnails_of, starts_s  # (K, X, C, T, S, S), (K, C, A, s, s)


def _failure(number: int, row: Row, error: VideoError) -> Failure:
    return Failure(number, row.path, cause_of(row.path, error))


def _open(row: Row, config: Config) -> VideoReader:
    """Opens the video of a row. Raises `VideoError` if it cannot be opened, or could not be read by `index`."""
    if row.status != "ok":
        raise VideoError(f"{row.path}: {row.cause}")
    return open_video(row.path, config.data.reader, row.info, limits=Limits.of(config.data))


def _training_indices(reader: VideoReader, config: Config, seed: int) -> np.ndarray:
    """Returns the frame numbers of a random clip, (T,) int64."""
    if config.data.sampling == "segments":
        return _segments(reader, config.model, seed=seed)
    start_s = _starts("random", reader, config, 1, seed)[0]
    return _indices(start_s, reader, config.model)


def _evaluation_indices(reader: VideoReader, config: Config, clips: int) -> tuple[list[float], np.ndarray]:
    """Returns the starts of K clips in seconds, and their frame numbers, (K, T) int64."""
    if config.data.sampling == "segments":
        indices = np.stack([_segments(reader, config.model, view=(number, clips)) for number in range(clips)])
        segment_s = reader.num_frames / reader.fps / config.model.num_frames
        return [(number + 0.5) / clips * segment_s for number in range(clips)], indices
    # The first of uniform clips starts at frame 0, so a single uniform clip does, too.
    centred = clips == 1 and config.evaluate.single_clip == "centre"
    starts_s = _starts("centre" if centred else "uniform", reader, config, clips)
    return starts_s, np.stack([_indices(start_s, reader, config.model) for start_s in starts_s])


def _segments(
    reader: VideoReader, model: ModelConfig, view: tuple[int, int] = (0, 1), seed: int | None = None
) -> np.ndarray:
    """Returns one frame number of each segment of a video, (T,) int64."""
    return segment_indices(
        total_frames=reader.num_frames,
        file_fps=reader.fps,
        num_frames=model.num_frames,
        view=view,
        seed=seed,
        times_s=reader.times_s,
    )


def _starts(
    kind: Literal["random", "uniform", "centre"],
    reader: VideoReader,
    config: Config,
    clips: int,
    seed: int | None = None,
) -> list[float]:
    """Returns the starts of `clips` clips, in seconds; see `clip_starts`."""
    duration_s, clip_s = reader.num_frames / reader.fps, clip_seconds(config.model, reader.fps)
    return clip_starts(kind, duration_s=duration_s, clip_s=clip_s, clips=clips, seed=seed)


def _indices(start_s: float, reader: VideoReader, model: ModelConfig) -> np.ndarray:
    """Returns the frame numbers of the clip that starts at `start_s`, (T,) int64."""
    return frame_indices(
        start_s,
        total_frames=reader.num_frames,
        file_fps=reader.fps,
        num_frames=model.num_frames,
        stride_frames=model.stride_frames,
        fps=model.fps,
        times_s=reader.times_s,
    )
