"""videoadapt: one TimeSformer at several token lengths; each clip gets the fewest tokens that suffice.

    import videoadapt as va
    config = va.load_config("config.yaml", ["train.epochs=5"])  # a YAML file or a run folder, and overrides
    va.train(config)                                             # then va.label, va.assign, va.evaluate
    va.predict("runs/mine", "clip.mp4")                          # a run folder, and videos

Stages: functions that take a Config, a YAML file or a run folder, and return a result with typed fields
    index     -> Manifest             probes every listed video
    train     -> TrainSummary         stage 1: trains one model at all points
    label     -> LabelSummary         stage 2: the cheapest point at which the model is right, for every clip
    assign    -> AssignSummary        stage 2: fits the network that predicts it
    calibrate -> CalibrateSummary     the cheapest policy that keeps a promise on accuracy or cost
    evaluate  -> EvaluationSummary    accuracy, cost and speed of every policy
    predict   -> Predictions          classes, points and cost of videos, a sequence of Prediction
    serve     -> PageServer           a local page that shows the answer of every point to a video
    report    -> ReportSummary        the page that shows what a run saved at what loss
    export    -> ExportSummary        ONNX, torch.export, a folder for the hub, one point for Hugging Face

Configs
    load_config, Config, Point        a checked config; an operating point

Models
    build_model, TimeSformer          a new model, with the weights of train.init; model(clips, point) returns logits
    load_model, load_assigner         the newest model of a run, and its assigner
    load_predictor -> Predictor       model, policy and settings of a run, for many calls of predict
    load_weights                      loads pretrained weights into a model
    AdaptiveModel                     model, assigner and policy: save_pretrained, from_pretrained, predict

Data
    ClipDataset                       clips of a manifest or a folder, for a DataLoader of your own
    preprocess                        makes the input of a model from uint8 clips
    open_video                        opens a video; `frames` returns frames by number

Policies: rules that give each clip its point
    Fixed, Mixture, Assigned, Cascade, Leap, Random, Oracle
    Router                            runs clips in memory, or of a stream, by a policy; clips of a point share batches
    read_clips, ClipViews             the views and thumbnails of a video, for a Router

Errors, with a message of one line
    UserError                         wrong input; ConfigError, VideoError and CheckpointError are kinds of it
    RunError                          a run that failed

`help(va.train)` explains a name; docs/python.md has examples. All other names may change. A name is imported at its
first use, so `from videoadapt import *` finds none: write `import videoadapt as va`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors do not run `__getattr__`; `_HOME` has the same names
    from videoadapt.commands.serve.server import PageServer as PageServer
    from videoadapt.commands.serve.server import serve as serve
    from videoadapt.commands.verbs import assign as assign
    from videoadapt.commands.verbs import calibrate as calibrate
    from videoadapt.commands.verbs import evaluate as evaluate
    from videoadapt.commands.verbs import export as export
    from videoadapt.commands.verbs import index as index
    from videoadapt.commands.verbs import label as label
    from videoadapt.commands.verbs import train as train
    from videoadapt.config.load import Config as Config
    from videoadapt.config.load import load_config as load_config
    from videoadapt.config.points import Point as Point
    from videoadapt.data.clips.clip_dataset import ClipDataset as ClipDataset
    from videoadapt.data.clips.clip_dataset import ClipViews as ClipViews
    from videoadapt.data.clips.clip_dataset import read_clips as read_clips
    from videoadapt.data.clips.views import preprocess as preprocess
    from videoadapt.data.index.manifest import Manifest as Manifest
    from videoadapt.data.video.readers import open_video as open_video
    from videoadapt.errors import CheckpointError as CheckpointError
    from videoadapt.errors import ConfigError as ConfigError
    from videoadapt.errors import RunError as RunError
    from videoadapt.errors import UserError as UserError
    from videoadapt.errors import VideoError as VideoError
    from videoadapt.evaluation.evaluate import EvaluationSummary as EvaluationSummary
    from videoadapt.evaluation.predict import Prediction as Prediction
    from videoadapt.evaluation.predict import Predictions as Predictions
    from videoadapt.evaluation.predict import Predictor as Predictor
    from videoadapt.evaluation.predict import load_predictor as load_predictor
    from videoadapt.evaluation.predict import predict as predict
    from videoadapt.exporting.adaptive import AdaptiveModel as AdaptiveModel
    from videoadapt.exporting.export import ExportSummary as ExportSummary
    from videoadapt.model.checkpoint import load_model as load_model
    from videoadapt.model.timesformer import TimeSformer as TimeSformer
    from videoadapt.model.weights.initial import build_model as build_model
    from videoadapt.model.weights.load import load_weights as load_weights
    from videoadapt.reporting.page import ReportSummary as ReportSummary
    from videoadapt.reporting.page import report as report
    from videoadapt.routing.assigner import load_assigner as load_assigner
    from videoadapt.routing.calibrate import CalibrateSummary as CalibrateSummary
    from videoadapt.routing.fit_assigner import AssignSummary as AssignSummary
    from videoadapt.routing.label import LabelSummary as LabelSummary
    from videoadapt.routing.policy import Assigned as Assigned
    from videoadapt.routing.policy import Cascade as Cascade
    from videoadapt.routing.policy import Fixed as Fixed
    from videoadapt.routing.policy import Leap as Leap
    from videoadapt.routing.policy import Mixture as Mixture
    from videoadapt.routing.policy import Oracle as Oracle
    from videoadapt.routing.policy import Random as Random
    from videoadapt.routing.router import Router as Router
    from videoadapt.training.metrics import TrainSummary as TrainSummary

__version__ = "0.1.0"

_HOME = {  # the module of each public name
    "assign": "commands.verbs",
    "calibrate": "commands.verbs",
    "evaluate": "commands.verbs",
    "export": "commands.verbs",
    "index": "commands.verbs",
    "label": "commands.verbs",
    "train": "commands.verbs",
    "Config": "config.load",
    "load_config": "config.load",
    "Point": "config.points",
    "ClipDataset": "data.clips.clip_dataset",
    "ClipViews": "data.clips.clip_dataset",
    "read_clips": "data.clips.clip_dataset",
    "preprocess": "data.clips.views",
    "Manifest": "data.index.manifest",
    "open_video": "data.video.readers",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "RunError": "errors",
    "UserError": "errors",
    "VideoError": "errors",
    "EvaluationSummary": "evaluation.evaluate",
    "PageServer": "commands.serve.server",
    "serve": "commands.serve.server",
    "Prediction": "evaluation.predict",
    "Predictions": "evaluation.predict",
    "Predictor": "evaluation.predict",
    "load_predictor": "evaluation.predict",
    "predict": "evaluation.predict",
    "AdaptiveModel": "exporting.adaptive",
    "ExportSummary": "exporting.export",
    "load_model": "model.checkpoint",
    "TimeSformer": "model.timesformer",
    "build_model": "model.weights.initial",
    "load_weights": "model.weights.load",
    "ReportSummary": "reporting.page",
    "report": "reporting.page",
    "load_assigner": "routing.assigner",
    "CalibrateSummary": "routing.calibrate",
    "AssignSummary": "routing.fit_assigner",
    "LabelSummary": "routing.label",
    "Assigned": "routing.policy",
    "Cascade": "routing.policy",
    "Leap": "routing.policy",
    "Fixed": "routing.policy",
    "Mixture": "routing.policy",
    "Oracle": "routing.policy",
    "Random": "routing.policy",
    "Router": "routing.router",
    "TrainSummary": "training.metrics",
}
# No `__all__`: `help(videoadapt)` would print the whole text of every class in it, 2,700 lines.


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that `import videoadapt` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'videoadapt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"videoadapt.{_HOME[name]}"), name)
    globals()[name] = value  # Python then finds the name without calling this function again
    return value


def __dir__() -> list[str]:
    return [*sorted(_HOME), "__version__"]
