"""Experiment trackers (`train.tracker`): W&B, MLflow or ClearML get the metrics that `metrics.jsonl` has.

Rank 0 alone talks to the tracker. The server, the project and the credentials are set as each tracker's own
documentation says, by its environment variables or its login. A resumed run goes on with the same run of the tracker,
whose id is in `tracker.json` of the run folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from videoadapt.config.load import Config
from videoadapt.errors import ConfigError, RunError
from videoadapt.runtime.console import say
from videoadapt.runtime.files import write_json
from videoadapt.runtime.run_config import run_name

PROJECT = "videoadapt"  # unless the tracker's own environment variable names another
_PARAMS_PER_CALL, _PARAM_CHARACTERS = 100, 500  # MLflow's limits


class Tracker(Protocol):
    """A run of an experiment tracker."""

    id: str
    """Names the run, to go on with it later."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of a step, by name."""

    def close(self) -> None:
        """Sends the rest, and ends the run."""


def require_tracker(config: Config) -> None:
    """Raises `ConfigError` if the package of `train.tracker` is not installed."""
    name = config.train.tracker
    if name is not None and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"train.tracker: {name} is not installed in {sys.prefix}; pip install {name}, or set train.tracker=null"
        )


def open_tracker(config: Config) -> Tracker | None:
    """Starts a run of the tracker, or goes on with the one of this run folder.

    A tracker that fails later never ends the training: the failure is printed, and the tracker gets no more values.

    Args:
        config: `train.tracker`, `run.dir`, and the values that the tracker shows as the settings of the run.

    Returns:
        The run; None without `train.tracker`.

    Raises:
        RunError: The tracker cannot be started.
    """
    name = config.train.tracker
    if name is None:
        return None
    path = config.run.dir / "tracker.json"
    kinds: dict[str, Callable[[Config, str | None], Tracker]] = {
        "wandb": _WandB,
        "mlflow": _MLflow,
        "clearml": _ClearML,
    }
    try:
        tracker = kinds[name](config, _id_of(path, name))
    except Exception as error:  # each tracker has its own errors, some of them plain ones
        raise RunError(
            f"train.tracker: {name} cannot start: {' '.join(str(error).split())[:300]}; see its documentation, or set "
            "train.tracker=null"
        ) from error
    write_json(path, {"tracker": name, "id": tracker.id})
    return Tolerant(tracker, name)


def _id_of(path: Path, name: str) -> str | None:
    """Returns the id of the tracker's run; None if this run has none of this tracker."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["id"]) if found["tracker"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Tolerant:
    """Gives up a tracker that fails, for example because its server has gone: it must not end the training."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.id = tracker.id
        self._tracker: Tracker | None = tracker
        self._name = name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values, unless the tracker has failed before."""
        if self._tracker is not None:
            try:
                self._tracker.log(step, values)
            except Exception as error:  # each tracker has its own errors
                self._give_up(error)

    def close(self) -> None:
        """Ends the run, unless the tracker has failed before."""
        if self._tracker is not None:
            try:
                self._tracker.close()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        say(f"train.tracker: {self._name} failed and gets no more values; metrics.jsonl has them all: {error}")
        self._tracker = None


class _WandB:
    def __init__(self, config: Config, known_id: str | None) -> None:
        import wandb

        self.id = known_id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            id=self.id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name(config.run.dir),
            dir=os.environ.get("WANDB_DIR", str(config.run.dir)),
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, config: Config, known_id: str | None) -> None:
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient()
        if known_id is not None:
            self.id = known_id
            self._client.update_run(self.id, status="RUNNING")
            return
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.id = self._client.create_run(experiment.experiment_id, run_name=run_name(config.run.dir)).info.run_id
        dumped = config.model_dump(mode="json")
        params = [
            Param(f"{section}.{key}", str(value)[:_PARAM_CHARACTERS])
            for section, values in dumped.items()
            for key, value in values.items()
        ]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(self.id, params=params[start : start + _PARAMS_PER_CALL])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        import time

        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        # MLflow allows no @ in a name: top1/14@0.7 is top1/14_keep_0.7.
        metrics = [Metric(name.replace("@", "_keep_"), value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics, synchronous=False)  # a step does not wait for the server

    def close(self) -> None:
        import mlflow

        mlflow.flush_async_logging()
        self._client.set_terminated(self.id)


class _ClearML:
    def __init__(self, config: Config, known_id: str | None) -> None:
        from clearml import Task

        self._task: Any = Task.init(
            project_name=os.environ.get("CLEARML_PROJECT", PROJECT),
            task_name=run_name(config.run.dir),
            continue_last_task=known_id or False,
            reuse_last_task_id=False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,  # otherwise it would also send TensorBoard's values and every checkpoint
        )
        self._task.set_initial_iteration(0)  # otherwise a resumed run's steps would start after its last one
        self._task.connect_configuration(config.model_dump(mode="json"), name="config")
        self.id = str(self._task.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        logger = self._task.get_logger()
        for name, value in values.items():
            title, _, series = name.partition("/")
            logger.report_scalar(title, series or title, value, iteration=step)

    def close(self) -> None:
        self._task.close()
