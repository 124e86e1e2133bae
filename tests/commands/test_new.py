"""`videoadapt new`: the config that it writes loads, trains, and has a reason for what it chose."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_runs as runs
from videoadapt.commands.new import (
    NewRun,
    _agreeing,
    _checked,
    _wanted,
    fill_template,
    new,
    parts_that_fit,
    print_new,
    template_lines,
)
from videoadapt.commands.recommend import MachineFacts, Setting, recommend
from videoadapt.config.load import load_config, make_config
from videoadapt.config.parse import parse_yaml
from videoadapt.data.index.annotations import list_videos
from videoadapt.data.index.class_files import read_classes
from videoadapt.data.index.survey import Spread, Survey, survey
from videoadapt.errors import ConfigError, UserError
from videoadapt.model.weights.facts import Normalisation, WeightsFacts
from videoadapt.performance.memory import training_memory

SMALL = [
    "train.epochs=1",
    "model.num_frames=2",
    "model.width=16",
    "model.heads=1",
    "model.depth=1",
    "model.size=32",
    "model.points=[2,1]",
]
LAPTOP = MachineFacts("cpu", "2 CPU cores", 2, "fp32", 60e9)
GPU = MachineFacts("cuda", "a GPU", 16, "bf16", 60e12)
VIT_S = WeightsFacts(
    "ViT-S",
    {"width": 384, "depth": 12, "heads": 6, "mlp_ratio": 4.0, "patch": 14, "qkv_bias": True, "layer_scale": 1e-5},
    Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "timm"),
    "mean and std by timm",
)


def class_folders(folder: Path, counts: dict[str, int]) -> Path:
    """A folder per class of generated images."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((40, 48, 3), 20 * number % 250, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{number}.png")
    return folder


def videos_per_class(folder: Path) -> Path:
    """The generated videos, in a folder per class below `train` and `val`."""
    data = runs.make_data(folder / "lists")
    names = (data / "classes.txt").read_text().split("\n")
    for split in ("train", "val"):
        for line in (data / f"{split}.csv").read_text().splitlines():
            path, label = line.rsplit(maxsplit=1)
            target = folder / "data" / split / names[int(label)] / Path(path).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / path, target)
    return folder / "data"


def test_a_config_for_lists_of_videos_loads_and_trains(tmp_path: Path) -> None:
    data = runs.make_data(tmp_path / "my data")
    done = runs.command("new", tmp_path / "run", "--data", data, *SMALL, "data.holdout=0.3")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run" / "config.yaml"
    config = load_config(path)
    assert config.run.dir == tmp_path / "run" / "run"
    assert (config.model.num_classes, config.model.num_frames, config.data.classes) == (12, 2, data / "classes.txt")
    assert "# as given" in path.read_text() and "a clip covers" in path.read_text()
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("videoadapt")] == [
        *("train", "label", "assign", "evaluate", "report", "predict")
    ]
    assert runs.command("train", path).returncode == 0
    assert not config.run.dir.joinpath("missing").exists()
    again = runs.command("new", tmp_path / "run", "--data", data)
    assert again.returncode == 2 and "never overwritten" in again.stderr


def test_images_without_a_val_split_get_one(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "photos", {"cat": 10, "dog": 40})
    assert runs.command("new", tmp_path / "run", "--data", data).returncode == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.model.num_frames, config.model.temporal, config.assign.frames) == (1, False, 1)
    train, val = (Path(split.annotations).read_text().splitlines() for split in (config.data.train, config.data.val))  # type: ignore[arg-type]
    assert (len(train), len(val)) == (40, 10)
    assert sum(line.endswith(" cat") for line in val) == 2  # a fifth of each class
    assert {"cat8.png", "cat9.png"} <= {line.split('"')[1].rpartition("/")[2] for line in val}  # neighbours together
    assert Path(config.data.classes or "").read_text() == "cat\ndog\n"


def test_the_file_of_class_names_is_written_with_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        class_folders(tmp_path / "photos" / split, {"cat": 4, "dog": 4})
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = runs.command("new", tmp_path / "run", "--data", tmp_path / "photos", "data.classes=~/names.txt")
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "run" / "config.yaml").data.classes == tmp_path / "names.txt"


def test_names_that_are_numbers_in_a_row_may_show_one_scene(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "photos", {"cat": 5, "dog": 5})
    [note] = [each for each in survey(data, tmp_path).notes if "in a row" in each]
    assert r"data.source_pattern, such as '(.*)\d\.png'" in note
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        path.rename(path.with_name(f"{'abcdefghij'[number]}.png"))
    assert not [each for each in survey(data, tmp_path).notes if "in a row" in each]


def test_a_drawn_val_split_has_whole_sources(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "photos", {"cat": 33, "dog": 33})
    pattern = r"(.*)\d\.png"  # blocks 0 to 9, 10 to 19, 20 to 29, and 30 to 32
    found = survey(data, tmp_path, source_pattern=pattern)
    assert (found.counts["train"], found.counts["val"]) == ((30, 30), (3, 3))  # not 26 and 7, inside a block
    assert not [each for each in found.notes if "in a row" in each]
    assert found.source_count == 6


def _val_of_sources(data: Path, pattern: str) -> tuple[set[str], dict[str, int]]:
    """Returns the sources of a drawn val split, none of which train has, and its videos of each class."""
    found = survey(data, data.parent, source_pattern=pattern)
    names = {split: re.findall(r'"(.*)" (\w+)', found.files[f"{split}.csv"]) for split in ("train", "val")}
    train, val = ({re.fullmatch(pattern, path)[1] for path, _ in rows} for rows in names.values())  # type: ignore[index]
    assert not train & val
    return val, dict(Counter(label for _, label in names["val"]))


def test_sources_of_several_classes_are_not_divided(tmp_path: Path) -> None:
    """A person walks and runs; names need not sort by person, nor all persons be in all classes."""
    for label, persons in {"walk": [1, 2, 3, 4, 5], "run": [1, 2, 3, 4, 4, 4, 4, 5]}.items():
        class_folders(tmp_path / "a", {label: len(persons)})
        for number, person in enumerate(persons):
            path = tmp_path / "a" / label / f"{label}{number}.png"
            path.rename(path.with_name(f"p{person}_{number}.png"))
    assert _val_of_sources(tmp_path / "a", r".*/p(\d)_.*") == ({"5"}, {"walk": 1, "run": 1})
    data = class_folders(tmp_path / "b", {"x": 20, "y": 20})
    for path in data.rglob("*.png"):
        number = int(path.stem[1:])
        path.rename(path.with_name(f"{number:03}_p{number % 4}.png"))
    assert _val_of_sources(data, r".*_p(\d)\.png") == ({"3"}, {"x": 5, "y": 5})


def test_lists_of_classes_that_are_numbers_keep_their_labels(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "photos", {"1": 3, "2": 3, "3": 3})
    (tmp_path / "run").mkdir()
    for name, text in survey(data, tmp_path / "run").files.items():
        (tmp_path / "run" / name).write_text(text)
    lists = {split: {"annotations": str(tmp_path / "run" / f"{split}.csv")} for split in ("train", "val")}
    classes = {"classes": str(tmp_path / "run" / "classes.txt")}
    listing = list_videos(make_config({"data": lists | classes, "model": {"num_classes": 3}}))
    assert {(Path(video.path).parent.name, listing.classes[video.label]) for video in listing.videos} == {
        *(("1", "1"), ("2", "2"), ("3", "3"))
    }


def test_the_lists_of_the_user_are_never_replaced(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "photos", {"cat": 5, "dog": 5})
    list_ = data / "train.csv"
    list_.write_text("".join(f"{name}/{name}{n}.png {name}\n" for name in ("cat", "dog") for n in range(5)))
    before = list_.read_text()
    for source in (data, list_):
        with pytest.raises(UserError, match=r"train\.csv exists, and `new` would write another"):
            new(data, source)
    assert list_.read_text() == before
    assert {path.name for path in data.iterdir()} == {"cat", "dog", "train.csv"}
    new(tmp_path / "run", data)  # the config was deleted, its lists were not
    (tmp_path / "run" / "config.yaml").unlink()
    new(tmp_path / "run", data)


def test_a_step_has_no_more_clips_than_the_training(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "photos", {"cat": 2, "dog": 2})
    config = load_config(new(tmp_path / "run", data).config)
    assert config.train.batch == 2
    none_left = recommend(survey(data, tmp_path), None, LAPTOP, holdout=0.9)  # of two clips
    assert none_left.settings["train.batch"].value == 1


def test_lists_with_names_as_labels_need_no_file_of_classes(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "photos", {"cat": 4, "dog": 4})
    for split in ("train", "val"):
        (data / f"{split}.csv").write_text(
            "path,label\n" + "".join(f"{n}/{n}{i}.png,{n} x\n" for n in ("cat", "dog") for i in range(4))
        )
    done = runs.command("new", tmp_path / "run", "--data", data, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["classes"] == ["cat x", "dog x"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no folder per class"),
        ({"cat": 3}, "one class, cat"),
        ({"cat": 0, "dog": 0}, "lists no video"),
        ({"a": 1, "b": 1}, "one video for each"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    (tmp_path / "data").mkdir()
    class_folders(tmp_path / "data", counts)
    done = runs.command("new", tmp_path / "run", "--data", tmp_path / "data")
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "names", [("annotations", "train", "val"), ("videos_train", "videos_val"), ("train_256", "val_256")]
)
def test_folders_of_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"named after splits, not classes: .*{names[-1]}"):
        survey(class_folders(tmp_path / "data", dict.fromkeys(names, 2)), tmp_path)
    vehicles = class_folders(tmp_path / "vehicles", {"train": 2, "tram": 2, "training dog": 2})
    assert survey(vehicles, tmp_path).classes == ("train", "training dog", "tram")


def test_numbers_in_the_names_of_class_folders_do_not_change_their_order(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", {"1 run": 2, "2 walk": 2, "10 jump": 2})
    found = survey(data, tmp_path)
    for name, text in found.files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert found.sources.classes is not None
    assert read_classes(found.sources.classes).names == found.classes == ("1 run", "10 jump", "2 walk")


def test_a_path_that_no_list_can_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\\nb.*line break"):
        survey(class_folders(tmp_path / "data", {"a\nb": 2, "c": 2}), tmp_path)


def test_videos_beside_pictures_and_classes_that_only_val_has_are_refused(tmp_path: Path) -> None:
    data = videos_per_class(tmp_path)
    extra = class_folders(tmp_path / "extra", {"new": 2})
    shutil.copytree(next((data / "val").iterdir()), data / "val" / "new")
    with pytest.raises(UserError, match="classes that are not in"):
        survey(data, tmp_path / "run")
    shutil.rmtree(data / "val" / "new")
    shutil.copy(extra / "new" / "new0.png", next((data / "train").iterdir()))
    with pytest.raises(UserError, match=r"data\.kind=videos"):
        survey(data, tmp_path / "run")
    assert survey(data, tmp_path / "run", "videos").kind == "videos"


def facts(clips: int, seconds: float = 4.0, kind: str = "videos") -> Survey:
    """What a survey finds in some data set of two classes."""
    spread = Spread(seconds, seconds, 2 * seconds)
    return Survey(
        **{"sources": survey_sources(), "kind": kind, "classes": ("a", "b"), "opened": clips, "unreadable": ()},  # type: ignore[arg-type]
        counts={"train": (clips // 2, clips // 2), "val": (clips // 8, clips // 8)},
        seconds=spread,
        fps=Spread(25.0, 25.0, 30.0),
        short_side=Spread(240.0, 256.0, 720.0),
        aspect=1.5,
        notes=(),
        files={},
    )


def survey_sources() -> object:
    from videoadapt.data.index.survey import Sources

    return Sources(Path("train.csv"), Path("val.csv"), Path("classes.txt"), Path())


def test_settings_follow_data_and_machine() -> None:
    values = {key: setting.value for key, setting in recommend(facts(180), VIT_S, LAPTOP).settings.items()}
    assert values["model.num_frames"] * values["model.stride_frames"] / values["model.fps"] == pytest.approx(
        4.0, rel=0.1
    )
    assert values["model.size"] == 14 * max(values["model.points"]) <= 256
    assert values["model.mean"] == [0.485, 0.456, 0.406]
    assert values["loss.class_weights"] == "none"
    assert values["train.freeze"] is None  # image weights have no layers between frames
    assert recommend(facts(180, kind="images"), VIT_S, LAPTOP).settings["train.freeze"].value >= 6  # few clips
    large = {key: setting.value for key, setting in recommend(facts(20_000, 10.0), VIT_S, GPU).settings.items()}
    assert (large["model.num_frames"], large["model.points"], large["train.freeze"]) == (8, [14, 10, 7], None)
    assert large["train.batch"] > values["train.batch"]
    uneven = replace(facts(200), counts={"train": (150, 50), "val": (20, 20)})
    assert recommend(uneven, VIT_S, LAPTOP).settings["loss.class_weights"].value == "balanced"


def test_more_time_allows_a_larger_input() -> None:
    usual, long = recommend(facts(180), VIT_S, LAPTOP), recommend(facts(180), VIT_S, LAPTOP, minutes=1000)
    assert long.settings["model.size"].value > usual.settings["model.size"].value
    assert long.alternatives[0].chosen
    for wanted in usual.alternatives:  # the time in each line of the table leads to this line
        again = recommend(facts(180), VIT_S, LAPTOP, minutes=wanted.minutes * 1.001)
        [chosen] = [each for each in again.alternatives if each.chosen]
        assert chosen.epochs >= chosen.least_epochs
        assert chosen.minutes <= wanted.minutes
        assert (again.settings["model.size"].value, again.settings["train.epochs"].value) == (
            chosen.pixels,
            chosen.epochs,
        )


@pytest.mark.parametrize(
    ("clips", "words"),
    [
        (180, "too few for an assigner"),
        (1000, "60 choose the assigner's threshold"),
        (20_000, "enough to prove"),
    ],
)
def test_the_holdout_says_what_its_clips_can_show(clips: int, words: str) -> None:
    assert words in recommend(facts(clips), VIT_S, LAPTOP).settings["data.holdout"].reason


def test_the_clips_of_a_source_are_one_piece_of_evidence_for_the_threshold() -> None:
    reason = recommend(replace(facts(20_000), source_count=100), VIT_S, LAPTOP).settings["data.holdout"].reason
    assert "in whole sources, of which train has 100" in reason
    assert re.search(r"needs about \d+ sources \(\d+ clips\), not \d$", reason)


def test_a_busy_machine_is_said_with_its_times(capsys: pytest.CaptureFixture[str]) -> None:
    machine = replace(LAPTOP, slowdown=7.0)
    chosen = recommend(facts(1600, kind="images"), VIT_S, machine, 10)
    result = NewRun(
        Path("c"),
        Path("r"),
        facts(1600, kind="images"),
        None,
        machine,
        {"train": 120.0},
        10.0,
        chosen.alternatives,
        [],
        [],
    )
    print_new(result)
    printed = capsys.readouterr()
    assert "if nothing else runs: train 2:00" in printed.err
    assert "about 7 times as long, train 14:00" in printed.err and "--minutes counts an idle machine" in printed.err
    assert printed.out.count("*") == 2  # in the title, and at the line that was chosen
    print_new(replace(result, machine=LAPTOP))
    assert "busy" not in capsys.readouterr().err


@pytest.mark.parametrize(("clips", "kind"), [(180, "videos"), (180, "images"), (1600, "images")])
def test_training_on_two_cores_ends_in_ten_minutes(clips: int, kind: str) -> None:
    chosen = recommend(facts(clips, kind=kind), VIT_S, LAPTOP)
    assert chosen.seconds["train"] <= 600
    assert chosen.settings["train.epochs"].value >= 4


def test_a_step_is_split_until_it_fits_into_the_memory() -> None:
    model = {"width": 16, "heads": 1, "depth": 1, "size": 32, "points": ["2"], "num_frames": 1, "num_classes": 2}
    config = make_config({"model": model, "train": {"batch": 8, "optimizer": "adamw"}, "run": {"device": "cpu"}})
    whole = training_memory(config, torch.device("cpu")).bytes(["2"], 8)
    assert parts_that_fit(config, 2 * whole).value == 1
    assert parts_that_fit(config, whole).value > 1
    assert parts_that_fit(config, 1).value == 8  # at least one clip
    train = {"batch": 12, "optimizer": "adamw"}
    pairs = make_config({"model": model, "train": train, "data": {"mixup": 0.8}, "run": {"device": "cpu"}})
    assert parts_that_fit(pairs, 1).value == 6  # equal parts, of whole pairs


def test_a_wrong_setting_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    done = runs.command("new", tmp_path / "run", "--data", tmp_path / "no", "train.foo=1")
    assert done.returncode == 2 and "train.foo" in done.stderr


def test_what_is_chosen_later_does_not_contradict_the_user() -> None:
    large = replace(VIT_S, model=VIT_S.model | {"depth": 24})
    assert _wanted(["data.holdout=0", "train.freeze=20"], large).data.holdout == 0
    with pytest.raises(ConfigError, match=r"train\.freeze: 20 is more than model\.depth 12"):
        _wanted(["train.freeze=20"], VIT_S)


@pytest.mark.parametrize(
    "words",
    [
        ["data.crop_area=[0.35,1]"],
        ["model.size=336"],
        ["model.size=256", "model.points=[16,8]"],
        ["data.calibrate=0.85"],
        ["slurm.stages.assign.time_minutes=30", "slurm.extra.mem_per_gpu=32G", "slurm.extra.nice=5"],
        ["parallel.groups.14=1", "parallel.groups.7=2", "model.points=[14,7]", "model.size=224"],
    ],
)
def test_values_that_the_user_never_wrote_contradict_nothing(words: list[str]) -> None:
    said, found = _wanted(words, None), facts(180)
    chosen = recommend(found, None, LAPTOP, calibrate=said.data.calibrate).settings
    settings = _agreeing(chosen, said, {word.partition("=")[0] for word in words}, found)
    config, text = _checked("# header", settings, words, LAPTOP, Path("config.yaml"))
    for word in words:
        key, _, value = word.partition("=")
        section, name = key.split(".")[:2]
        assert getattr(getattr(config, section), name) == getattr(getattr(said, section), name), (word, value)
    assert make_config(parse_yaml(text)) == config


def test_each_value_of_the_template_has_a_comment_above_it_or_beside_it() -> None:
    for (key_above, _), (key, line) in itertools.pairwise(template_lines()):
        is_value = key and not line.endswith(":")
        assert not is_value or not key_above or " # " in line, f"{key} has no comment"


def test_keys_that_the_template_does_not_have_end_their_section() -> None:
    rare = {"model.embed": Setting("stem", "x"), "model.patch": Setting(12, ""), "slurm.qos": Setting("a", "b")}
    text = fill_template(rare, "# header")
    assert "# header\n" in text and "\n  embed: stem  # x\nloss:" in text
    config = make_config(parse_yaml(text))
    assert (config.model.embed, config.model.patch, config.slurm.qos) == ("stem", 12, "a")


@pytest.mark.parametrize(("clips", "kind"), [(180, "videos"), (1600, "images")])
def test_points_and_validations_are_cut_before_pixels_and_frames(clips: int, kind: str) -> None:
    full = recommend(facts(clips, kind=kind), VIT_S, LAPTOP, 1000).settings
    preferred, second = recommend(facts(clips, kind=kind), VIT_S, LAPTOP).alternatives[:2]
    seen = ("model.size", "model.num_frames", "train.freeze")
    for minutes in (0.99 * preferred.minutes, 1.001 * second.minutes):  # less than three points need, then two
        cut = recommend(facts(clips, kind=kind), VIT_S, LAPTOP, minutes).settings
        assert [cut[key].value for key in seen] == [full[key].value for key in seen]
        assert len(full["model.points"].value) == 3 and cut["model.points"].value == full["model.points"].value[::2]
    sparse = recommend(facts(clips, kind=kind), VIT_S, LAPTOP, 1.001 * preferred.minutes).settings
    assert sparse["train.validate_every"].value == 2 and sparse["model.points"].value == full["model.points"].value


def test_each_line_of_the_table_takes_less_time_than_those_before_it() -> None:
    for kind in ("videos", "images"):
        minutes = [each.minutes for each in recommend(facts(1600, kind=kind), VIT_S, LAPTOP, 1).alternatives]
        assert minutes == sorted(minutes, reverse=True)
