"""`calibrate` chooses a policy with a promise, on clips that nothing was fitted to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import small_runs as runs
import videoadapt as va
from videoadapt.commands.tables import print_calibrate
from videoadapt.config.cascade import MEASURES
from videoadapt.config.load import Config, dump_config, load_config, make_config
from videoadapt.config.sections import CalibrateConfig, ModelConfig
from videoadapt.data.clips.datasets import Failure
from videoadapt.data.index.manifest import SCHEMA, Manifest, load_or_index
from videoadapt.errors import CheckpointError, ConfigError, UserError
from videoadapt.evaluation.outcomes import outcomes_of
from videoadapt.model.checkpoint import load_model, train_checkpoints
from videoadapt.routing.calibrate import _milliseconds, _sources, calibrate
from videoadapt.routing.calibrate_policies import Measured, Totals, best, measure, run_tests
from videoadapt.routing.candidates import KnownClips, Order, delta_of_orders, known_clips, orders_of
from videoadapt.routing.learn_then_test import provable_loss
from videoadapt.routing.policy import Fixed, Mixture, Policy
from videoadapt.routing.policy_file import PolicyFile
from videoadapt.routing.scores import Scored, Scores, require_scored, score
from videoadapt.runtime.files import write_json
from videoadapt.runtime.results import ShardResult
from videoadapt.training.state import State

MODEL = ModelConfig(points=("14", "10", "7"))
POINTS = MODEL.points


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with an untrained model, labels and an assigner, whose training left the calibration split alone."""
    folder = tmp_path_factory.mktemp("calibrate")
    config = runs.config(
        runs.make_data(folder / "data"),
        folder / "run",
        data={"calibrate": 0.3, "holdout": 0.4},
        assign={"epochs": 1},
        evaluate={"speed_clips": 0},
        calibrate={"eps": 0.4, "delta": 0.3},
    )
    state = State.start(config, load_or_index(config))
    train_checkpoints(config.run.dir).save(0, *state.saved())
    (config.run.dir / "config.yaml").write_text(dump_config(config))
    va.label(config, progress=False)
    va.assign(config, progress=False)
    return config


def test_the_policy_of_a_calibration_is_evaluated_and_predicts(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    result = va.calibrate(run)
    assert "orders by the label table of" in runs.command("calibrate", run.run.dir).stderr
    manifest = load_or_index(run)
    assert result.videos == len(manifest.split("calibrate")) > 8
    names = [point.policy for point in result.curve]
    assert len(names) == len(set(names)) > 100
    kinds = {name.partition(":")[0] for name in names}
    assert kinds == {"fixed", "mixture", "assigned", "cascade", "leap"}
    assert result.chosen is not None
    chosen, file = result.point(result.chosen), run.run.dir / "calibrate" / "policy.json"
    assert chosen is not None
    assert chosen.valid
    assert chosen.cost == min(point.cost for point in result.curve if point.valid) < 1
    assert sum(result.orders.values()) == pytest.approx(result.delta)
    assert json.loads((file.parent / "calibrate.json").read_text()) == result.to_json()

    evaluated = runs.command("evaluate", run.run.dir, "--policy", file, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    summary = json.loads(evaluated.stdout)
    assert summary["promises"] == {result.chosen: result.promise}
    assert result.chosen in summary["policies"]
    video = Path(manifest.split("val")["path"][0])
    predicted = va.predict(run, video, policy=str(file))
    assert predicted.policy == result.chosen
    assert runs.command("predict", run.run.dir, video, "--policy", file).returncode == 0


def test_a_leap_in_a_policy_file_decides_as_the_leap_itself(run: Config, tmp_path: Path) -> None:
    """The file needs no labels, and the same leap of other labels does not take its place."""
    calibrate(run)
    manifest, model = load_or_index(run), load_model(run.run.dir)
    known, _ = known_clips(run, manifest, model, None)
    (order,) = (each for each in orders_of(run.model, None, known, provable=0.4, views=1) if each.name == "leap")
    assert known is not None
    costs = np.array([known.outcomes(each, run.model)[1] for each in order.policies])
    leap = order.policies[int(np.abs(costs - (costs.min() + costs.max()) / 2).argmin())]  # some clips leap, some stay
    assert isinstance(leap, va.Leap) and costs.min() < known.outcomes(leap, run.model)[1] < costs.max()
    videos = manifest.split("val")["path"].tolist()
    found = list(va.predict(run, videos, leap, progress=False))
    file = tmp_path / "leap.json"
    of_run = json.loads((run.run.dir / "calibrate" / "policy.json").read_text()) | {"assigner": None}
    file.write_text(json.dumps(of_run | {"policy": leap.name, "leap": leap.to_json()}))
    assert list(va.predict(model, videos, str(file), evaluate=run.evaluate, progress=False)) == found
    assert leap.name in va.evaluate(run, [str(file)], progress=False).promises
    clips = pd.read_parquet(run.run.dir / "evaluate" / "clips.parquet")
    points = clips[clips["policy"] == leap.name].set_index("video")["point"].to_dict()
    names = dict(zip(manifest["path"], manifest["video"], strict=True))
    assert points == {names[prediction.path]: prediction.points[0] for prediction in found}
    with pytest.raises(UserError, match=f"two policies are named {leap.name}"):
        va.evaluate(run, [str(file), leap.at(9.0, leap.name.removeprefix("leap:"))])
    file.write_text(json.dumps(of_run | {"policy": leap.name, "leap": None}))
    with pytest.raises(UserError, match=r"leap\.json: the numbers of leap.* are no leap's.*videoadapt calibrate"):
        va.predict(run, videos, str(file))


def test_without_labels_no_leap_is_tested_and_it_is_said(run: Config, tmp_path: Path) -> None:
    model, manifest = load_model(run.run.dir), load_or_index(run)
    other = run.model_copy(update={"run": run.run.model_copy(update={"dir": tmp_path})})
    known, words = known_clips(other, manifest, model, None)
    assert known is None and words.endswith(
        "the run has no label table; no leap is tested, since leaps are fitted on it"
    )
    assert "leap" not in {order.name for order in orders_of(run.model, None, known, provable=0.1, views=1)}


def test_an_empty_answer_says_how_many_videos_are_needed_and_removes_an_earlier_policy(run: Config) -> None:
    calibrate(run)
    done = runs.command("calibrate", run.run.dir, "calibrate.eps=0.01")
    assert done.returncode == 0, done.stderr
    summary = json.loads((run.run.dir / "calibrate" / "calibrate.json").read_text())
    assert summary["chosen"] is None
    assert summary["needed"] > summary["videos"]
    assert f"that takes about {summary['needed']}:" in done.stderr
    assert not (run.run.dir / "calibrate" / "policy.json").exists()
    with pytest.raises(UserError, match=r"policy\.json.*videoadapt calibrate"):
        va.predict(run, "x.mp4", policy=str(run.run.dir / "calibrate" / "policy.json"))


@pytest.mark.parametrize("jobs", [["0/2", "1/2"], ["1/2"]])
def test_jobs_that_score_a_part_change_no_calibration(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[str]
) -> None:
    """The job without a part chooses; it scores what is missing by itself."""
    alone = calibrate(run)
    monkeypatch.setattr("videoadapt.routing.scores.VIDEOS_PER_SHARD", 4)
    folder = shutil.copytree(run.run.dir, tmp_path / "run", ignore=shutil.ignore_patterns("calibrate*"))
    here = run.model_copy(update={"run": run.run.model_copy(update={"dir": folder})})
    parts = 0
    for job in jobs:
        parallel = here.parallel.model_copy(update={"shard": job})
        assert calibrate(here.model_copy(update={"parallel": parallel})) == ShardResult(job)
        assert parts < (parts := len(list(folder.glob("scores/calibrate-*/part-*.npz"))))
        assert not (folder / "calibrate" / "calibrate.json").exists()
    merged = calibrate(here)
    assert isinstance(merged, va.CalibrateSummary) and isinstance(alone, va.CalibrateSummary)
    assert (merged.chosen, merged.curve) == (alone.chosen, alone.curve)


def test_a_promise_of_cost_chooses_the_most_accurate_policy(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config = run.model_copy(update={"calibrate": CalibrateConfig(cost=0.9, delta=0.3)})
    result = calibrate(config)
    assert isinstance(result, va.CalibrateSummary)
    valid = [point for point in result.curve if point.valid]
    assert all(point.cost <= 0.9 for point in valid)
    assert "fixed:6" in {point.policy for point in valid}  # a cost that is known needs no proof
    chosen = result.point(result.chosen)
    assert chosen is not None
    assert chosen.accuracy == max(point.accuracy for point in valid)
    print_calibrate(result.to_json() | {"best_fixed": ""})  # a cascade over views may be below the cheapest point
    assert "no fixed point keeps the promise" in capsys.readouterr().err


def test_other_weights_are_refused_and_other_videos_warned_of(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(run)
    file = run.run.dir / "calibrate" / "policy.json"
    content = json.loads(file.read_text())
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content | {"weights": "0" * 12}))
    with pytest.raises(CheckpointError, match=r"changed\.json: was calibrated with another model .* 000000000000"):
        va.predict(run, "x.mp4", policy=str(changed))
    changed.write_text(json.dumps(content | {"policy": "assigned:0.9", "assigner": "1" * 12}))
    with pytest.raises(CheckpointError, match=r"another assigner"):
        va.evaluate(run, [str(changed)])
    now = {**content["inputs"], "manifest": "2" * 12}
    changed.write_text(json.dumps(content | {"inputs": now, "temporal_views": 7}))
    capsys.readouterr()
    va.evaluate(run, [str(changed)])
    said = capsys.readouterr().err
    assert "may not hold here, other inputs: the manifest: '222222222222' then" in said
    assert "evaluate.temporal_views: 7 then, 1 now" in said
    va.predict(run, load_or_index(run).split("val")["path"][0], policy=str(changed))
    said = capsys.readouterr().err
    assert "may not hold here, other inputs: evaluate.temporal_views: 7 then, 1 now" in said
    changed.write_text(json.dumps({"policy": "fixed:8"}))
    with pytest.raises(UserError, match=r"changed\.json.*videoadapt calibrate"):
        PolicyFile.read(changed)


def test_clips_that_something_was_fitted_to_are_refused(run: Config) -> None:
    """Another seed draws other clips: some were in the training of the model, or chose the threshold."""
    other = load_config(run.run.dir, ["run.seed=7", f"run.checkpoint={run.run.dir}"])
    with pytest.raises(UserError, match=r"data\.calibrate: .* of the \d+ clips of the split calibrate were in the"):
        calibrate(other)
    load_or_index(run)  # as it was
    with pytest.raises(ConfigError, match=r"data\.calibrate: 0 leaves no video"):
        calibrate(load_config(run.run.dir, ["data.calibrate=0"]))


@pytest.mark.parametrize(("ids", "expected"), [("abca", [0, 1, 2, 0]), ("abcd", None)])
def test_the_units_of_the_promise_are_sources_where_videos_share_one(ids: str, expected: list[int] | None) -> None:
    """Such as the segments of a YouTube video in a list of Kinetics, without any `data.source_pattern`."""
    rows = [{"path": f"{n}.mp4", "source": name, "split": "calibrate"} for n, name in enumerate(ids)]
    manifest = Manifest(pa.Table.from_pylist(rows, schema=SCHEMA), ("x",))
    scores = SimpleNamespace(rows=np.repeat(np.arange(4), 2), clips_per_video=2)
    found = _sources(scores, manifest)  # type: ignore[arg-type]
    assert (found if found is None else found.tolist()) == expected


@pytest.mark.parametrize("views", [1, 3])
def test_what_is_measured_is_what_an_evaluation_finds(run: Config, views: int) -> None:
    config = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"temporal_views": views})})
    manifest = load_or_index(config)
    rows = np.flatnonzero(manifest["split"] == "calibrate").tolist()
    files = score(load_model(run.run.dir), manifest, rows, config, name="test", temporal_views=views)
    assert files is not None
    scores = files.load("data.calibrate")
    policies: list[Policy] = [Fixed("8"), Fixed("4"), Mixture(("8", "4"), 0.5), va.Cascade(("4", "8"), (0.09,))]
    known, _ = known_clips(run, manifest, load_model(run.run.dir), None)
    policies += orders_of(run.model, None, known, provable=0.4, views=1)[-1].policies[::20]  # leaps
    if views > 1:
        policies.append(va.Cascade(("8",), (0.09,), views=True))
    measured = measure(scores, policies, config)
    assert (measured.cost.max(1) <= measured.most + 1e-9).all()
    for number, outcome in enumerate(outcomes_of(scores, policies, config)):
        assert (measured.right[number] == (outcome.best[:, 0] == scores.truth[::views])).all()
        costliest = outcomes_of(scores, [Fixed("8")], config)[0].macs.mean()
        assert measured.cost[number].mean() == pytest.approx(outcome.macs.mean() / costliest)
    assert (measured.lost == (measured.right[0] > measured.right)).all()


class RecordedScores(Scores):
    """Scores of one view a video, whose logits say which class the model chooses."""

    def shards(self) -> Iterator[Scored]:
        logits = np.where(self.right[..., None], [1.0, 0.0], [0.0, 1.0])[:, None]  # (videos, 1, points, 2)
        yield Scored(self.rows, self.clips, self.truth, logits)


def table(videos: int, seed: int) -> tuple[Scores, KnownClips]:
    """Scores of a model that is 95, 93 and 80 % right, and a label table of the same kind."""
    rng = np.random.default_rng(seed)
    level = rng.random(2 * videos)
    right = np.stack([level < 0.95, level < 0.93, level < 0.8], axis=1) ^ (rng.random((2 * videos, 3)) < 0.001)
    noise = rng.normal(0, 0.1, right.shape)
    sure = {name: 1 / (1 + np.exp(-(right * 4 - 2 + noise * 8))) for name in MEASURES}
    half = slice(0, videos)
    scores = RecordedScores(
        rows=np.arange(videos),
        clips=np.zeros(videos, np.int64),
        starts_s=np.zeros(videos),
        truth=np.zeros(videos, np.int64),
        right=right[half],
        confidence={name: values[half] for name, values in sure.items()},
        assigned=None,
        draws=rng.random(videos),
        failures=[],
        model="",
        files=[],
    )
    return scores, KnownClips(right[videos:], {name: values[videos:] for name, values in sure.items()})


def test_a_promise_is_broken_no_more_often_than_delta() -> None:
    """300 calibrations on videos that are drawn, with replacement, from a table whose own losses are the true ones.

    `tools/simulate_calibration.py` does the same with the table of a trained model.
    """
    scores, known = table(1500, seed=0)
    config, settings = make_config({"model": {"points": list(POINTS)}, "evaluate": {"spatial_crops": 1}}), 0.02
    orders = orders_of(config.model, None, known, provable=provable_loss(900, settings, 0.05), views=1)
    policies = list(dict.fromkeys([*(p for order in orders for p in order.policies), *map(Fixed, POINTS)]))
    measured = measure(scores, policies, config)
    true, costs = measured.lost.mean(1), measured.cost.mean(1)
    promise, rng = CalibrateConfig(eps=settings, delta=0.1), np.random.default_rng(1)
    deltas = delta_of_orders(orders, promise.delta)
    chosen = []
    for _ in range(300):
        drawn = measured.totals(np.bincount(rng.integers(0, 1500, 900), minlength=1500))
        _, valid = run_tests(drawn, policies, orders, deltas, promise)
        chosen.append(best(valid, drawn, promise))
    found = [number for number in chosen if number is not None]
    assert len(found) > 290  # 900 videos are more than are needed
    assert np.mean([true[number] > settings for number in found]) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / 300)
    possible = 1 - costs[true <= settings].min()
    assert np.mean([1 - costs[number] for number in found]) > 0.6 * possible


def test_alike_videos_of_a_source_do_not_break_the_promise_more_often() -> None:
    """The cheap point loses a tenth more than is promised. It loses all videos of a source, or none."""
    policies, promise = [Fixed("14"), Fixed("7")], CalibrateConfig(eps=0.1, delta=0.1)
    orders, rng, sources = (
        [Order("fixed points", tuple(policies))],
        np.random.default_rng(0),
        np.repeat(np.arange(120), 10),
    )
    broken = []
    for _ in range(300):
        lost = np.stack([np.zeros(1200, dtype=bool), np.repeat(rng.random(120) < 0.11, 10)])
        measured = Measured(~lost, lost, np.array([[1.0], [0.25]]) * np.ones(1200), np.array([1.0, 0.25]))
        totals = [each.totals() for each in (measured, measured.by_source(sources))]
        assert totals[1].costs == pytest.approx(totals[0].costs)
        broken.append([run_tests(each, policies, orders, [0.1], promise)[1][1] for each in totals])
    by_video, by_source = np.mean(broken, axis=0)
    assert by_source <= promise.delta
    assert by_video > 2 * promise.delta


def test_the_answer_is_never_dearer_than_a_fixed_point_that_is_proven() -> None:
    """The path through all points has every fixed point, so that a proven one is among the valid policies."""
    _, known = table(500, seed=3)
    for each in (None, known):
        orders = orders_of(MODEL, None, each, provable=0.05, views=3)
        assert {Fixed("10"), Fixed("7")} <= {policy for order in orders for policy in order.policies}
        assert all(order.policies[0] != Fixed("14") for order in orders)
    orders = [Order("all", (Mixture(("14", "10"), 0.5), Fixed("10"), Mixture(("10", "7"), 0.5), Fixed("7")))]
    totals = Totals(1000, np.array([0, 0, 3, 300]), True, np.array([0.75, 0.5, 0.4, 0.3]), np.ones(4), np.ones(4))
    _, valid = run_tests(totals, orders[0].policies, orders, [0.1], CalibrateConfig(eps=0.01, delta=0.1))
    assert valid.tolist() == [True, True, True, False]
    assert best(valid, totals, CalibrateConfig()) == 2


def test_the_label_table_orders_mixtures_by_their_convex_hull() -> None:
    """A middle point that is as bad as the cheapest one is left out of the second path."""
    right = np.ones((1000, 3), bool)
    right[:200, 1:] = False
    known = KnownClips(right, {name: np.ones((1000, 3)) for name in MEASURES})
    names = {order.name: order for order in orders_of(MODEL, None, known, provable=0.05, views=1)}
    hull = names["mixtures that the label table favours"]
    assert {policy.points for policy in hull.policies if isinstance(policy, Mixture)} == {("14", "7")}
    assert hull.predicted is not None
    assert hull.predicted < (names["fixed points and their mixtures"].predicted or 0)


def test_a_point_whose_answers_are_nan_begins_no_leap() -> None:
    right = np.ones((100, 3), bool)
    confidence = {name: np.full((100, 3), np.nan) for name in MEASURES}
    names = [order.name for order in orders_of(MODEL, None, KnownClips(right, confidence), provable=0.05, views=1)]
    assert "leap" not in names and "cascade" in names


def test_a_split_of_which_nothing_can_be_read_is_named_by_its_key() -> None:
    none: Any = np.empty(0)
    failures = [Failure(3, "a.mp4", "torn"), Failure(4, "b.mp4", "gone")]
    scores = Scores(none, none, none, none, none, {}, None, none, failures, "0" * 12, [])
    with pytest.raises(UserError, match=r"data\.calibrate: none of 2 videos could be scored; a\.mp4: torn"):
        require_scored(scores, "data.calibrate")


def test_milliseconds_are_estimated_from_the_speeds_of_the_fixed_points(tmp_path: Path) -> None:
    scores, _ = table(500, seed=2)
    nested = {"run": {"dir": str(tmp_path)}, "model": {"points": list(POINTS)}, "evaluate": {"spatial_crops": 1}}
    config, cascade = make_config(nested), va.Cascade(("7", "14"), (0.5,))
    assert _milliseconds([cascade], scores, config) is None  # nothing was evaluated
    speeds = {"fixed:14": 10.0, "fixed:10": 20.0, "fixed:7": 50.0}
    file = tmp_path / "evaluate" / "evaluate.json"
    write_json(file, {"speed": {"clips_per_s": speeds}})
    unsure = (scores.confidence[cascade.measure][:, 2] < 0.5).mean()
    assert 0 < unsure < 1
    estimate = _milliseconds([Fixed("14"), cascade], scores, config)
    assert estimate == pytest.approx({"fixed:14": 100.0, cascade.name: 20.0 + 100.0 * unsure})
    for speed in (None, {"clips_per_s": {"fixed:14": 10.0}}):  # not measured, or not at all points
        write_json(file, {"speed": speed})
        assert _milliseconds([cascade], scores, config) is None
