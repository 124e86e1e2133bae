"""videoadapt: one TimeSformer at several token lengths; each clip gets the fewest tokens that suffice.

The names below are the public API. All other names may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors do not run `__getattr__`; `_HOME` has the same names
    from videoadapt.config.load import Config as Config
    from videoadapt.config.load import load_config as load_config
    from videoadapt.config.points import Point as Point
    from videoadapt.data.video.readers import open_video as open_video
    from videoadapt.errors import CheckpointError as CheckpointError
    from videoadapt.errors import ConfigError as ConfigError
    from videoadapt.errors import UserError as UserError
    from videoadapt.errors import VideoError as VideoError
    from videoadapt.evaluation.predict import Prediction as Prediction
    from videoadapt.evaluation.predict import predict as predict
    from videoadapt.model.checkpoint import load_model as load_model
    from videoadapt.model.timesformer import TimeSformer as TimeSformer
    from videoadapt.model.timesformer import build_model as build_model
    from videoadapt.model.weights.load import load_weights as load_weights
    from videoadapt.routing.assigner import load_assigner as load_assigner
    from videoadapt.routing.policy import Assigned as Assigned
    from videoadapt.routing.policy import Cascade as Cascade
    from videoadapt.routing.policy import Fixed as Fixed
    from videoadapt.routing.policy import Oracle as Oracle
    from videoadapt.routing.policy import Random as Random

__version__ = "0.1.0"

_HOME = {  # the module of each public name
    "Config": "config.load",
    "load_config": "config.load",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "UserError": "errors",
    "VideoError": "errors",
    "Point": "config.points",
    "TimeSformer": "model.timesformer",
    "build_model": "model.timesformer",
    "load_weights": "model.weights.load",
    "load_model": "model.checkpoint",
    "load_assigner": "routing.assigner",
    "open_video": "data.video.readers",
    "Assigned": "routing.policy",
    "Cascade": "routing.policy",
    "Fixed": "routing.policy",
    "Oracle": "routing.policy",
    "Random": "routing.policy",
    "Prediction": "evaluation.predict",
    "predict": "evaluation.predict",
}
__all__ = sorted(_HOME)  # noqa: PLE0605 - not all are names of this module yet


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that `import videoadapt` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'videoadapt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"videoadapt.{_HOME[name]}"), name)
    globals()[name] = value  # Python then finds the name without calling this function again
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
