"""Predicts video files: classes with probabilities, the point where each clip ends, and the cost."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from videoadapt.config.load import Config
from videoadapt.config.sections import AssignConfig, DataConfig, EvaluateConfig, LossConfig
from videoadapt.data.clips.datasets import read_views
from videoadapt.data.index.class_files import read_classes
from videoadapt.data.index.find_files import videos_below
from videoadapt.data.index.text import normalised
from videoadapt.data.video.limits import Limits
from videoadapt.data.video.readers import open_video
from videoadapt.data.video.suffixes import is_known, is_media
from videoadapt.errors import ConfigError, UserError, VideoError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.label_inputs import label_inputs
from videoadapt.routing.label_rules import average_views
from videoadapt.routing.policy import Assigned, Fixed, Policy, parse_policy
from videoadapt.routing.router import clip_macs, route
from videoadapt.routing.scores import inference_model
from videoadapt.runtime.files import Summary, write_json

TOP = 5  # classes of a prediction

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


@dataclass(frozen=True)
class Prediction:
    """The prediction for one video.

    Attributes:
        path: The file.
        classes: Names of the best classes, best first.
        probabilities: Their probabilities, means over all views of the video.
        points: The point where each clip ends.
        macs: MACs of all views at all points that they ran, and of the assigner.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    points: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Predictions:
    """The contents of `predictions.json`; the names are its keys."""

    policy: str
    predictions: list[Prediction]
    failed: list[dict[str, str]]  # path and cause


def predict(
    model: TimeSformer,
    paths: Sequence[str | Path],
    policy: str | Policy | None = None,
    *,
    evaluate: EvaluateConfig | None = None,
    data: DataConfig | None = None,
    top: int = TOP,
) -> list[Prediction]:
    """Predicts the classes of videos of any length.

    Every clip gets its point from the policy, through the same `decide` as in an evaluation. The crops of a clip share
    its point.

    Args:
        model: The model, in eval mode.
        paths: Video files.
        policy: `"fixed:14"`, `"cascade:7,14:0.6"` (see `parse_cascade`), or a policy such as
            `Assigned.load("runs/demo")`. None: the costliest point.
        evaluate: How views are cut, as the `evaluate` section of a config. None: its defaults.
        data: How videos are read and resized, as the `data` section of a config. None: its defaults.
        top: Number of classes of a prediction.

    Returns:
        One prediction per path, in order.

    Raises:
        VideoError: A file cannot be read.
        UserError: The policy needs the truth, or does not fit the model, or `data.classes` does not.
    """
    chosen = parse_policy(policy, None, model.config) if isinstance(policy, str) else policy
    chosen = chosen or Fixed(model.config.points[0])
    chosen.check(model)
    data = data or DataConfig()
    config = Config(
        model=model.config,
        assign=chosen.assigner.config if chosen.assigner is not None else AssignConfig(frames=1),
        evaluate=evaluate or EvaluateConfig(),
        data=data,
        loss=LossConfig(dropped="ce"),  # not used here; other losses are not allowed for every set of points
    )
    names = _class_names(model, data)
    return [_predict_one(model, path, chosen, config, names=names, top=top) for path in paths]


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
        raise ConfigError(f"data.classes: {data.classes} has {len(names)} classes, but the model has {count}")
    given, own = list(map(normalised, names)), list(map(normalised, stored))
    if given != own and set(given) == set(own):
        number = next(number for number, pair in enumerate(zip(given, own, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"data.classes: class {number} of {data.classes} is {names[number]!r}, but the model was trained with "
            f"{stored[number]!r}; expected the order of the training"
        )
    return names


def _predict_one(
    model: TimeSformer, path: str | Path, policy: Policy, config: Config, *, names: Sequence[str], top: int
) -> Prediction:
    crops = config.evaluate.spatial_crops
    views, thumbnails, _ = read_views(
        open_video(path, config.data.reader, limits=Limits.of(config.data)),
        config,
        temporal_views=config.evaluate.temporal_views,
        spatial_crops=crops,
        thumbnails=policy.assigner is not None,
    )
    # `views` are (clips, crops, C, T, S, S), `thumbnails` are (clips, C, A, s, s).
    average = config.evaluate.average
    routed = route(model, views, policy, batch=config.evaluate.batch, thumbnails=thumbnails, average=average)
    probabilities = average_views(routed.logits, (0, 1), average)  # (clips, crops, classes) to (classes,)
    best = (-probabilities).argsort(kind="stable")[:top]  # equal probabilities in the order of the classes
    clip_costs, _ = clip_macs(policy, routed.choice, config.model, crops=crops)
    return Prediction(
        path=str(path),
        classes=tuple(names[i] for i in best),
        probabilities=tuple(float(probabilities[i]) for i in best),
        points=tuple(config.model.points[i] for i in routed.choice),
        macs=int(clip_costs.sum()),
    )


def _files(path: str) -> list[str]:
    """Returns the videos of a folder of videos, or the path itself: a file, or a folder of frames."""
    if not os.path.isdir(path):
        return [path]
    found = videos_below(Path(path))
    return found or [path]


def _hint(path: str) -> str:
    """Returns what to do about a path that is no video, to be appended to its error; empty if there is no advice."""
    if _ADDRESS.match(path):
        return "; predict reads files: download the address, or record the camera to a file"
    if os.path.isfile(path) and not is_media(path) and is_known(path):
        return "; expected video files, not a list of them"
    return ""


def predict_files(config: Config, paths: Sequence[str], policy: str | None) -> Summary:
    """Predicts files with the model of a run; the verb `predict`.

    Writes `predict/predictions.json` in the run folder.

    Args:
        config: The run's config.
        paths: Video files, folders of frames, or folders of videos. A file that cannot be read, or whose
            probabilities are NaN, is listed with its cause.
        policy: The text of a policy. None: `assigned` if the run has an assigner, and otherwise the costliest point.

    Returns:
        The contents of `predictions.json`.

    Raises:
        UserError: No path is given, or the policy is unknown or does not fit the model.
    """
    if not paths:
        raise UserError("predict: no video given; expected `videoadapt predict CONFIG VIDEO ...`")
    model = inference_model(config)
    assigned = Assigned.for_model(config.run.dir, model) if policy in (None, "assigned") else None
    if assigned is not None:
        assigned.say_other_inputs(label_inputs(config, None, None))
    text = policy or (assigned.name if assigned else f"fixed:{model.config.points[0]}")
    chosen = parse_policy(text, assigned, model.config, config.run.dir, model)
    if chosen.assigner is not None:  # thumbnails are cut as in the assigner's fit
        config = config.model_copy(update={"assign": chosen.assigner.config})
    names = _class_names(model, config.data)
    result = Predictions(text, [], [])
    for path in (file for given in paths for file in _files(given)):
        try:
            prediction = _predict_one(model, path, chosen, config, names=names, top=TOP)
        except VideoError as error:
            result.failed.append({"path": path, "cause": f"{error}{_hint(path)}"})
            continue
        if math.isnan(prediction.probabilities[0]):  # JSON has no NaN, and there is no class to show
            result.failed.append({"path": path, "cause": f"{path}: the model's probabilities are NaN"})
        else:
            result.predictions.append(prediction)
    write_json(config.run.dir / "predict" / "predictions.json", asdict(result))
    return asdict(result)
