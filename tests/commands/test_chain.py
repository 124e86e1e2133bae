"""All stages on generated videos: the results of label, assign, evaluate, flops and predict agree with each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import small_runs as runs
import videoadapt as va
from videoadapt.commands.tables import print_evaluate
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import UserError
from videoadapt.evaluation.costs import flops
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.model.checkpoint import load_model, train_checkpoints
from videoadapt.routing.assigner import assigner_checkpoints, assigner_macs
from videoadapt.routing.fit_assigner import assign
from videoadapt.routing.label import label
from videoadapt.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run. Tests leave it as it is, or work on a copy."""
    folder = tmp_path_factory.mktemp("chain")
    config = runs.config(runs.make_data(folder / "data"), folder / "run", evaluate={"spatial_crops": 3})
    train(config)
    label(config)
    assign(config)
    evaluate(config)
    return config


def copy_of(run: Config, folder: Path) -> Config:
    """A copy of a finished run in another run folder; the videos are the same."""
    shutil.copytree(run.run.dir, folder)
    return run.model_copy(update={"run": run.run.model_copy(update={"dir": folder})})


def stored(config: Config, name: str) -> dict:
    return json.loads((config.run.dir / name).read_text())


def test_an_outcome_equals_the_prediction_of_its_clip_at_its_point(run: Config) -> None:
    table = pd.read_parquet(run.run.dir / "labels" / "outcomes.parquet")
    held_out = load_or_index(run).split("holdout")
    assert sorted(table["video"].unique()) == sorted(held_out["video"])
    assert len(table) == len(held_out) * 3
    model = load_model(run.run.dir)
    row = table.iloc[4]
    path = dict(zip(held_out["video"], held_out["path"], strict=True))[row["video"]]
    [prediction] = va.predict(model, [path], f"fixed:{row['point']}", top=12)
    names = dict(zip(prediction.classes, prediction.probabilities, strict=True))
    assert prediction.classes[0] == row["prediction"]
    assert names[row["truth"]] == pytest.approx(row["p_true"], abs=1e-4)


def test_evaluation_agrees_with_predicting_each_video_alone(run: Config) -> None:
    """Batched, routed and scored in shards, or one video at a time: the same classes, points and costs."""
    model, assigned = load_model(run.run.dir), va.Assigned.load(run.run.dir)
    val = load_or_index(run).split("val")
    clips = pd.read_parquet(run.run.dir / "evaluate" / "clips.parquet").set_index(["policy", "video"])
    videos = pd.read_parquet(run.run.dir / "evaluate" / "videos.parquet").set_index(["policy", "video"])
    for policy, name in ((assigned, "assigned"), ("fixed:6", "fixed:6")):
        predictions = va.predict(model, val["path"].tolist(), policy)
        for video, prediction in zip(val["video"], predictions, strict=True):
            assert prediction.classes[0] == videos.loc[(name, video), "prediction"]
            assert prediction.points == (clips.loc[(name, video), "point"],)
            assert prediction.macs == clips.loc[(name, video), "macs"]


def test_the_summary_follows_from_the_tables(run: Config) -> None:
    summary = stored(run, "evaluate/evaluate.json")
    videos = pd.read_parquet(run.run.dir / "evaluate" / "videos.parquet")
    clips = pd.read_parquet(run.run.dir / "evaluate" / "clips.parquet")
    assert list(summary["policies"]) == ["fixed:8", "fixed:6", "fixed:4", "assigned", "random", "oracle"]
    assert summary["listed"] == summary["scored"] == runs.SIZES["val"]
    for name, row in summary["policies"].items():
        assert row["top1"] == pytest.approx(videos.loc[videos["policy"] == name, "right"].mean())
        assert row["macs_per_clip"] == pytest.approx(clips.loc[clips["policy"] == name, "macs"].mean())
        assert row["top1_low"] <= row["top1"] <= row["top1_high"]
        assert row["clips_per_s"] > 0
        assert sum(row["mix"].values()) == pytest.approx(1)
    assert summary["policies"]["random"]["mix"] == summary["policies"]["assigned"]["mix"]
    assert summary["policies"]["oracle"]["top1"] >= max(r["top1"] for r in summary["policies"].values())
    paid = summary["policies"]["assigned"]["macs_per_clip"] - summary["policies"]["random"]["macs_per_clip"]
    assert paid == pytest.approx(assigner_macs(run.assign, 3))
    views = pd.read_parquet(run.run.dir / "evaluate" / "views.parquet")
    assert len(views) == runs.SIZES["val"] * 3 * 3


def test_a_printed_evaluation_asks_for_an_assigner_or_a_speed_only_if_it_has_none(
    run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = stored(run, "evaluate/evaluate.json")
    print_evaluate(summary)
    printed = capsys.readouterr().err
    assert "no assigner yet" not in printed and "clips/s: not measured" not in printed
    print_evaluate(summary | {"speed": None})
    assert "clips/s: not measured (evaluate.speed_seconds or evaluate.speed_clips is 0)" in capsys.readouterr().err


def test_evaluating_again_changes_nothing_and_other_batches_give_the_same(run: Config) -> None:
    before = {k: v["top1"] for k, v in stored(run, "evaluate/evaluate.json")["policies"].items()}
    views = pd.read_parquet(run.run.dir / "evaluate" / "views.parquet")
    for shard in (run.run.dir / "scores").glob("evaluate-*/part-*.npz"):
        shard.unlink()
    changed = run.model_copy(
        update={
            "evaluate": run.evaluate.model_copy(update={"batch": 5}),
            "data": run.data.model_copy(update={"workers": 1}),
        }
    )
    after = {k: v["top1"] for k, v in evaluate(changed).to_json()["policies"].items()}
    assert before == after
    again = pd.read_parquet(run.run.dir / "evaluate" / "views.parquet")
    np.testing.assert_allclose(views["p_true"], again["p_true"], atol=1e-5)


def test_the_clip_report_adds_up(run: Config) -> None:
    summary = flops(run)
    report = summary["clips"]
    clips = pd.read_csv(run.run.dir / "report" / "clips.csv")
    costs = point_macs(run.model)
    expected = clips["point"].astype(str).map(costs) * 3 + assigner_macs(run.assign, 3)
    assert (clips["macs"] == expected).all()
    assert report["macs_per_clip"]["mean"] == pytest.approx(clips["macs"].mean())
    assert report["macs_per_clip"]["p95"] == pytest.approx(np.quantile(clips["macs"], 0.95))
    assert sum(report["mix"].values()) == pytest.approx(1)
    assert sum(row["clips"] for row in report["classes"]) == len(clips)


def test_costs_of_an_evaluation_at_other_points_are_left_out(run: Config, tmp_path: Path) -> None:
    shutil.copytree(run.run.dir / "evaluate", tmp_path / "evaluate")
    changes = {
        "run": run.run.model_copy(update={"dir": tmp_path}),
        "model": run.model.model_copy(update={"points": ("8",)}),
    }
    assert flops(run.model_copy(update=changes)).keys().isdisjoint({"clips", "policies"})


def test_labelling_continues_where_it_stopped(run: Config) -> None:
    before = pd.read_parquet(run.run.dir / "labels" / "outcomes.parquet")
    shards = sorted((run.run.dir / "scores").glob("label-*/part-*.npz"))
    kept = {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    shards[0].unlink()
    label(run)
    assert {shard: shard.stat().st_mtime_ns for shard in shards[1:]} == kept
    pd.testing.assert_frame_equal(pd.read_parquet(run.run.dir / "labels" / "outcomes.parquet"), before)


def test_a_clip_that_the_assigner_could_not_read_is_tried_again(run: Config, tmp_path: Path) -> None:
    config = copy_of(run, tmp_path / "run")
    shutil.rmtree(config.run.dir / "assigner")
    clips = stored(config, "labels/label.json")["clips"]
    held_out = Path(load_or_index(config).split("holdout")["path"][1])
    held_out.rename(tmp_path / "away")
    try:
        first = assign(config)
    finally:
        (tmp_path / "away").rename(held_out)
    second = assign(config)
    assert first.clips_fitted + first.clips_selecting == clips - 1
    assert second.clips_fitted + second.clips_selecting == clips


@pytest.mark.parametrize("loss", ["ce", "expected_cost"])
def test_fitting_the_assigner_continues_where_it_stopped(run: Config, tmp_path: Path, loss: str) -> None:
    """4 epochs give the same bits as 4 epochs of which all but the first two are lost once."""
    final = []
    for name, lose in (("whole", False), ("resumed", True)):
        config = copy_of(run, tmp_path / name)
        config = config.model_copy(update={"assign": run.assign.model_copy(update={"loss": loss, "epochs": 4})})
        folder = config.run.dir
        shutil.rmtree(folder / "assigner")
        assign(config)
        if lose:
            steps = sorted((folder / "assigner").glob("step-*"))
            for path in steps[1:]:
                path.unlink()  # also the file that `last` names
            (folder / "assigner" / "last").unlink()
            assign(config)
        final.append(assigner_checkpoints(folder).latest())
    whole, resumed = final
    assert whole is not None
    assert resumed is not None
    assert whole.meta == resumed.meta
    written = stored(config, "assigner/assign.json")
    assert len(whole.meta["losses"]) == 4
    assert [written["loss_first"], written["loss_last"]] == whole.meta["losses"][::3]
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)


def test_new_labels_get_a_new_assigner_and_the_old_one_is_kept(run: Config, tmp_path: Path) -> None:
    config = copy_of(run, tmp_path / "run")
    path = config.run.dir / "labels" / "outcomes.parquet"
    table = pd.read_parquet(path)
    table.loc[table["point"] == "4", "prediction"] = table["truth"]
    table.to_parquet(path)
    assign(config)
    assert len(list(config.run.dir.glob("assigner-*/step-*"))) == 2
    assert assigner_checkpoints(config.run.dir).latest() is not None


@pytest.mark.parametrize("section", [{"run": {"seed": 2}}, {"data": {"holdout": 0.5}}])
def test_clips_of_the_training_are_not_labelled_as_held_out(run: Config, tmp_path: Path, section: dict) -> None:
    """Another seed or fraction draws the split anew, and most of its clips are in the training of the model."""
    config = copy_of(run, tmp_path / "run")
    before = (config.run.dir / "labels" / "outcomes.parquet").read_bytes()
    for name, keys in section.items():
        config = config.model_copy(update={name: getattr(config, name).model_copy(update=keys)})
    with pytest.raises(UserError, match=r"holdout must label clips .* \d+ of the \d+ clips.* changed from"):
        label(config)
    assert (config.run.dir / "labels" / "outcomes.parquet").read_bytes() == before
    with pytest.raises(UserError, match=r"these labels belong to other inputs: the manifest: .* Run `label` again"):
        assign(config)


def test_the_assigner_is_not_fitted_to_labels_of_other_weights_or_settings(run: Config, tmp_path: Path) -> None:
    config = copy_of(run, tmp_path / "run")
    crops = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"spatial_crops": 1})})
    with pytest.raises(UserError, match=r"evaluate\.spatial_crops: 3 then, 1 now"):
        assign(crops)
    checkpoints = train_checkpoints(config.run.dir)
    newest = checkpoints.latest()
    assert newest is not None
    trained = {name: tensor * 1.5 if name == "ema/head.bias" else tensor for name, tensor in newest.tensors.items()}
    checkpoints.save(newest.meta["step"] + 1, trained, {k: v for k, v in newest.meta.items() if k != "step"})
    with pytest.raises(UserError, match="the weights .*then, .* now"):
        assign(config)


def test_each_output_records_its_inputs(run: Config) -> None:
    manifest = load_or_index(run).hash
    fitted = assigner_checkpoints(run.run.dir).latest()
    assert fitted is not None
    labels, evaluated = stored(run, "labels/label.json"), stored(run, "evaluate/evaluate.json")
    for inputs in (labels["inputs"], fitted.meta["inputs"], evaluated["inputs"]):
        assert (inputs["manifest"], inputs["weights"]) == (manifest, labels["model"])
        assert inputs["settings"]["evaluate"]["spatial_crops"] == 3
    assert evaluated["trained_on"] == 0


def test_videos_of_the_training_are_counted_in_an_evaluation(
    run: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = copy_of(run, tmp_path / "run")
    trained = load_or_index(run).split("train")["path"].tolist()
    lines = (Path(str(config.data.train.annotations))).read_text().splitlines()
    root = Path(str(config.data.root))
    both = [line for line in lines if str(root / line.split()[0]) in trained][:2]
    (tmp_path / "val.csv").write_text(
        "\n".join([*both, *Path(str(config.data.val.annotations)).read_text().splitlines()])
    )
    val = config.data.val.model_copy(update={"annotations": tmp_path / "val.csv"})
    speed = config.evaluate.model_copy(update={"speed_clips": 0})
    config = config.model_copy(update={"data": config.data.model_copy(update={"val": val}), "evaluate": speed})
    summary = evaluate(config).to_json()
    assert (summary["listed"], summary["trained_on"]) == (14, 2)
    assert "checkpoints/" in (said := capfd.readouterr().err) and ": 2 of 14; they count in the accuracy" in said


def test_costs_of_an_evaluation_of_another_manifest_are_left_out(
    run: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = copy_of(run, tmp_path / "run")
    assert "clips" in flops(config)
    load_or_index(config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})}))
    assert "clips" not in flops(config)
    assert "so the costs of its clips are left out; run `evaluate` again" in capfd.readouterr().err


@pytest.mark.parametrize("source", ["train", "teacher"])
def test_other_label_sources(run: Config, source: str) -> None:
    config = run.model_copy(update={"label": run.label.model_copy(update={"source": source, "none_right": "exclude"})})
    summary = label(config).to_json()
    manifest = load_or_index(run)
    clips = len(manifest.split("train")) + (len(manifest.split("holdout")) if source == "teacher" else 0)
    assert summary["clips"] == clips
    if source == "teacher":
        assert summary["points"]["8"]["right"] == 1.0
        assert summary["left_out"] == 0
    label(run)  # restores the labels of the shared run


def test_videos_of_the_same_name_in_two_splits_are_not_confused(tmp_path: Path) -> None:
    """Folders per class often hold train/a/1.png and val/a/1.png. The assigner must not be fitted on the second."""
    for split, shade in (("train", 200), ("val", 10)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (36, 36), (shade,) * 3).save(tmp_path / split / name / f"{i}.png")
    config = image_config(tmp_path)
    train(config)
    label(config)
    assign(config)
    [thumbnails] = (tmp_path / "run" / "assigner").glob("thumbnails-*.npy")
    assert (np.load(thumbnails) == 200).all()


def image_config(folder: Path) -> Config:
    """A tiny image model on `folder/train` and `folder/val`."""
    nested = runs.values(folder, folder / "run")
    nested["data"] |= {"root": None, "classes": None, "holdout": 0.0, "short_side": None}
    nested["data"] |= {s: {"annotations": str(folder / s)} for s in ("train", "val")}
    nested["model"] |= {"num_frames": 1, "stride_frames": 1, "temporal": False, "size": 32, "num_classes": 2}
    nested["model"] |= {"points": ["4", "2"], "time_init_std": 0.0}
    nested["label"] = {"source": "train"}
    nested["assign"] |= {"frames": 1}
    nested["train"] |= {"batch": 4, "epochs": 1}
    return va.Config.model_validate(nested)


def test_a_broken_video_counts_as_wrong_or_is_left_out_and_both_accuracies_are_given(
    run: Config, tmp_path: Path
) -> None:
    data = runs.make_data(tmp_path / "data")
    first, second = (data / line.split()[0] for line in (data / "val.csv").read_text().splitlines()[:2])
    first.write_bytes(b"not a video")
    second.unlink()
    config = runs.config(data, tmp_path / "run", run={"checkpoint": str(run.run.dir)})  # no assigner in this folder
    summary = evaluate(config).to_json()
    assert (summary["listed"], summary["scored"]) == (12, 10)
    assert {row["path"] for row in summary["failed"]} == {str(first), str(second)}
    row = summary["policies"]["fixed:8"]
    assert row["top1"] == pytest.approx(row["top1_readable"] * 10 / 12)
    exclude = config.evaluate.model_copy(update={"failed": "exclude"})
    left_out = evaluate(config.model_copy(update={"evaluate": exclude})).to_json()
    assert left_out["policies"]["fixed:8"]["top1"] == pytest.approx(row["top1_readable"])
    assert summary["assigner_macs"] is None
    assert "assigned" not in summary["policies"]


def test_one_frame_clips_train_and_evaluate(tmp_path: Path) -> None:
    """Images: a folder per class, one frame, no temporal attention."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(
                    tmp_path / split / name / f"{i}.png"
                )
    config = image_config(tmp_path)
    train(config)
    label(config)
    assign(config)
    assert evaluate(config).to_json()["scored"] == 4
