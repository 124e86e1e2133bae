"""All stages of a small run over lengths x keeps, with cascades: the order of points, and the cost of each policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import small_runs as runs
import videoadapt as va
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import UserError
from videoadapt.evaluation.costs import flops
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.evaluation.evaluated import reported_policy
from videoadapt.evaluation.predict import predict, predict_files
from videoadapt.routing.fit_assigner import assign
from videoadapt.routing.label import label
from videoadapt.routing.label_rules import last_true
from videoadapt.training.train import train

CASCADES = ["4@0.5,8@0.3:0.3", "4@0.5,7,8:cost=0.6:margin", "4@0.5,8:1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run. Tests leave it as it is, or work on a copy."""
    folder = tmp_path_factory.mktemp("grid")
    config = runs.config(
        runs.make_data(folder / "data"),
        folder / "run",
        model={"points": ["8", "8@0.3", "7", "7@0.5", "4", "4@0.5"], "drop_blocks": [1]},
        train={"draw": "sampled"},
        evaluate={"cascade": CASCADES, "spatial_crops": 2, "crop_pct": 0.8},
        data={"interpolation": "bicubic"},
    )
    train(config)
    label(config)
    assign(config)
    evaluate(config)
    return config


def summary(run: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.run.dir / "evaluate" / "evaluate.json").read_text())
    return found


def test_a_label_is_the_right_point_of_the_least_cost_whatever_its_length(run: Config) -> None:
    macs = point_macs(run.model)
    assert list(macs) == ["8", "7", "8@0.3", "7@0.5", "4", "4@0.5"]
    outcomes = pd.read_parquet(run.run.dir / "labels" / "outcomes.parquet")
    labels = pd.read_parquet(run.run.dir / "labels" / "labels.parquet").set_index("video")["label"]
    for video, rows in outcomes[outcomes["right"]].groupby("video"):
        assert run.model.points[labels[video]] == min(rows["point"], key=lambda point: macs[point])
    right = outcomes.pivot(index="video", columns="point", values="right")[list(macs)].to_numpy()
    assert (last_true(right)[right.any(1)] == labels[right.any(1)]).all()


def test_the_cost_of_a_cascade_is_the_sum_over_the_points_that_it_ran(run: Config) -> None:
    macs, rows = point_macs(run.model), summary(run)["policies"]
    names = [name for name in rows if name.startswith("cascade:")]
    assert names[0] == "cascade:4@0.5,8@0.3:0.3"
    assert names[2] == "cascade:4@0.5,8:1"
    clips = pd.read_parquet(run.run.dir / "evaluate" / "clips.parquet")
    for name in names:
        points = name.split(":")[1].split(",")
        here = clips[clips["policy"] == name]
        cost = np.cumsum([macs[point] for point in points])
        assert (here["macs"] == 2 * here["point"].map(dict(zip(points, cost, strict=True)))).all()
    whole = rows[names[2]]
    assert whole["mix"]["8"] == 1
    assert whole["top1"] == rows["fixed:8"]["top1"]
    assert all(rows[name]["clips_per_s"] > 0 for name in names)


def test_the_front_is_marked_and_random_and_the_oracle_are_not_on_it(run: Config) -> None:
    rows = summary(run)["policies"]
    assert rows["fixed:4@0.5"]["pareto"]  # the cheapest policy
    assert not rows["oracle"]["pareto"] and not rows["random"]["pareto"]
    best = max(row["top1"] for name, row in rows.items() if name not in {"oracle", "random"})
    assert any(row["pareto"] and row["top1"] == best for row in rows.values())


def test_flops_reports_every_policy(run: Config) -> None:
    found = flops(run)
    assert [row["policy"] for row in found["policies"]] == list(summary(run)["policies"])
    assert found["clips"]["policy"] == reported_policy(summary(run)["policies"])


def test_predictions_of_a_cascade_equal_those_of_the_evaluation(run: Config) -> None:
    val = load_or_index(run).split("val")
    videos = pd.read_parquet(run.run.dir / "evaluate" / "videos.parquet").set_index(["policy", "video"])
    model = va.load_model(run.run.dir)
    for text, name in zip(CASCADES, [n for n in summary(run)["policies"] if n.startswith("cascade:")], strict=True):
        found = predict_files(run, val["path"].tolist(), f"cascade:{text}")
        for video, prediction in zip(val["video"], found, strict=True):
            assert prediction.classes[0] == videos.loc[(name, video), "prediction"]
            assert prediction.macs == videos.loc[(name, video), "macs"]
            stored = [videos.loc[(name, video), f"p_{k}"] for k in range(1, 6)]
            assert prediction.probabilities == pytest.approx(stored, abs=1e-5)
    with pytest.raises(UserError, match="cascade '8': expected POINT,POINT"):
        predict(model, [], "cascade:8")


def test_a_cascade_is_not_fitted_to_labels_of_other_weights(run: Config, tmp_path: Path) -> None:
    config = run.model_copy(update={"run": run.run.model_copy(update={"dir": tmp_path / "run"})})
    shutil.copytree(run.run.dir, config.run.dir)
    path = config.run.dir / "labels" / "label.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "another"}))
    for work in (lambda: evaluate(config), lambda: predict_files(config, ["a.mp4"], "cascade:4,8:cost=0.6")):
        with pytest.raises(UserError, match="these labels belong to other inputs: the weights .*Run `label` again"):
            work()
