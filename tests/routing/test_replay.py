"""A replayed policy gives the right answers and costs of an evaluation, video by video."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

import small_runs as runs
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.config.sections import Average
from videoadapt.config.views import view_order
from videoadapt.data.index.manifest import load_or_index
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.routing.label_rules import average_views
from videoadapt.routing.policy import Cascade, Fixed, Policy, parse_cascade
from videoadapt.routing.replay import replay
from videoadapt.routing.scores import Scores, inference_model, score
from videoadapt.training.state import State

CASCADES = ("4,6,8:0.9,0.8", "8:views:0.7", "4,8:views:0.6,0.95:margin", "6:views:0.9:entropy")
CLIPS, CROPS = 3, 2


def scored(config: Config) -> Scores:
    manifest = load_or_index(config)
    rows = np.flatnonzero(manifest.table["split"] == "val").tolist()
    files = score(inference_model(config), manifest, rows, config, name="evaluate", temporal_views=CLIPS)
    assert files is not None
    return files.load("data.val.annotations")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose stored answers are often right, differ between views and points, and are NaN for one video."""
    folder = tmp_path_factory.mktemp("replay")
    config = runs.config(
        runs.make_data(folder / "data"), folder / "run", data={"holdout": 0.0}, label={"source": "train"},
        evaluate={"temporal_views": CLIPS, "spatial_crops": CROPS, "speed_clips": 0, "cascade": CASCADES},
    )  # fmt: skip
    train_checkpoints(config.run.dir).save(0, *State.start(config, load_or_index(config)).saved())
    [file] = scored(config).files
    with np.load(file) as stored:
        arrays = dict(stored)
    logits = np.random.default_rng(0).normal(0, 2, arrays["logits"].shape).astype(np.float32)
    logits[np.arange(len(logits)), ..., arrays["truth"]] += 2.5
    logits[:CLIPS, :, 1] = np.nan  # the first video at point 6
    with file.open("wb") as opened:
        np.savez(opened, **arrays | {"logits": logits})
    return config


def of_average(config: Config, average: Average) -> Config:
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"average": average})})


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_a_replay_is_the_evaluation(run: Config, average: Average) -> None:
    config = of_average(run, average)
    rows = evaluate(config).to_json()["policies"]
    tables = {
        name: pd.read_parquet(config.run.dir / "evaluate" / f"{name}.parquet").set_index("policy")
        for name in ("clips", "videos")
    }
    policies: list[Policy] = [Fixed(point) for point in config.model.points]
    policies += [parse_cascade(text, config.model, None) for text in CASCADES]
    scores = scored(config)
    found = replay(policies, scores, config)
    macs = point_macs(config.model)
    for policy, right, cost in zip(policies, found.right, found.macs, strict=True):
        clips, videos = (table.loc[policy.name] for table in tables.values())
        assert right.tolist() == videos["right"].tolist(), policy.name
        assert cost.tolist() == videos["macs"].tolist(), policy.name
        assert clips.groupby("video")[["macs", "views"]].sum().loc[videos["video"]].to_numpy().tolist() == (
            videos[["macs", "views"]].to_numpy().tolist()
        )
        assert rows[policy.name]["macs_per_video"] == pytest.approx(cost.mean())
        assert rows[policy.name]["macs_per_view"] == pytest.approx(cost.mean() / CLIPS / CROPS)
        assert rows[policy.name]["views_per_video"] == pytest.approx(videos["views"].mean())
        assert (clips["point"].isna() == (clips["views"] == 0)).all()
    fixed = {point: cost for point, cost in zip(config.model.points, found.macs, strict=False)}
    assert all((cost == CLIPS * CROPS * macs[point]).all() for point, cost in fixed.items())
    single = tables["videos"].loc["cascade:8:views:0.7"]
    assert (single["macs"] == macs["8"] * single["views"]).all()
    assert single["views"].min() == 1 and single["views"].max() == CLIPS * CROPS
    both = tables["videos"].loc["cascade:4,8:views:0.6,0.95:margin"]
    assert (both["macs"] == macs["4"] + macs["8"] * (both["views"] - 1)).all()
    assert both["views"].min() == 1 and both["views"].max() == 1 + CLIPS * CROPS
    lost = tables["videos"].loc["cascade:6:views:0.9:entropy"].iloc[0]
    assert lost["views"] == CLIPS * CROPS and not lost["right"] and pd.isna(lost["prediction"])


def test_view_cascades_end_where_the_mean_of_the_first_views_is_sure(run: Config) -> None:
    """Brute force, video by video, on the stored logits."""
    scores = scored(run)
    order, macs = view_order(CLIPS, CROPS), point_macs(run.model)["8"]
    [shard] = scores.shards()
    found = replay([Cascade(("8",), (0.8,), views=True)], scores, run)
    for number, (right, cost) in enumerate(zip(found.right[0], found.macs[0], strict=True)):
        views = shard.logits[number * CLIPS : (number + 1) * CLIPS, :, 0].reshape(CLIPS * CROPS, -1)[order]
        count = 1
        while average_views(views[:count], 0, "probabilities").max() < 0.8 and count < CLIPS * CROPS:
            count += 1
        assert cost == count * macs
        assert right == (average_views(views[:count], 0, "probabilities").argmax() == shard.truth[number * CLIPS])


def test_thousands_of_policies_take_seconds(run: Config) -> None:
    scores = scored(run)
    policies = [Cascade(("4", "6", "8"), (t, t)) for t in np.linspace(0, 1, 200).tolist()]
    replay(policies[:2], scores, run)
    start = time.process_time()
    found = replay(policies, scores, run)
    assert time.process_time() - start < 2
    assert (np.diff(found.macs, axis=0) >= 0).all()  # a higher threshold never costs less
