"""A run folder in place of a config: what it keeps, which commands change it, and which leave nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import small_runs as runs
from videoadapt.commands.cli import _following
from videoadapt.config.load import RUN_CONFIG, Config, load_config, make_config
from videoadapt.config.sections import LaunchConfig
from videoadapt.data.index.manifest import Manifest, manifest_path
from videoadapt.errors import CheckpointError, ConfigError
from videoadapt.routing import threshold
from videoadapt.runtime.run_config import record_config, run_name, say_other_parts
from videoadapt.training.train import train

Snapshot = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A trained run. Its config has relative paths, and its folder has been moved since."""
    folder = tmp_path_factory.mktemp("run_folder")
    runs.make_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        nested = runs.values(Path("data"), Path("old/run"))
        nested["train"]["epochs"] = 1
        train(make_config(nested))
    shutil.move(folder / "old" / "run", folder / "moved")
    return load_config(folder / "moved")


def snapshot(folder: Path) -> Snapshot:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def test_a_moved_folder_is_the_config_of_its_run(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.run.dir.name == "moved"
    assert run.data.train.annotations == run.run.dir.parent / "data" / "train.csv"
    assert load_config(run.run.dir, ["train.lr=0.5"]).train.lr == 0.5
    done = runs.command("train", run.run.dir)
    assert done.returncode == 0, done.stderr
    assert "already trained, nothing to do: " in done.stderr
    assert str(run.run.dir / "checkpoints") in done.stderr
    with pytest.raises(ConfigError, match=r"a folder without config\.yaml"):
        load_config(tmp_path)


def test_the_file_of_a_copied_run_means_the_copy(tmp_path: Path) -> None:
    config = make_config({"run": {"dir": str(tmp_path / "a")}})
    config.run.dir.mkdir()
    record_config(config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_config(tmp_path / "b" / RUN_CONFIG).run.dir == tmp_path / "b"


def test_paths_in_the_folder_move_with_it_and_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kinetics400").mkdir()  # the data, beside which the command runs
    run = tmp_path / "$a" / "run"
    (run / "data").mkdir(parents=True)
    nested: dict[str, Any] = {
        "run": {"dir": str(run)},
        "data": {"root": str(run / "data"), "classes": "kinetics400"},
    }
    nested |= {"train": {"init": "vit_base_patch16_224"}, "parallel": {"ranks": 4, "shard": "1/2"}}
    nested |= {"launch": {"stage": "train", "cluster": "local"}}
    record_config(make_config(nested))
    shutil.move(tmp_path / "$a", tmp_path / "b")
    moved = load_config(tmp_path / "b" / "run")
    assert moved.data.root == tmp_path / "b" / "run" / "data"
    assert (str(moved.data.classes), moved.train.init) == ("kinetics400", "vit_base_patch16_224")
    assert (moved.parallel.ranks, moved.parallel.shard, moved.launch) == (None, None, LaunchConfig())


def test_a_config_that_a_person_has_written_is_never_changed(tmp_path: Path) -> None:
    own = "# my notes\nrun:\n  dir: elsewhere\n"
    (tmp_path / RUN_CONFIG).write_text(own)
    assert load_config(tmp_path).run.dir == Path("elsewhere")
    record_config(load_config(tmp_path, [f"run.dir={tmp_path}"]))
    assert (tmp_path / RUN_CONFIG).read_text() == own


def test_a_later_stage_changes_its_own_section_alone(run: Config, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.run.dir, copy)
    before = yaml.safe_load((copy / RUN_CONFIG).read_text())
    done = runs.command("label", copy, "label.none_right=cheapest", "evaluate.spatial_crops=2")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == f"next: videoadapt assign {copy}"
    after = yaml.safe_load((copy / RUN_CONFIG).read_text())
    assert after["label"] == before["label"] | {"none_right": "cheapest"}
    assert {k: v for k, v in after.items() if k not in ("label", "run")} == {
        k: v for k, v in before.items() if k not in ("label", "run")
    }
    assert runs.command("evaluate", copy, "evaluate.batch=2", "evaluate.speed_clips=0").returncode == 0
    assert yaml.safe_load((copy / RUN_CONFIG).read_text()) == after


def test_labels_come_next_where_an_assigner_has_enough_clips(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = len(Manifest.load(manifest_path(run.run.dir)).split("holdout"))
    assert run.label.source == "holdout" and 0 < run.assign.select * clips < threshold.FEWEST
    assert _following("train", run, {}) == ["evaluate"]
    monkeypatch.setattr(threshold, "FEWEST", round(run.assign.select * clips))
    assert _following("train", run, {}) == ["label"]
    mix = {"14": 1.0, "7": 0.0}
    assert _following("assign", run, {"rule": "proven", "mix": mix}) == ["evaluate"]
    assert _following("assign", run, {"rule": "none", "mix": mix}) == ["evaluate", "--policy", "leap:7:price=0.05"]


def test_a_stage_says_if_it_divides_train_otherwise(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    say_other_parts(run, "label")
    assert not capsys.readouterr().err
    data = run.data.model_copy(update={"calibrate": 0.125})
    say_other_parts(run.model_copy(update={"data": data}), "calibrate")
    assert f"data.calibrate {run.data.calibrate} (here 0.125)" in capsys.readouterr().err


def test_commands_that_read_write_nothing(run: Config) -> None:
    folder = run.run.dir
    before = snapshot(folder.parent)
    video = next(folder.parent.glob("data/val/*.mp4"))
    for words in (
        ("predict", folder, video),
        ("flops", folder),
        ("plan", folder, "--gpus", 2, "plan.macs_per_s=1e9"),
        ("launch", folder, "--dry-run"),
        ("index", "--check", folder),
    ):
        done = runs.command(*words)
        assert done.returncode == 0, done.stderr
        assert snapshot(folder.parent) == before, words


def test_a_call_that_fails_leaves_no_folder(run: Config, tmp_path: Path) -> None:
    bad, weights = tmp_path / "bad.csv", tmp_path / "weights.safetensors"
    bad.write_text((run.run.dir.parent / "data" / "train.csv").read_text() + "train/00000.mp4 99\n")
    save_file({"cls_token": torch.zeros(1, 1, 8)}, weights)
    fresh = tmp_path / "new" / "run"
    for words, message in (
        (("train", "data.train.annotations=nowhere.csv"), "nowhere.csv does not exist"),
        (("train", f"data.train.annotations={bad}"), "99"),
        (("train", f"train.init={weights}"), "weights.safetensors"),
        (("train", "train.init=nowhere.pth"), "nowhere.pth: no such file"),
        (("label",), "run `videoadapt train` first"),
        (("evaluate",), "run `videoadapt train` first"),
        (("assign",), "run `videoadapt label`"),
        (("predict", "a.mp4"), "run `videoadapt train` first"),
    ):
        verb, *rest = words
        done = runs.command(verb, run.run.dir, *rest, f"run.dir={fresh}")
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1]
        assert not fresh.parent.exists(), words


def test_other_initial_weights_are_refused_once_the_run_has_begun(run: Config, tmp_path: Path) -> None:
    copy, weights = tmp_path / "run", tmp_path / "a.safetensors"
    shutil.copytree(run.run.dir, copy)
    [newest] = (
        path for path in (copy / "checkpoints").glob("step-*") if path.name in (copy / "checkpoints/last").read_text()
    )
    shutil.copy(newest, weights)
    begun = [f"run.dir={tmp_path / 'begun'}", f"train.init={weights}", "train.ema=null"]
    train(load_config(copy, begun))
    weights.rename(tmp_path / "b.safetensors")
    train(load_config(tmp_path / "begun", [f"train.init={tmp_path / 'b.safetensors'}"]))  # the same content elsewhere
    train(load_config(tmp_path / "begun"))  # the file is gone
    config = (tmp_path / "begun" / RUN_CONFIG).read_bytes()
    save_file({"x": torch.zeros(1)}, weights)
    for other in (f"train.init={weights}", "train.init=null", "train.init=nowhere.pth"):
        with pytest.raises(CheckpointError, match=r"train\.init: the run began with"):
            train(load_config(tmp_path / "begun", [other]))
    assert (tmp_path / "begun" / RUN_CONFIG).read_bytes() == config


@pytest.mark.parametrize(("folder", "name"), [("pets/run", "pets"), ("pets", "pets"), ("pets/second", "second")])
def test_the_folders_of_new_give_runs_their_names(tmp_path: Path, folder: str, name: str) -> None:
    assert run_name(tmp_path / folder) == name


def test_a_folder_run_without_a_parent_has_its_own_name() -> None:
    assert run_name(Path("/run")) == "run"
