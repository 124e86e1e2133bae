"""Predicts videos: classes with probabilities, the point where each clip ends, and the cost."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from videoadapt.config.load import Config, ConfigSource, as_config
from videoadapt.config.sections import AssignConfig, DataConfig, EvaluateConfig, LossConfig
from videoadapt.config.views import view_order
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.clips.datasets import Failure, read_views
from videoadapt.data.index.class_files import read_classes
from videoadapt.data.index.find_files import media_below
from videoadapt.data.index.text import normalised
from videoadapt.data.video.limits import Limits
from videoadapt.data.video.readers import FrameReader, VideoReader, open_video
from videoadapt.data.video.suffixes import is_known, is_media
from videoadapt.errors import ConfigError, UserError, VideoError, plural
from videoadapt.evaluation.against_fixed import favoured_policy
from videoadapt.evaluation.evaluated import read_evaluation
from videoadapt.model.checkpoint import weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.decide import clip_macs, views_run
from videoadapt.routing.label_inputs import label_inputs
from videoadapt.routing.label_rules import running_answers
from videoadapt.routing.policy import Assigned, Fixed, Policy, needs_assigner, parse_policy
from videoadapt.routing.policy_file import is_policy_file, say_other_inputs
from videoadapt.routing.router import RoutedVideo, Router
from videoadapt.routing.scores import inference_model
from videoadapt.runtime.console import Bar, macs, progress_shown, say
from videoadapt.runtime.results import Result, Table

TOP = 5  # classes of a prediction
Frames: TypeAlias = "np.ndarray | Tensor"
# A path, frames `(F, H, W, 3)` of one video, several of these, or the frames `(H, W, 3)` of one video one by one
Videos: TypeAlias = "str | Path | Frames | Iterable[str | Path | Frames]"

_FRAME_DIMS, _VIDEO_DIMS = 3, 4  # (H, W, 3) and (F, H, W, 3)


@dataclass(frozen=True)
class Prediction:
    """The prediction for one video.

    Attributes:
        path: The file; `frames` for frames in memory.
        classes: Names of the best classes, best first.
        probabilities: Their probabilities, means over all views of the video.
        points: The point where each clip ends; of a cascade over views, the point where the video ends.
        macs: MACs of all views at all points that they ran, and of the assigner.
        views: Views that ran, counted once for each point.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    points: tuple[str, ...]
    macs: int
    views: int

    def __repr__(self) -> str:
        return (
            f"<Prediction {self.path}: {self.classes[0]} {self.probabilities[0]:.2f}, points {' '.join(self.points)}>"
        )


@dataclass(frozen=True, repr=False)
class Predictions(Result):
    """Predictions in the order of the videos: a sequence of `Prediction`. The names are keys of its JSON.

    Attributes:
        policy: The name of the policy.
        predictions: One for each video that could be read.
        failed: Path and cause of each video that could not, with `on_error="list"`.
        left_out: Files and folders inside a given folder that are not videos, or that cannot be listed.
    """

    policy: str
    predictions: list[Prediction]
    failed: list[dict[str, str]]
    left_out: list[str]

    def __len__(self) -> int:
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    def __getitem__(self, index: int) -> Prediction:
        return self.predictions[index]

    def table(self) -> Table:
        """Returns the best class, the points and the cost of each video."""
        rows = [(p.path, p.classes[0], f"{p.probabilities[0]:.2f}", " ".join(p.points), macs(p.macs)) for p in self]
        title = f"{plural(len(self), 'video')}, {len(self.failed)} failed; policy {self.policy}"
        return Table(title, ("video", "class", "probability", "points", "MACs"), rows)


class Predictor(NamedTuple):
    """All that the prediction of a video needs; `load_predictor` loads it once for many calls of `predict`."""

    model: TimeSformer
    policy: Policy
    config: Config  # `assign` is that of the policy's assigner, if it has one
    names: Sequence[str]
    top: int  # classes of a prediction
    router: Router


class _Video(NamedTuple):
    """A video that is not open yet."""

    name: str
    open: Callable[[], VideoReader]


def predict(  # noqa: PLR0913 - settings, by name
    model: Predictor | TimeSformer | ConfigSource,
    videos: Videos,
    policy: str | Policy | None = None,
    *,
    fps: float | None = None,
    evaluate: EvaluateConfig | None = None,
    data: DataConfig | None = None,
    top: int | None = None,
    on_error: Literal["raise", "list"] = "raise",
    progress: bool = True,
) -> Predictions:
    """Predicts the classes of videos of any length.

    Every clip gets its point from the policy, through the same `decide` as in an evaluation. The crops of a clip share
    its point. Nothing is written.

    Args:
        model: A run folder (or its `Config`, or its YAML file), a predictor, or a model in eval mode,
            which has neither the views of its run nor its assigner.
        videos: The path of a video, of an image, of a folder of frames, or of a folder of videos; or frames in memory,
            uint8 RGB `(F, H, W, 3)`, array or tensor; or a list of these. An iterable of frames `(H, W, 3)`, such as a
            generator, is one video; one of videos in memory is several. Both are read to their end first. Images are
            one video each if the model's clips have one frame.
        policy: `"assigned"`, `"fixed:14"`, `"cascade:7,14:0.6"`, `"cascade:14:views:0.9"` (see `parse_policy`), the
            file that `calibrate` wrote, or a policy such as `Assigned.load("runs/demo")`. None: `assigned` if a run is
            given and has an assigner, otherwise the costliest point.
        fps: Frames per second of frames in memory.
        evaluate: How views are cut, as the `evaluate` section of a config. None: as the run, or the defaults.
        data: How videos are read and resized, as the `data` section of a config. None: as the run, or the defaults.
        top: Number of classes of a prediction; 5 by default.
        on_error: `raise` for the first video that cannot be read, or `list` it in `failed` and go on; a video whose
            probabilities are NaN is then listed, too.
        progress: Show a bar for several videos, and messages.

    Returns:
        One prediction per video, in order.

    Raises:
        VideoError: A video cannot be read.
        UserError: There is no video, the policy needs the truth, or does not fit the model, or `data.classes` does not;
            or a predictor is given with other settings.
        CheckpointError: The run has no model, or its assigner does not fit it.
    """
    with progress_shown(progress):
        given = {"evaluate": evaluate, "data": data}
        changed = {section: value for section, value in given.items() if value is not None}
        if isinstance(model, Predictor):
            if policy is not None or changed or top is not None:
                raise UserError("predict: a predictor has its policy and settings; give them to load_predictor")
            predictor = model
        elif isinstance(model, TimeSformer):
            predictor = _of_model(model, policy, evaluate, data, TOP if top is None else top)
        else:
            predictor = load_predictor(
                as_config(model).model_copy(update=changed), policy, top=TOP if top is None else top
            )
        found, left_out = _found(videos, fps, predictor.config)
        result = Predictions(predictor.policy.name, [], [], left_out)
        _predict_all(predictor, found, result, on_error)
    return result


def _of_model(
    model: TimeSformer, policy: str | Policy | None, evaluate: EvaluateConfig | None, data: DataConfig | None, top: int
) -> Predictor:
    if evaluate is None:
        views = plural(EvaluateConfig().views, "view")
        say(
            f"predict: a model has no settings of its run: {views} of each video, as by default. A run folder, or "
            "load_predictor, has them; evaluate= and data= give others"
        )
    if isinstance(policy, str) and needs_assigner(policy):
        raise UserError(f"policy {policy!r}: a model has no assigner; give its run, or policy=va.Assigned.load(RUN)")
    chosen = parse_policy(policy, None, model.config, weights=model) if isinstance(policy, str) else policy
    config = Config(
        model=model.config,
        assign=AssignConfig(frames=1),
        evaluate=evaluate or EvaluateConfig(),
        data=data or DataConfig(),
        loss=LossConfig(dropped="ce"),  # not used here; other losses are not allowed for every set of points
    )
    return _predictor(model, chosen or Fixed(model.config.points[0]), config, top)


def load_predictor(run: ConfigSource, policy: str | Policy | None = None, *, top: int = TOP) -> Predictor:
    """Loads what the predictions of a run need, once for many calls of `predict`.

    Args:
        run: A run folder, its `Config` or its YAML file. The device is `run.device`.
        policy: As in `predict`.
        top: Number of classes of a prediction.

    Raises:
        UserError: The policy does not fit the run.
        CheckpointError: The run has no model, or its assigner does not fit it.

    Example:
        >>> predictor = va.load_predictor("runs/mine", "fixed:7")
        >>> answers = [va.predict(predictor, path)[0].classes[0] for path in ("a.jpg", "b.jpg")]
    """
    config = as_config(run)
    if isinstance(policy, str) and not needs_assigner(policy):
        parse_policy(policy, None, config.model, config.run.dir)  # a wrong text is refused before the model is loaded
    model = inference_model(config)
    if policy is not None and not isinstance(policy, str):
        return _predictor(model, policy, config, top)
    assigned = Assigned.for_model(config.run.dir, model) if policy is None or needs_assigner(policy) else None
    if assigned is not None:
        assigned.say_other_inputs(label_inputs(config, None, None))
        if policy is None:
            _say_favoured(config.run.dir, model)
    text = policy or ("assigned" if assigned else f"fixed:{model.config.points[0]}")
    if policy is None and assigned is None and len(model.config.points) > 1:
        say(f"policy {text}, the costliest point, since {config.run.dir} has no assigner; --policy names another")
    chosen = parse_policy(text, assigned, model.config, config.run.dir, model)
    if is_policy_file(text):
        say_other_inputs(Path(text), config, None)
    return _predictor(model, chosen, config, top, checked=assigned is not None)


def _say_favoured(run: Path, model: TimeSformer) -> None:
    """Prints which policy the run's own evaluation favours over the assigner, if it does."""
    try:
        found = read_evaluation(run, ["model"])
    except UserError:
        return  # a prediction needs no evaluation
    favoured = favoured_policy(found["policies"], "assigned") if found["model"] == weights_digest(model) else None
    if favoured is not None:
        name, reason = favoured
        say(f"policy assigned; the evaluation of this run favours {name}, by --policy {name}: {reason}")


def _predictor(model: TimeSformer, policy: Policy, config: Config, top: int, *, checked: bool = False) -> Predictor:
    if not checked:  # a second check would print its warnings twice
        policy.check(model)
    if policy.unit == "video" and config.evaluate.views == 1:
        raise UserError(
            f"policy {policy.name}: goes over the views of a video, which has one; raise evaluate.temporal_views or "
            "evaluate.spatial_crops"
        )
    if policy.assigner is not None:  # thumbnails are cut as in the assigner's fit
        config = config.model_copy(update={"assign": policy.assigner.config})
    router = Router(model, policy, batch=config.evaluate.batch, average=config.evaluate.average)
    return Predictor(model, policy, config, _class_names(model, config.data), top, router)


def _found(videos: Videos, fps: float | None, config: Config) -> tuple[list[_Video], list[str]]:
    """Returns the videos that are meant, and what is left out of given folders."""
    given: Iterable[str | Path | Frames] = [videos] if isinstance(videos, str | Path | np.ndarray | Tensor) else videos
    items = iter(given)
    first = next(items, None)
    if first is None:
        raise UserError("predict: no video given; expected the path of a video, a list of paths, or frames")
    left_out: list[str] = []
    if not isinstance(first, str | Path) and first.ndim == _FRAME_DIMS:
        frames = _stacked(chain([first], items), config)
        return [_Video("frames", partial(_in_memory, "frames", frames, fps, config))], left_out
    found: list[_Video] = []
    for item in chain([first], items):
        if isinstance(item, str | Path):
            for path in _files(str(item), config, left_out):
                opened = partial(open_video, path, config.data.reader, limits=Limits.of(config.data))
                found.append(_Video(path, opened))
        else:
            kept = isinstance(videos, list | tuple | np.ndarray | Tensor)
            name = f"frames {len(found)}" if isinstance(videos, list | tuple) else "frames"
            frames = np.asarray(item) if kept else np.array(item)  # a generator may reuse its memory
            found.append(_Video(name, partial(_in_memory, name, frames, fps, config)))
    return found, left_out


def _files(path: str, config: Config, left_out: list[str]) -> list[str]:
    """Returns the videos of a folder of videos, or the path itself: a file, or a folder of frames."""
    if not os.path.isdir(path):
        return [path]
    return media_below(Path(path), left_out, images=config.model.num_frames == 1) or [path]


def _stacked(frames: Iterable[object], config: Config) -> np.ndarray:
    """Returns the frames `(H, W, 3)` of an iterable as one array; stops an endless one at `data.max_frames`."""
    kept: list[np.ndarray] = []
    for frame in frames:
        kept.append(np.array(frame))  # a copy: a camera may write each frame into the same memory
        if kept[-1].shape != kept[0].shape:
            raise UserError(f"predict: frame {len(kept) - 1} is {kept[-1].shape}, but the first is {kept[0].shape}")
        Limits.of(config.data).check_frames(Path("frames"), len(kept))
    return np.stack(kept)


def _in_memory(name: str, frames: np.ndarray, fps: float | None, config: Config) -> FrameReader:
    if frames.ndim != _VIDEO_DIMS or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):  # noqa: PLR2004
        raise UserError(
            f"predict: {name}: expected uint8 RGB frames (H, W, 3), or (F, H, W, 3) of a video, got {frames.dtype} "
            f"{frames.shape}"
        )
    if fps is None or not fps > 0:
        raise UserError(f"predict: {name}: expected fps=, the frames per second, above 0, got {fps}")
    limits = Limits.of(config.data)
    limits.check_pixels(Path(name), frames.shape[2], frames.shape[1])
    limits.check_frames(Path(name), len(frames))
    return FrameReader(name, frames, fps)


def _predict_all(
    predictor: Predictor, videos: Sequence[_Video], result: Predictions, on_error: Literal["raise", "list"]
) -> None:
    """Adds the predictions of the videos to the result, and those that fail to its list if `on_error` says so."""
    routed = predictor.router.stream(_read(predictor, video) for video in videos)
    with progress_shown(len(videos) > 1), Bar("predict", total=len(videos), unit="videos") as bar:
        for video, found in zip(videos, routed, strict=True):
            try:
                if not isinstance(found, RoutedVideo):
                    raise VideoError(str(found)) if isinstance(found, Failure) else found
                prediction = prediction_of(predictor, video.name, found)
                if on_error == "list" and math.isnan(prediction.probabilities[0]):  # JSON has no NaN
                    raise VideoError(f"{video.name}: the model's probabilities are NaN")
                result.predictions.append(prediction)
            except VideoError as error:
                if on_error == "raise":
                    raise
                result.failed.append({"path": video.name, "cause": f"{error}{_hint(video.name)}"})
            bar.step()


def _read(predictor: Predictor, video: _Video) -> ClipViews | VideoError:
    """Returns the views of a video, or the reason why it cannot be read."""
    evaluate = predictor.config.evaluate
    try:
        with video.open() as reader:
            views, thumbnails, _ = read_views(
                reader,
                predictor.config,
                temporal_views=evaluate.temporal_views,
                spatial_crops=evaluate.spatial_crops,
                thumbnails=predictor.policy.assigner is not None,
            )
    except VideoError as error:
        return error
    return ClipViews(views, thumbnails)


def _class_names(model: TimeSformer, data: DataConfig) -> tuple[str, ...]:
    """Returns the names of `data.classes` if given, otherwise those of the model, otherwise the numbers.

    Raises:
        ConfigError: The file has another number of names than the model, or the model's names in another order.
    """
    count = model.config.num_classes
    stored = model.class_names or tuple(map(str, range(count)))  # a model that was built in Python may have no names
    if data.classes is None:
        return stored
    names = read_classes(data.classes).names
    if len(names) != count:
        raise ConfigError(f"data.classes: {data.classes} has {plural(len(names), 'class')}, but the model has {count}")
    given, own = list(map(normalised, names)), list(map(normalised, stored))
    if given != own and set(given) == set(own):
        number = next(number for number, pair in enumerate(zip(given, own, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"data.classes: class {number} of {data.classes} is {names[number]!r}, but the model was trained with "
            f"{stored[number]!r}; expected the order of the training"
        )
    return names


def predict_views(predictor: Predictor, name: str, views: Tensor, thumbnails: Tensor) -> Prediction:
    """Predicts a video whose views are read.

    Args:
        predictor: The model, its policy and their settings.
        name: The `path` of the prediction.
        views: uint8 `(clips, crops, C, T, S, S)`.
        thumbnails: uint8 `(clips, C, A, s, s)`; not used by a policy without an assigner.
    """
    (routed,) = predictor.router.stream([ClipViews(views, thumbnails)])
    assert isinstance(routed, RoutedVideo), "only a video that could not be read has no result"
    return prediction_of(predictor, name, routed)


def prediction_of(predictor: Predictor, name: str, routed: RoutedVideo) -> Prediction:
    """Returns the prediction for a video that has run."""
    model, policy, config, names, top, _ = predictor
    clips, crops = routed.item.views.shape[:2]
    logits = routed.logits.reshape(1, clips * crops, -1)  # (1, views, classes)
    if policy.unit == "clip":
        logits = logits[:, view_order(clips, crops)]  # the order of a video's views, in which their mean is taken
    else:
        logits = logits[:, : routed.decision.stops[0]]
    probabilities = running_answers(logits, config.evaluate.average)[0, -1]  # (classes,)
    best = (-probabilities).argsort(kind="stable")[:top]  # equal probabilities in the order of the classes
    ran = views_run(policy, routed.decision, len(config.model.points), clips=clips, crops=crops)
    return Prediction(
        path=name,
        classes=tuple(names[i] for i in best),
        probabilities=tuple(float(probabilities[i]) for i in best),
        points=tuple(model.config.points[i] for i in routed.choice),
        macs=int(clip_macs(policy, ran, config.model)[0].sum()),
        views=int(ran.sum()),
    )


def _hint(path: str) -> str:
    """Returns what to do about a path that is no video, to be appended to its error; empty if there is no advice."""
    if os.path.isfile(path) and not is_media(path) and is_known(path):
        return "; expected video files, not a list of them"
    return ""


def predict_files(config: Config, paths: Sequence[str], policy: str | None) -> Predictions:
    """Predicts files with the model of a run; the verb `predict`. Writes nothing.

    Args:
        config: The run's config.
        paths: Video files, folders of frames, or folders of videos. A file that cannot be read, or whose
            probabilities are NaN, is listed with its cause.
        policy: The text of a policy; see `predict`.

    Raises:
        UserError: No path is given, or the policy is unknown or does not fit the model.
    """
    if not paths:
        raise UserError("predict: no video given; expected `videoadapt predict CONFIG VIDEO ...`")
    return predict(config, paths, policy, on_error="list")
