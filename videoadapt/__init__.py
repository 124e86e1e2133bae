"""videoadapt: one TimeSformer at several token lengths, and each clip at the fewest tokens that suffice.

The names below are the public API; everything else may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from videoadapt.checkpoint import load_assigner as load_assigner
    from videoadapt.checkpoint import load_model as load_model
    from videoadapt.config import Config as Config
    from videoadapt.config import load_config as load_config
    from videoadapt.data.readers import open_video as open_video
    from videoadapt.errors import CheckpointError as CheckpointError
    from videoadapt.errors import ConfigError as ConfigError
    from videoadapt.errors import UserError as UserError
    from videoadapt.errors import VideoError as VideoError
    from videoadapt.model.timesformer import TimeSformer as TimeSformer
    from videoadapt.model.timesformer import build_model as build_model
    from videoadapt.model.weights import load_weights as load_weights
    from videoadapt.points import Point as Point
    from videoadapt.policy import Assigned as Assigned
    from videoadapt.policy import Cascade as Cascade
    from videoadapt.policy import Fixed as Fixed
    from videoadapt.policy import Oracle as Oracle
    from videoadapt.policy import Random as Random
    from videoadapt.prediction import Prediction as Prediction
    from videoadapt.prediction import predict as predict

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "load_config": "config",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "UserError": "errors",
    "VideoError": "errors",
    "Point": "points",
    "TimeSformer": "model.timesformer",
    "build_model": "model.timesformer",
    "load_weights": "model.weights",
    "load_model": "checkpoint",
    "load_assigner": "checkpoint",
    "open_video": "data.readers",
    "Assigned": "policy",
    "Cascade": "policy",
    "Fixed": "policy",
    "Oracle": "policy",
    "Random": "policy",
    "Prediction": "prediction",
    "predict": "prediction",
}
__all__ = sorted(_HOME)  # noqa: PLE0605 - names that `__getattr__` finds


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used, so that `import videoadapt` costs next to nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'videoadapt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"videoadapt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
