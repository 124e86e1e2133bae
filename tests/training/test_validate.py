"""Validation while training, the best checkpoint and the early stop: they change no bit and survive interruptions."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import small_runs as runs
from videoadapt.commands.stage import CurvesWhileTraining
from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.clips.views import normalise
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import CheckpointError, ConfigError, RunError
from videoadapt.model.checkpoint import load_model, train_checkpoints
from videoadapt.routing.scores import trained_checkpoint
from videoadapt.runtime.signals import Stopped, StopRequest
from videoadapt.training.metrics import Validation, best_validation, out_of_patience
from videoadapt.training.state import State
from videoadapt.training.train import train
from videoadapt.training.validate import ValidationVideos, Validator, describe, say_failed, selected_on_val

RECIPE = {"epochs": 3, "save_steps": 0, "validate_every": 1, "best_metric": "loss/6"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def indexed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the manifest of the data."""
    config = runs.config(data, tmp_path_factory.mktemp("indexed") / "run")
    load_or_index(config)
    return config.run.dir


def make(data: Path, indexed: Path, folder: Path, /, **sections: dict) -> Config:
    shutil.copytree(indexed, folder / "run")
    return runs.config(data, folder / "run", **{"train": RECIPE} | sections)


@pytest.fixture(scope="module")
def trained(data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make(data, indexed, tmp_path_factory.mktemp("trained"))
    train(config, CurvesWhileTraining(config.run.dir, first_s=0.0))
    return config


def test_curves_are_drawn_while_training_and_cannot_end_it(
    trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [trained.run.dir / "curves.png", trained.run.dir / "curves_dark.png"]
    assert all(figure.exists() for figure in figures)
    # After the first validation, and not again after the others: drawing takes long beside these epochs.
    assert figures[1].stat().st_mtime < (trained.run.dir / "train.json").stat().st_mtime
    CurvesWhileTraining(tmp_path)()  # it is not time yet
    assert capsys.readouterr().err == ""
    CurvesWhileTraining(tmp_path, first_s=0.0)()
    assert "curves: not drawn while training (FileNotFoundError: " in capsys.readouterr().err


def curve(config: Config) -> list[dict[str, Any]]:
    lines = map(json.loads, (config.run.dir / "validation.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def tensors(config: Config) -> dict[str, torch.Tensor]:
    newest = train_checkpoints(config.run.dir).latest()
    assert newest is not None
    return newest.tensors


def with_checkpoint(config: Config, name: str | None) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"checkpoint": name and Path(name)})})


def same_bits(ours: Config, theirs: Config) -> bool:
    a, b = tensors(ours), tensors(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_validation_is_that_of_the_moving_average_on_one_centre_view(trained: Config) -> None:
    last = curve(trained)[-1]
    model, manifest = load_model(trained.run.dir), load_or_index(trained)
    rows = [row for row, split in enumerate(manifest["split"]) if split == "val"]
    dataset = EvalVideos(manifest, trained, temporal_views=1, spatial_crops=1, thumbnails=False)
    videos = [video for video in map(dataset.__getitem__, rows) if isinstance(video, VideoViews)]
    labels = torch.tensor([video.label for video in videos])
    clips = normalise(torch.stack([v.views[0, 0] for v in videos]), model.config.mean, model.config.std, torch.float32)
    with torch.no_grad():
        logits = {point: model(clips, point) for point in model.config.points}
    assert (last["read"], last["epoch"], last["videos"]) == (12, 3, "val")
    for point, found in logits.items():
        assert last[f"loss/{point}"] == pytest.approx(float(F.cross_entropy(found, labels)), rel=1e-5)
        assert last[f"top1/{point}"] == pytest.approx(float((found.argmax(-1) == labels).float().mean()))
        five = (found.topk(5).indices == labels[:, None]).any(1)
        assert last[f"top5/{point}"] == pytest.approx(float(five.float().mean()))


def test_validations_change_no_bit_of_the_training(data: Path, indexed: Path, tmp_path: Path, trained: Config) -> None:
    config = make(data, indexed, tmp_path, train=RECIPE | {"validate_every": 0})
    summary = train(config)
    assert same_bits(config, trained)
    assert (summary.validation, summary.best) == (None, None)
    assert not (config.run.dir / "validation.jsonl").exists()
    with pytest.raises(CheckpointError, match="best: names no checkpoint; train with train.validate_every"):
        trained_checkpoint(with_checkpoint(config, "best"))


def test_best_is_the_checkpoint_of_the_best_validation_and_last_is_the_default(trained: Config) -> None:
    losses = [line["loss/6"] for line in curve(trained)]
    expected = 5 * (losses.index(min(losses)) + 1)  # 5 steps an epoch
    names = (None, "last", "best", str(trained.run.dir / "checkpoints" / "best"))
    at = {name: trained_checkpoint(with_checkpoint(trained, name)) for name in names}
    assert [checkpoint.meta["step"] for checkpoint in at.values()] == [15, 15, expected, expected]
    assert json.loads((trained.run.dir / "train.json").read_text())["best"]["step"] == expected
    assert selected_on_val(at["last"], chosen=False) is None
    assert "the val split" in str(selected_on_val(at["best"], chosen=True))


def test_a_run_stopped_in_a_validation_repeats_it_and_ends_with_the_same_bits(
    data: Path, indexed: Path, tmp_path: Path, trained: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(data, indexed, tmp_path)
    validate, seen = Validator.validate, []

    def stopped_once(self: Validator, stop: Any, progress: Any) -> Validation | None:
        seen.append(self.state.step)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return validate(self, stop, progress)

    monkeypatch.setattr(Validator, "validate", stopped_once)
    with pytest.raises(Stopped):
        train(config)
    train(config)
    assert seen == [5, 10, 10, 15]
    assert same_bits(config, trained)
    assert curve(config) == curve(trained)
    assert (config.run.dir / "checkpoints/best").read_text() == (trained.run.dir / "checkpoints/best").read_text()


def test_an_answer_that_is_not_a_number_is_wrong(trained: Config) -> None:
    state = State.start(trained, load_or_index(trained))
    state.ema = None
    torch.nn.init.constant_(state.model.head.bias, float("nan"))
    found = Validator.of(state, 5).validate(StopRequest(), lambda note: None)
    assert found is not None
    assert {value for name, value in found.values.items() if name.startswith("top")} == {0.0}


def test_training_stops_when_patience_ends_and_goes_on_with_more(
    data: Path, indexed: Path, tmp_path: Path, trained: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first validation stays the best one; the run is interrupted in the second."""
    real = Validator.validate

    def worse(self: Validator, stop: Any, progress: Any) -> Validation | None:
        found = real(self, stop, progress)
        assert found is not None
        found.values.update({"loss/6": float(found.epoch)})
        return found

    monkeypatch.setattr(Validator, "validate", worse)
    config = make(data, indexed, tmp_path, train=RECIPE | {"patience": 1, "epochs": 3})
    summary = train(config)
    assert (summary.stopped_early, summary.steps, summary.best and summary.best.epoch) == (True, 10, 1)
    assert summary.epochs == summary.validation["epoch"]  # type: ignore[index]
    assert train(config) == summary  # finished: not trained on
    newest = train_checkpoints(config.run.dir).latest()
    assert newest is not None
    assert "stopped early" in str(selected_on_val(newest, chosen=False))
    patient = make(data, indexed, tmp_path / "again", train=RECIPE)
    shutil.copytree(config.run.dir, patient.run.dir, dirs_exist_ok=True)

    def interrupted(self: Validator, stop: Any, progress: Any) -> Validation | None:
        if self.state.step == 15:
            raise KeyboardInterrupt
        return worse(self, stop, progress)

    monkeypatch.setattr(Validator, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):  # in the last validation: train.json is still that of the early stop
        train(patient)
    monkeypatch.setattr(Validator, "validate", worse)
    assert train(patient).steps == 15
    assert same_bits(patient, trained)


def test_an_unreadable_video_is_counted_and_listed(
    data: Path, indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(data, indexed, tmp_path)
    table = load_or_index(config).table
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video")
    table.loc[table["split"] == "val", "path"] = [str(bad), *table["path"][table["split"] == "val"][1:]]
    state = State.start(config, Manifest(table, [f"c{number}" for number in range(12)]))
    found = Validator.of(state, 5).validate(StopRequest(), lambda note: None)
    assert found is not None
    assert found.read == 11
    assert [row["path"] for row in found.failed] == [str(bad)]
    state.validations.append(found)
    say_failed(state.validations)
    say_failed([found, found])
    assert capsys.readouterr().err.count(f"not validated: {bad}") == 1
    assert "11 videos of val, 1 cannot be read, 2.5 s: point 8: top-1" in describe(found, 2.5, state)
    table["path"] = str(bad)
    with pytest.raises(RunError, match="none of the 12 videos of val can be read; the first: .*bad.mp4"):
        Validator.of(State.start(config, Manifest(table, state.manifest.classes)), 5).validate(StopRequest(), print)


def test_a_run_without_a_val_split_says_that_it_has_no_validation(
    data: Path, indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(data, indexed, tmp_path)
    assert ValidationVideos.of(config, load_or_index(config).split("train")) is None
    assert "no validation while training: the config has no val split" in capsys.readouterr().err


def test_a_share_of_val_is_the_same_for_every_seed_and_holdout_is_another_split(data: Path, tmp_path: Path) -> None:
    shares = []
    for seed in (1, 2):
        config = runs.config(data, tmp_path / str(seed), run={"seed": seed}, data={"validate": 0.25})
        manifest = load_or_index(config)
        videos = ValidationVideos.of(config, manifest)
        assert videos is not None
        assert (len(videos.rows), videos.name) == (3, "25 % of val")
        shares.append({manifest.row(row).video for row in videos.rows})
    assert shares[0] == shares[1]
    held_out = ValidationVideos.of(runs.config(data, tmp_path / "1", data={"validate": "holdout"}), manifest)
    assert held_out is not None
    assert {manifest.row(row).split for row in held_out.rows} == {"holdout"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {
                "data": {"validate": "holdout", "holdout": 0.0},
                "label": {"source": "train"},
                "train": {"validate_every": 1},
            },
            "data.validate: holdout needs",
        ),
        ({"train": {"best_metric": "top1/14"}}, r"train.best_metric: expected top1 or top5 or loss, .*8, 6, 4"),
        ({"train": {"patience": 2, "validate_every": 0}}, "train.patience: needs validations"),
        ({"train": {"freeze": 1}}, "train.freeze: random weights would be frozen; set train.init"),
        ({"train": {"freeze": 3, "init": "x"}}, "train.freeze: 3 is more than model.depth 2"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, sections: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        runs.config(tmp_path, tmp_path / "run", **sections)


def validation(epoch: int, **values: float | None) -> Validation:
    return Validation(epoch, epoch, "val", 9, [], {name.replace("_", "/"): v for name, v in values.items()})


def test_the_first_of_equal_validations_is_best_and_patience_counts_from_it(tmp_path: Path) -> None:
    config = runs.config(tmp_path, tmp_path / "run", train={"patience": 2, "best_metric": "top1", "validate_every": 1})
    made = [validation(1, top1_8=0.5, top1_6=0.25), validation(2, top1_8=0.25, top1_6=0.5), validation(3, top1_8=None)]
    assert best_validation(made, config) is made[0]  # by the mean over points
    assert [out_of_patience(made[:count], config) for count in range(4)] == [False, False, False, True]
