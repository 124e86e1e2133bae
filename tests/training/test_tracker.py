"""Experiment trackers: offline, with the package itself; a resumed run goes on with the same run of the tracker."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest

import small_runs as runs
from videoadapt.config.load import Config
from videoadapt.errors import ConfigError
from videoadapt.training.metrics import Metrics, Validation
from videoadapt.training.tracker import Tolerant, open_tracker, require_tracker


def record(config: Config, steps: range) -> str:
    """Records steps as `train` does; returns the id of the tracker's run."""
    config.run.dir.mkdir(exist_ok=True)  # as in `train`
    tracker = open_tracker(config)
    assert tracker is not None
    metrics = Metrics(config.run.dir, steps.start - 1, steps.start - 1, tracker)
    for step in steps:
        metrics.write(step, {"loss/4@0.5": step / 10, "lr": 0.1})
    metrics.write_validation(Validation(steps[-1], 1, "val", 3, [], {"top1/4@0.5": 0.5, "loss/4@0.5": None}), 1.5)
    metrics.close()
    return tracker.id


def test_mlflow_gets_steps_validations_and_the_config_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")  # optional: no user needs it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = runs.config(tmp_path, tmp_path / "run", train={"tracker": "mlflow", "lr": 0.25})
    assert record(config, range(1, 3)) == (name := record(config, range(3, 5)))
    found = mlflow.MlflowClient().get_run(name)
    assert (found.info.run_name, found.info.status) == (tmp_path.name, "FINISHED")  # the folder itself is called `run`
    assert found.data.params["train.lr"] == "0.25"
    history = mlflow.MlflowClient().get_metric_history(name, "loss/4_keep_0.5")
    assert [(metric.step, metric.value) for metric in history] == [(step, step / 10) for step in range(1, 5)]
    assert found.data.metrics["validation_top1/4_keep_0.5"] == 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    if shared:
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "shared"))
        (tmp_path / "shared").mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = runs.config(tmp_path, tmp_path / "run", train={"tracker": "wandb"})
    name = record(config, range(1, 3))
    assert json.loads((config.run.dir / "tracker.json").read_text()) == {"tracker": "wandb", "id": name}
    folder = tmp_path / "shared" if shared else config.run.dir
    assert list((folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))


def test_a_tracker_that_is_not_installed_is_refused_and_one_that_fails_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.config(tmp_path, tmp_path / "run", train={"tracker": "clearml"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="train.tracker: clearml is not installed in .*; pip install clearml"):
        require_tracker(config)

    class Failing:
        id = "a"

        def log(self, step: int, values: Mapping[str, float]) -> None:
            raise ConnectionError("the server has gone")

        def close(self) -> None:
            raise AssertionError("given up before")

    tracker = Tolerant(Failing(), "clearml")
    for step in (1, 2):
        tracker.log(step, {"lr": 0.1})
    tracker.close()
    assert capsys.readouterr().err.count("clearml failed and gets no more values") == 1


# The packages are large and optional, so a module that records its calls takes the place of each.

STEPS = [1, 2, 3, 4]
WITH_VALIDATIONS = [1, 2, 2, 2, 3, 4, 4, 4]  # the values and the seconds of each


def recorded_twice(tmp_path: Path, tracker: str) -> str:
    """Two starts of one training; returns the id of the tracker's run, which is the same."""
    config = runs.config(tmp_path, tmp_path / "pets", train={"tracker": tracker})
    assert record(config, range(1, 3)) == (name := record(config, range(3, 5)))
    return name


def test_wandb_is_resumed_by_id_and_gets_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := MagicMock())
    name = recorded_twice(tmp_path, "wandb")
    for key, value in {"id": name, "resume": "allow", "name": "pets"}.items():
        assert [started.kwargs[key] for started in wandb.init.call_args_list] == [value, value]
    run = wandb.init.return_value
    assert [c.kwargs["step"] for c in run.log.call_args_list] == WITH_VALIDATIONS
    assert run.log.call_args_list[0].args[0]["loss/4@0.5"] == 0.1
    assert run.finish.call_count == 2


def test_mlflow_gets_one_run_and_names_that_it_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", mlflow := MagicMock())
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities := MagicMock())
    client = mlflow.MlflowClient.return_value
    client.create_run.return_value.info.run_id = "7"
    assert recorded_twice(tmp_path, "mlflow") == "7"
    assert client.create_run.call_count == 1
    assert client.update_run.mock_calls == [call("7", status="RUNNING")]
    metrics = [c.args for c in entities.Metric.call_args_list]
    assert not any("@" in name for name, *_ in metrics)
    assert [step for name, _, _, step in metrics if name == "loss/4_keep_0.5"] == STEPS
    assert client.set_terminated.mock_calls == [call("7")] * 2


def test_clearml_continues_its_task_at_the_steps_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clearml", clearml := MagicMock())
    init = clearml.Task.init
    task = init.return_value
    task.id = "7"
    assert recorded_twice(tmp_path, "clearml") == "7"
    assert [c.kwargs["continue_last_task"] for c in init.call_args_list] == [False, "7"]
    assert task.set_initial_iteration.mock_calls == [call(0)] * 2  # otherwise its steps would begin after the last one
    sent = task.get_logger.return_value.report_scalar.mock_calls
    assert [c.kwargs["iteration"] for c in sent if c.args[:2] == ("loss", "4@0.5")] == STEPS
    assert call("lr", "lr", 0.1, iteration=1) in sent
    assert task.close.call_count == 2
