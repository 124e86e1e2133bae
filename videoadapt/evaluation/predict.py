"""Predictions for video files: classes with probabilities, the point that each clip got, and its cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from videoadapt.config.load import Config
from videoadapt.config.sections import AssignConfig, DataConfig, EvaluateConfig, LossConfig
from videoadapt.data.clips.datasets import read_views
from videoadapt.data.video.readers import open_video
from videoadapt.errors import UserError, VideoError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.label_rules import softmax
from videoadapt.routing.policy import Assigned, Fixed, Policy, parse_policy
from videoadapt.routing.router import clip_macs, route
from videoadapt.routing.scores import inference_model
from videoadapt.runtime.files import write_json

TOP = 5  # classes of a prediction


@dataclass(frozen=True)
class Prediction:
    """What the model says of one video: the best classes, best first, and at which points that was seen."""

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    points: tuple[str, ...]  # of each clip
    macs: int  # all views, the assigner included


def predict(
    model: TimeSformer,
    paths: Sequence[str | Path],
    policy: str | Policy | None = None,
    *,
    evaluate: EvaluateConfig | None = None,
    data: DataConfig | None = None,
    top: int = TOP,
) -> list[Prediction]:
    """Classes of videos of any length, one prediction per path, in order.

    `policy` is `"fixed:14"`, `"cascade:7,14:0.6"` (see `parse_cascade`), a policy such as
    `Assigned.load("runs/demo")`, or none for the costliest point. Every clip gets its point, shared by its crops;
    probabilities are the mean over all views. `evaluate` and `data` say how views are cut, read and resized, as those
    sections of a config do; none: their defaults. Raises `VideoError` for a file that cannot be read.
    """
    points = model.config.points
    chosen = parse_policy(policy, None, model.config) if isinstance(policy, str) else policy or Fixed(points[0])
    chosen.check(model)
    assign = chosen.assigner.config if chosen.assigner is not None else AssignConfig(frames=1)
    config = Config(
        model=model.config,
        assign=assign,
        evaluate=evaluate or EvaluateConfig(),
        data=data or DataConfig(),
        loss=LossConfig(dropped="ce"),  # of no consequence here, and allowed for all points
    )
    return [_predict_one(model, path, chosen, config, top) for path in paths]


def _predict_one(model: TimeSformer, path: str | Path, policy: Policy, config: Config, top: int) -> Prediction:
    crops = config.evaluate.spatial_crops
    views, thumbnails, _ = read_views(
        open_video(path, config.data.reader),
        config,
        temporal_views=config.evaluate.temporal_views,
        spatial_crops=crops,
        thumbnails=policy.assigner is not None,
    )
    routed = route(model, views, policy, batch=config.evaluate.batch, thumbnails=thumbnails)
    probabilities = softmax(routed.logits).mean((0, 1))
    best = (-probabilities).argsort(kind="stable")[:top]
    names = model.class_names or tuple(str(i) for i in range(len(probabilities)))
    points = tuple(config.model.points[i] for i in routed.choice)
    clips, _ = clip_macs(policy, routed.choice, config.model, crops=crops)
    return Prediction(
        str(path), tuple(names[i] for i in best), tuple(float(probabilities[i]) for i in best), points, int(clips.sum())
    )


def predict_files(config: Config, paths: Sequence[str], policy: str | None) -> dict[str, Any]:
    """The verb: predictions of the files that can be read, and the causes for those that cannot.

    Writes `predict/predictions.json` in the run folder. Policy none is the assigner's where the run has one.
    """
    if not paths:
        raise UserError("predict: no video named; expected `videoadapt predict CONFIG VIDEO ...`")
    model = inference_model(config)
    assigned = Assigned.for_model(config.run.dir, model) if policy in (None, "assigned") else None
    text = policy or ("assigned" if assigned else f"fixed:{model.config.points[0]}")
    chosen = parse_policy(text, assigned, model.config, config.run.dir, model)
    config = config.model_copy(update={"assign": chosen.assigner.config}) if chosen.assigner is not None else config
    done, failed = [], []
    for path in paths:
        try:
            prediction = _predict_one(model, path, chosen, config, TOP)
        except VideoError as error:
            failed.append({"path": path, "cause": str(error)})
            continue
        if math.isnan(prediction.probabilities[0]):  # JSON has no NaN, and there is no class to show
            failed.append({"path": path, "cause": f"{path}: the model's probabilities are NaN"})
        else:
            done.append(prediction)
    result = {"policy": text, "predictions": [asdict(p) for p in done], "failed": failed}
    write_json(config.run.dir / "predict" / "predictions.json", result)
    return result
