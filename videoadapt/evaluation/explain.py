"""Explains the prediction of one video: the answer of every point with its cost and time, and why a point was chosen.

`videoadapt serve` shows it. Reading is a function of its own, because it runs in a process that may crash or hang.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import read_views
from videoadapt.data.pictures import jpegs
from videoadapt.data.video.limits import Limits
from videoadapt.data.video.probe import VideoInfo, probe
from videoadapt.data.video.readers import open_video
from videoadapt.errors import VideoError
from videoadapt.evaluation.predict import Prediction, Predictor, predict_views
from videoadapt.evaluation.reasons import Look, looks_of, reason
from videoadapt.routing.label_rules import Floats, average_views
from videoadapt.routing.policy import Fixed
from videoadapt.routing.router import Router

TOP = 3  # classes of each point's answer
MAX_PICTURES = 16  # of a clip
PICTURE_SIDE = 160  # pixels, at most
MAX_ROUNDS, ROUNDS_S = 5, 1.0  # passes for measuring times; a further one begins only within this time
_HINT = "expected a complete video file, such as mp4, mkv, webm, mov or avi"


class ReadVideo(NamedTuple):
    """A video after reading. NumPy arrays, because torch sends tensors between processes through shared memory.

    Attributes:
        info: Properties of the file.
        views: uint8 `(clips, crops, C, T, S, S)`.
        thumbnails: uint8 `(clips, C, A, s, s)`; A is 0 without an assigner.
        starts_s: Start of each clip in seconds.
        pictures: JPEG files of at most `MAX_PICTURES` frames of each clip, of its middle crop.
    """

    info: VideoInfo
    views: np.ndarray
    thumbnails: np.ndarray
    starts_s: list[float]
    pictures: list[list[bytes]]


@dataclass(frozen=True)
class PointAnswer:
    """The answer of one point to a video.

    Attributes:
        point: The point.
        classes: The best classes, best first; empty if the answer is NaN.
        probabilities: Their probabilities, means over all views of the video.
        macs: MACs of all views.
        seconds: Median measured time of all views at this point, from uint8 clips on the CPU to logits.
    """

    point: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    macs: int
    seconds: float


@dataclass(frozen=True)
class UnitChoice:
    """The point where a clip ends, or a whole video for a policy about videos, and why.

    Attributes:
        starts_s: Starts in seconds, of the one clip or of all clips of the video.
        point: The point.
        looks: In the order in which the policy looks at the points; empty for a policy that reads nothing.
        reason: The rule in a sentence.
    """

    starts_s: tuple[float, ...]
    point: str
    looks: tuple[Look, ...]
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The prediction of a video by the policy, and what it is made of.

    Attributes:
        prediction: The prediction, with the cost of the policy.
        policy: Name of the policy.
        seconds: Median measured time of the policy: assigner, routing and model.
        rounds: Passes of the policy and of each point, of which the times are medians.
        answers: The answers of all points, costliest first.
        units: One choice for each clip, or one for the video.
    """

    prediction: Prediction
    policy: str
    seconds: float
    rounds: int
    answers: tuple[PointAnswer, ...]
    units: tuple[UnitChoice, ...]


def read_video(path: str, config: Config, *, thumbnails: bool) -> ReadVideo:
    """Reads the views of a file that may be anything, within the limits of the section `serve`.

    Args:
        path: The file.
        config: The config of a `Predictor`.
        thumbnails: Whether the policy has an assigner.

    Raises:
        VideoError: The file is no video, cannot be read, or is too long.
    """
    limits = Limits.of(config.data)
    try:
        info = probe(path, content=False, limits=limits)
    except VideoError as error:
        raise VideoError(f"{error}; {_HINT}") from None
    if info.reader == "image" and config.model.num_frames > 1:
        raise VideoError(f"{path}: is an image; expected a video")
    if info.duration_s > config.serve.max_seconds:
        raise VideoError(
            f"{path}: lasts {info.duration_s:.1f} s, more than serve.max_seconds {config.serve.max_seconds:g}"
        )
    with open_video(path, config.data.reader, info, limits=limits) as reader:
        views, small, starts_s = read_views(
            reader,
            config,
            temporal_views=config.evaluate.temporal_views,
            spatial_crops=config.evaluate.spatial_crops,
            thumbnails=thumbnails,
        )
    middle = views[:, views.shape[1] // 2].numpy()  # the middle crop of each clip, (clips, C, T, S, S)
    pictures = [jpegs(crop, most=MAX_PICTURES, side=PICTURE_SIDE) for crop in middle]
    return ReadVideo(info, views.numpy(), small.numpy(), starts_s, pictures)


def read_video_alone(path: str, config: Config, *, thumbnails: bool) -> ReadVideo:
    """Does `read_video` in a process of its own, and keeps it to one thread: several such processes share the CPU."""
    torch.set_num_threads(1)
    return read_video(path, config, thumbnails=thumbnails)


def explain(predictor: Predictor, name: str, video: ReadVideo) -> Explanation:
    """Runs the policy and every point on a video that is read; several times in turn if that takes little time.

    Args:
        predictor: The model, its policy and their settings.
        name: The `path` of the prediction.
        video: The video.

    Raises:
        VideoError: The probabilities of the prediction are NaN.
    """
    views, thumbnails = torch.from_numpy(video.views), torch.from_numpy(video.thumbnails)
    points = predictor.model.config.points
    clock = _Clock()
    while clock.rounds < MAX_ROUNDS and clock.total_s < ROUNDS_S:  # in turn: a busy moment slows all of them
        with clock.measured("policy"):
            prediction = predict_views(predictor, name, views, thumbnails)
        if math.isnan(prediction.probabilities[0]):
            raise VideoError(f"{name}: the model's probabilities are NaN")
        logits = {}
        for point in points:
            with clock.measured(point):
                logits[point] = _logits(predictor, point, views)
        clock.rounds += 1
    stacked = np.stack([logits[point] for point in points], axis=2)  # (clips, crops, points, classes)
    looks = looks_of(predictor.policy, points, thumbnails, stacked, predictor.config.evaluate.average)
    return Explanation(
        prediction=prediction,
        policy=predictor.policy.name,
        seconds=clock.median("policy"),
        rounds=clock.rounds,
        answers=tuple(_answer(predictor, point, logits[point], clock.median(point)) for point in points),
        units=tuple(_choices(predictor, prediction, video.starts_s, looks)),
    )


class _Clock:
    """Times of several things by name, over some rounds."""

    def __init__(self) -> None:
        self.rounds = 0
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Adds the time of the `with` block."""
        started = time.perf_counter()
        yield
        self._seconds[name].append(time.perf_counter() - started)

    @property
    def total_s(self) -> float:
        return sum(map(sum, self._seconds.values()))

    def median(self, name: str) -> float:
        return statistics.median(self._seconds[name])


def warm_up(predictor: Predictor) -> None:
    """Runs the policy and every point once on a black clip: the first pass of a process is slower than later ones."""
    model, assign, evaluate = predictor.model.config, predictor.config.assign, predictor.config.evaluate
    clips, crops = evaluate.temporal_views, evaluate.spatial_crops
    views = torch.zeros(clips, crops, 3, model.num_frames, model.size, model.size, dtype=torch.uint8)
    thumbnails = torch.zeros(clips, 3, assign.frames, assign.size, assign.size, dtype=torch.uint8)
    predict_views(predictor, "black", views, thumbnails)
    for point in model.points:
        _logits(predictor, point, views)


def _logits(predictor: Predictor, point: str, views: Tensor) -> Floats:
    """Returns the logits of views, `(clips, crops, C, T, S, S)`, at a point: `(clips, crops, classes)`."""
    return Router(predictor.model, Fixed(point), batch=predictor.config.evaluate.batch).run([views]).logits


def _answer(predictor: Predictor, point: str, logits: Floats, seconds: float) -> PointAnswer:
    """Returns the answer of a point from its logits, `(clips, crops, classes)`."""
    probabilities = average_views(logits, (0, 1), predictor.config.evaluate.average)
    kept = 0 if np.isnan(probabilities).any() else TOP  # of a NaN answer, sorting would put class 0 first
    best = (-probabilities).argsort(kind="stable")[:kept]
    return PointAnswer(
        point=point,
        classes=tuple(predictor.names[i] for i in best),
        probabilities=tuple(float(probabilities[i]) for i in best),
        macs=logits.shape[0] * logits.shape[1] * point_macs(predictor.model.config)[point],
        seconds=seconds,
    )


def _choices(
    predictor: Predictor, prediction: Prediction, starts_s: list[float], looks: list[tuple[Look, ...]]
) -> Iterator[UnitChoice]:
    starts = [tuple(starts_s)] if predictor.policy.unit == "video" else [(start,) for start in starts_s]
    for unit_starts, point, seen in zip(starts, prediction.points, looks, strict=True):
        yield UnitChoice(unit_starts, point, seen, reason(predictor.policy, point, seen))
