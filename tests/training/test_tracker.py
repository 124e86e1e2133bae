"""Experiment trackers: offline, with the package itself; a resumed run goes on with the same run of the tracker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

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
