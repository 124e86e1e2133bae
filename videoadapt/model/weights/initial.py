"""The model with which the training of a config begins."""

from __future__ import annotations

from pathlib import Path

from videoadapt.config.load import Config
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.facts import describe_origin, require_normalisation
from videoadapt.model.weights.load import load_weights
from videoadapt.runtime.console import say


def build_model(config: Config) -> TimeSformer:
    """Returns the model with which the training of a config begins, on the CPU.

    Its weights are random, or those of `train.init`: then it prints what was loaded. All of them can be trained;
    `train.freeze` is a matter of the training. `load_weights` fills a model with any other weights.

    Raises:
        CheckpointError: `train.init` cannot be read, or does not fit the model.
        ConfigError: The weights were trained with another mean or deviation than the config's default.
    """
    model = TimeSformer(config.model)
    if config.train.init:
        load_initial_weights(model, config.train.init, config)
    return model


def load_initial_weights(model: TimeSformer, source: str, config: Config) -> None:
    """Fills a model in place with the weights of `train.init`, and prints what was loaded."""
    report = load_weights(model, source, which=config.train.weights, resample=config.train.resample)
    say(str(report))
    say(f"{Path(source).name}: {describe_origin(source, report.normalisation)}")
    if note := require_normalisation(config.model, source, report.normalisation):
        say(note)
