"""Points and configs: parsing, inheritance, overrides, errors that name the field, and the published costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from videoadapt.config.jobs import Stage
from videoadapt.config.load import Config, dump_config, known_keys, load_config, make_config, with_absolute_paths
from videoadapt.config.points import Point
from videoadapt.errors import ConfigError, UserError
from videoadapt.evaluation.costs import flops
from videoadapt.model.timesformer import TimeSformer

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
B_K400 = FOLDER / "timesformer_b_k400.yaml"


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FIGHTS": "/data/fights", "PHOTOS": "/data/photos", "LISTS": "fixed"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VIT_S", "/weights/vit_s.safetensors")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        make_config(values)
    assert "\n" not in str(error.value)
    return str(error.value)


# Points.


@given(st.integers(1, 99), st.integers(1, 1000))
def test_a_point_reads_back_what_it_prints(length: int, thousandths: int) -> None:
    point = Point(length, thousandths / 1000)
    assert Point.parse(str(point)) == point


@pytest.mark.parametrize(
    ("given_as", "point"),
    [(14, Point(14)), ("14", Point(14)), (" 7@0.5 ", Point(7, 0.5)), ("7@.5", Point(7, 0.5)), ("7@1.0", Point(7))],
)
def test_points_are_read_from_numbers_and_text(given_as: str | int, point: Point) -> None:
    assert Point.parse(given_as) == point
    assert Point.parse(point) is point


@pytest.mark.parametrize("text", ["", "0", "-7", "014", "14@", "14@0", "14@1.1", "14@-1", "14.0", "big", "14@x", True])
def test_a_text_of_another_form_is_an_error_with_an_example(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected LENGTH or LENGTH@KEEP.*14@0\.7"):
        Point.parse(text)


def test_points_sort_by_length_then_by_keep() -> None:
    written = ["7", "14@0.5", "10", "14", "14@0.7"]
    assert [str(p) for p in sorted(map(Point.parse, written))] == ["7", "10", "14@0.5", "14@0.7", "14"]


@given(st.permutations(["14", "10", "7"]))
def test_the_points_of_a_model_are_ordered_costliest_first(points: list[str]) -> None:
    model = make_config({"model": {"points": points}}).model
    assert model.points == ("14", "10", "7")
    assert model.lengths == (14, 10, 7)


def test_a_single_point_needs_no_list() -> None:
    assert make_config({"model": {"points": 14}}).model.points == ("14",)
    assert make_config({"model": {"points": "7"}}).model.points == ("7",)


# Errors.


@pytest.mark.parametrize(
    ("values", "unknown", "meant"),
    [
        ({"model": {"depht": 3}}, "model.depht", "model.depth"),
        ({"tran": {"epochs": 3}}, "tran", "train?"),
        ({"train": {"learning_rate": 1}}, "train.learning_rate", "train.lr?"),
        ({"data": {"train": {"annotation": "a"}}}, "data.train.annotation", "data.train.annotations"),
        ({"epochs": 3}, "epochs", "train.epochs or assign.epochs?"),
    ],
)
def test_an_unknown_key_is_an_error_that_suggests_another(values: dict[str, Any], unknown: str, meant: str) -> None:
    assert f"unknown key {unknown}; did you mean {meant}" in error_of(values)


def test_known_keys_are_all_keys_of_a_config() -> None:
    def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, value in values.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
        return found

    of_stages = {key for key in known_keys() if key.startswith("slurm.stages.")}
    assert set(known_keys()) - of_stages == leaves(Config().model_dump()) - {"slurm.stages"}
    of_slurm = {key.removeprefix("slurm.") for key in known_keys() if key.startswith("slurm.")} - {"stages"}
    assert {key.removeprefix("slurm.stages.") for key in of_stages} == {
        f"{stage}.{key}" for stage in get_args(Stage) for key in of_slurm if not key.startswith("stages.")
    }


SHARED_STEM = {"embed": "stem", "share_patch": True}
CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("model.heads: 12 does not divide model.width 100", {"model": {"width": 100, "heads": 12}}),
    ("model.temporal: false needs model.num_frames 1, got 8", {"model": {"temporal": False, "num_frames": 8}}),
    ("model.embed: stem halves the resolution first and needs", {"model": {"embed": "stem", "patch": 15, "size": 224}}),
    ("model.points: 4@0.95 drops so few tokens that it saves nothing", {"model": {"points": ["4", "4@0.95"]}}),
    ("model.drop_blocks: 14@0.7 needs blocks that drop tokens,", {"model": {"points": ["14", "14@0.7"], "depth": 9}}),
    ("model.points: length 15 with 16-pixel patches needs 240 pixels", {"model": {"points": ["15"]}}),
    ("model.points: expected one or more different points, got ['14', 14]", {"model": {"points": ["14", 14]}}),
    ("model.points: expected one or more different points, got ['14',", {"model": {"points": ["14", "14@1.0"]}}),
    ("model.points: expected one or more different points, got []", {"model": {"points": []}}),
    ("model.points: expected one or more different points, got 3.5", {"model": {"points": 3.5}}),
    ("model.points: expected one or more different points, got {'length': 14}", {"model": {"points": {"length": 14}}}),
    ("model.points: point 'fourteen': expected LENGTH or LENGTH@KEEP", {"model": {"points": ["fourteen"]}}),
    ("model.points: input should be a valid tuple, got None", {"model": {"points": None}}),
    ("loss.dropped: with kl, 14@0.7 learns from 14, which is not in", {"model": {"points": ["14@0.7", "10"]}}),
    ("train.draw: ", {"model": {"points": ["14@0.7", "10"]}, "loss": {"dropped": "ce"}, "train": {"draw": "sampled"}}),
    ("train.batch: 64 clips cannot be split into 5 equal micro-batches", {"train": {"batch": 64, "accumulate": 5}}),
    ("train.nesterov: needs train.optimizer=sgd and", {"train": {"nesterov": True, "optimizer": "adamw"}}),
    ("train.nesterov: needs train.optimizer=sgd and train.momentum", {"train": {"nesterov": True, "momentum": 0.0}}),
    ("data.short_side: expected [LOW, HIGH] with model.size 224 <= LOW <= HIGH,", {"data": {"short_side": [200, 320]}}),
    ("data.short_side: expected [LOW, HIGH] with model.size 224 <= LOW <= HIGH,", {"data": {"short_side": [320, 256]}}),
    ("label.source: holdout needs data.holdout above 0", {"label": {"source": "holdout"}}),
    ("assign.frames: 4 is more than the frames of a clip", {"assign": {"frames": 4}, "model": {"num_frames": 2}}),
    ("loss.tau: has no effect on hard targets", {"loss": {"hard": True, "tau": 2.0}}),
    ("run.checkpoint: best is by the validations", {"run": {"checkpoint": "best"}, "train": {"validate_every": 0}}),
    ("train.patience: needs videos to validate on", {"train": {"patience": 3}}),
    ("parallel.groups: a stem that all lengths share", {"model": SHARED_STEM, "parallel": {"groups": "auto"}}),
    ("parallel.groups: a stem that all lengths", {"model": SHARED_STEM, "parallel": {"groups": {"14": 1, "10+7": 1}}}),
    ("model.points: expected one or more different points,", {"model": {"points": ["14", "14@0.7", "14@0.7000001"]}}),
    ("slurm.signal_s: 600 s before the limit of 2 minutes", {"slurm": {"signal_s": 600, "time_minutes": 2}}),
    ("slurm.stages.label.signal_s: 120 s before the limit of 2", {"slurm": {"stages": {"label": {"time_minutes": 2}}}}),
    ("train.min_lr: 0.1 is above train.lr 0.01", {"train": {"min_lr": 0.1, "lr": 0.01}}),
]


@pytest.mark.parametrize(("beginning", "values"), CONTRADICTIONS)
def test_a_contradiction_is_an_error_that_names_field_and_cause(beginning: str, values: dict[str, Any]) -> None:
    assert error_of(values).startswith(beginning)


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"points": ["14"], "size": 224}},
        {"model": {"temporal": False, "num_frames": 1}, "assign": {"frames": 1}},
        {"data": {"short_side": [224, 224]}},
        {"data": {"holdout": 0.2}, "label": {"source": "holdout"}},
        {"loss": {"hard": True, "lam": 0.5}},
        {"model": {"embed": "stem", "patch": 16}},
        {"model": SHARED_STEM, "parallel": {"groups": {"14+10+7": 2}}},
        {"train": {"patience": 3}, "data": {"validate": "holdout", "holdout": 0.2}},
        {"slurm": {"signal_s": 100, "time_minutes": 2}},
    ],
)
def test_values_at_the_limit_of_a_contradiction_are_valid(values: dict[str, Any]) -> None:
    make_config(values)


VALUES: list[tuple[str, Any]] = [
    ("run.device", "tpu"),
    ("run.precision", "fp8"),
    ("run.seed", "x"),
    ("data.holdout", 1.0),
    ("data.flip", 1.1),
    ("data.workers", -1),
    ("data.timeout_s", 0),
    ("data.short_side", [256]),
    ("model.width", 0),
    ("model.depth", 2.5),
    ("model.std", [0.2, 0.2]),
    ("model.drop_path", -0.1),
    ("model.layer_scale", float("nan")),
    ("loss.lam", 1.5),
    ("loss.tau", 0),
    ("train.lr", float("inf")),
    ("train.lr", "fast"),
    ("train.lr", -1),
    ("train.ema", 1.0),
    ("train.keep_checkpoints", 1),
    ("train.milestones", [0]),
    ("label.none_right", "random"),
    ("assign.stages", 8),
    ("assign.select", 0.0),
    ("assign.mu", float("inf")),
    ("evaluate.spatial_crops", 0),
]


@pytest.mark.parametrize(("field", "value"), VALUES)
def test_a_value_out_of_range_is_an_error_with_field_and_value(field: str, value: Any) -> None:
    section, key = field.split(".")
    message = error_of({section: {key: value}})
    assert message.startswith(field)
    assert "got " in message


@pytest.mark.parametrize(
    "text", ["{8:1,6:1,4:1}", "{14:4, 10: 2, 7: 1}", "{10+7:1, 14: 1}", "atuo", "{14: 0, 10: 1, 7: 1}", "3", "[14]"]
)
def test_groups_of_another_form_are_one_error_with_an_example(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path / "a.yaml", ""), [f"parallel.groups={text}"])
    assert str(error.value).startswith("parallel.groups: expected auto, or how many ranks each length has")
    assert "such as {14: 4, 10+7: 1}, with a space after each colon, got " in str(error.value)
    assert str(error.value).count("parallel.groups") == 1


def test_groups_may_have_spaces_in_keys_and_numbers_as_text() -> None:
    groups = make_config({"parallel": {"groups": {14: 2, "10 + 7": "1"}}}).parallel.groups
    assert groups == {"14": 2, "10+7": 1}


def test_one_message_has_all_errors() -> None:
    message = error_of({"model": {"depth": 0}, "train": {"lr": -1, "epoch": 3}})
    assert all(part in message for part in ("model.depth", "train.lr", "train.epoch;"))


@pytest.mark.parametrize("values", [{"model": [1]}, {"train": 3}])
def test_a_section_of_another_type_is_an_error_that_names_it(values: dict[str, Any]) -> None:
    assert error_of(values).startswith(next(iter(values)))


def test_a_config_is_immutable() -> None:
    config = make_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


# Files, overrides, inheritance, variables.


def test_overrides_are_yaml_and_replace_the_values_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "train: {epochs: 5, lr: 0.1}\n")
    lines = ["train.epochs=7", "model.points=[14, 7]", "run.dir=runs/x=y", "model.fps=null", "train.min_lr=1e-4"]
    config = load_config(path, [*lines, "data.val.annotations=v.csv", "train.epochs=8"])
    assert (config.train.epochs, config.train.lr, config.train.min_lr) == (8, 0.1, 1e-4)
    assert config.model.points == ("14", "7")
    assert config.model.fps is None
    assert (config.run.dir, config.data.val.annotations) == (Path("runs/x=y"), Path("v.csv"))


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train.=3", "", "train"])
def test_an_override_of_another_form_is_an_error_with_an_example(tmp_path: Path, override: str) -> None:
    path = write(tmp_path / "a.yaml", "")
    with pytest.raises(ConfigError, match=r"section\.key=value, such as train\.epochs=5"):
        load_config(path, [override])


def test_an_override_of_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch; did you mean train\.epochs\?.*a\.yaml"):
        load_config(write(tmp_path / "a.yaml", ""), ["train.epoch=3"])


def test_an_override_leaves_other_keys_of_its_section_unchanged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "data: {train: {annotations: a}, val: {annotations: b}, flip: 0.0}\n")
    config = load_config(path, ["data.train.annotations=c"])
    assert (config.data.train.annotations, config.data.val.annotations) == (Path("c"), Path("b"))
    assert config.data.flip == 0.0


def test_a_config_starts_from_its_base_and_the_base_from_its_own(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "c.yaml", "train: {epochs: 1, lr: 0.1, batch: 8}\nmodel: {depth: 3}\n")
    write(tmp_path / "deep" / "b.yaml", "base: c.yaml\ntrain: {epochs: 2, lr: 0.2}\n")
    path = write(tmp_path / "a.yaml", "base: deep/b.yaml\ntrain: {epochs: 3}\n")
    config = load_config(path)
    assert (config.train.epochs, config.train.lr, config.train.batch, config.model.depth) == (3, 0.2, 8, 3)


def test_a_list_replaces_the_list_of_the_base(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", "model: {points: [14, 10, 7]}\n")
    assert load_config(write(tmp_path / "a.yaml", "base: b.yaml\nmodel: {points: [14]}\n")).model.points == ("14",)


@pytest.mark.parametrize("groups", [None, {"14": 2, "10+7": 1}])
def test_groups_replace_those_of_the_base(tmp_path: Path, groups: dict[str, int] | None) -> None:
    write(tmp_path / "b.yaml", "parallel: {groups: {14: 4, 10: 2, 7: 1}, step_s: 60}\n")
    text = "null" if groups is None else "{14: 2, 10+7: 1}"
    parallel = load_config(write(tmp_path / "a.yaml", f"base: b.yaml\nparallel: {{groups: {text}}}\n")).parallel
    assert (parallel.groups, parallel.step_s) == (groups, 60.0)


def test_further_options_of_sbatch_join_those_of_the_base(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", "slurm: {extra: {exclusive: true}}\n")
    path = write(tmp_path / "a.yaml", "base: b.yaml\nslurm: {extra: {nodelist: n07}}\n")
    assert load_config(path).slurm.extra == {"exclusive": "", "nodelist": "n07"}


def test_bases_in_a_circle_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(write(tmp_path / "a.yaml", "base: b.yaml\n"))


@pytest.mark.parametrize("base", ["[b.yaml]", "{a: b}"])
def test_a_base_that_is_not_a_name_is_an_error(tmp_path: Path, base: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml: base: expected the name"):
        load_config(write(tmp_path / "a.yaml", f"base: {base}\n"))


def test_a_missing_file_or_base_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.yaml", write(tmp_path / "a.yaml", "base: gone.yaml\n"), tmp_path):
        with pytest.raises(ConfigError, match=r"no such config or run folder|a folder without config\.yaml") as error:
            load_config(path)
        assert "gone.yaml" in str(error.value) or path == tmp_path


@pytest.mark.parametrize(
    ("text", "message", "excerpt"),
    [
        ("model: {depth: 3", "line 1, column 17: expected ',' or '}'", "  model: {depth: 3\n         ^"),
        ("a:\n\t- b", "line 2, column 1: .*indent with spaces", "   - b\n  ^"),
        (
            "model: !!python/object:os.system {}",
            "line 1, column 8: the tag",
            "  model: !!python/object:os.system {}\n         ^",
        ),
        ("a: b: c", "line 1, column 5: .*needs quotes", "  a: b: c\n      ^"),
        ("run:\n  dir: 'a\n  seed: 3\n", "from line 2 on", "    dir: 'a\n         ^"),
        ("train:\n  lr: 1\n epochs: 3", "line 3, column 2: .*same column", "   epochs: 3\n   ^"),
        ("run: {seed: 1}\nrun: {seed: 2}", "line 2, column 1: the key 'run'", "  run: {seed: 2}\n  ^"),
    ],
)
def test_invalid_yaml_is_an_error_of_one_line_with_the_place_and_a_caret(
    tmp_path: Path, text: str, message: str, excerpt: str
) -> None:
    with pytest.raises(ConfigError, match=rf"a\.yaml: not valid YAML: .*{message}") as error:
        load_config(write(tmp_path / "a.yaml", text))
    assert "\n" not in str(error.value)
    assert error.value.excerpt == excerpt


def test_a_section_whose_keys_are_comments_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "train: {epochs: 3}\ndata: {train: {annotations: a.csv}}\n")
    text = "base: base.yaml\ntrain:\n  # epochs: 4\ndata:\n  train:\nmodel:\n"
    config = load_config(write(tmp_path / "a.yaml", text))
    assert (config.train.epochs, config.data.train.annotations) == (3, Path("a.csv"))
    assert config.model == Config().model
    with pytest.raises(ConfigError, match="train: expected a section of keys, each as `key: value`"):
        load_config(write(tmp_path / "b.yaml", "train:\n  epochs:3\n"))


def test_a_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_a_list_is_an_error_and_an_empty_file_has_all_defaults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected sections such as"):
        load_config(write(tmp_path / "list.yaml", "- a\n- b\n"))
    assert load_config(write(tmp_path / "empty.yaml", "# nothing\n")) == Config()


def test_variables_are_replaced_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VA_ROOT", "/videos")
    monkeypatch.delenv("VA_NONE", raising=False)
    text = (
        "data: {root: '${VA_ROOT}/k400', classes: '${VA_NONE:-c.txt}'}\nrun: {dir: '${VA_ROOT:-x}/${VA_NONE:-}run'}\n"
    )
    config = load_config(write(tmp_path / "a.yaml", text))
    assert (config.data.root, config.data.classes) == (Path("/videos/k400"), Path("c.txt"))
    assert config.run.dir == Path("/videos/run")


def test_a_variable_that_is_not_set_is_an_error_with_the_field_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VA_NONE", raising=False)
    path = write(tmp_path / "a.yaml", "data: {val: {annotations: '${VA_NONE}/val.csv'}}\n")
    with pytest.raises(ConfigError, match=r"data\.val\.annotations: .*VA_NONE is not set.*data\.val\.annotations="):
        load_config(path)
    assert load_config(path, ["data.val.annotations=v.csv"]).data.val.annotations == Path("v.csv")


def test_variables_in_overrides_are_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VA_EPOCHS", "9")
    assert load_config(write(tmp_path / "a.yaml", ""), ["train.epochs=${VA_EPOCHS}"]).train.epochs == 9


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_head_comment_loads_dumps_and_builds_a_model(path: Path, tmp_path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("videoadapt" in line for line in head)
    assert any("esult" in line for line in head)
    config = load_config(path)
    assert load_config(write(tmp_path / "dumped.yaml", dump_config(config))) == config
    with torch.device("meta"):
        assert TimeSformer(config.model).points


PUBLIC_CODE: dict[str, dict[str, Any]] = {
    "timesformer_b_k400": {
        "train": {"nesterov": True, "decay": "all", "weights": "ema", "resample": "bicubic"},
        "model": {"drop_path_unit": "sequence"},
        "data": {"antialias": False},
        "evaluate": {"single_clip": "start", "crop_offset": "ceil", "average": "logits"},
    },
    "timesformer_b_ssv2": {
        "data": {"sampling": "segments", "flip": 0.0, "antialias": False},
        "model": {"num_classes": 174, "num_frames": 8},
        "train": {"nesterov": True, "epochs": 15, "milestones": (11.0, 14.0)},
        "evaluate": {"temporal_views": 1, "spatial_crops": 3},
    },
    "timesformer_hr_28_k400": {"train": {"nesterov": True, "decay": "all", "resample": "nearest_flat"}},
    "revit_timesformer_b_k400": {"train": {"nesterov": True, "decay": "all"}, "evaluate": {"average": "logits"}},
    "supervit_deit_s_in1k": {"train": {"weights": "last"}, "data": {"antialias": True}},
    "supervit_lvvit_s_in1k": {
        "loss": {"dense_weight": 1.0, "dense_lengths": "longest"},
        "train": {"weights": "ema", "decay": "matrices"},
        "evaluate": {"crop_offset": "round", "average": "probabilities"},
    },
    "lvvit_s_in1k": {"loss": {"dense_weight": 0.5, "dense_lengths": "all"}},
    "demo": {
        "train": {"nesterov": False, "decay": "matrices"},
        "model": {"drop_path_unit": "clip"},
        "data": {"antialias": True},
        "evaluate": {"single_clip": "centre", "crop_offset": "round", "average": "probabilities"},
    },
}


@pytest.mark.parametrize("name", PUBLIC_CODE)
def test_configs_have_the_settings_of_the_authors_code(name: str) -> None:
    [path] = [path for path in CONFIGS if path.stem == name]
    config = load_config(path).model_dump()
    for section, expected in PUBLIC_CODE[name].items():
        assert {key: config[section][key] for key in expected} == expected


@given(
    lr=st.floats(1e-9, 10),
    seed=st.integers(0, 2**63 - 1),
    milestones=st.lists(st.floats(0.1, 100), max_size=3),
    # `~` at the start means the home folder; tests/config/test_parse.py has such names.
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0$"), min_size=1, max_size=12).filter(
        lambda name: not name.startswith("~")
    ),
)
def test_a_dumped_config_loads_to_an_equal_one(
    tmp_path_factory: pytest.TempPathFactory, lr: float, seed: int, milestones: list[float], name: str
) -> None:
    values = {"train": {"lr": lr, "milestones": milestones, "init": name}}
    config = make_config(values | {"run": {"seed": seed}})
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert yaml.safe_load(dump_config(config))["train"]["init"] == name


# The published costs: facts/costs.md, multiply-adds per view in GMACs, per video of three views in T.

PUBLISHED = {
    "timesformer_b_k400": {"14": (195.8, 0.587), "10": (98.6, 0.296), "7": (48.1, 0.144)},
    "timesformer_hr_k400": {"28": (1702.7, 5.108), "20": (823.7, 2.471), "14": (392.1, 1.176)},
    "timesformer_l_k400": {"14": (2379.9, 7.140)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_agree_with_the_published_costs(name: str, tmp_path: Path) -> None:
    summary = flops(load_config(B_K400.with_name(f"{name}.yaml"), [f"run.dir={tmp_path}"]))
    points = {row["point"]: row for row in summary["points"]}
    assert summary["views_per_video"] == 3
    assert list(points) == list(PUBLISHED[name])[: len(points)] or name.endswith("l_k400")
    for point, (per_view, per_video) in PUBLISHED[name].items():
        assert round(points[point]["macs_per_view"] / 1e9, 1) == per_view
        assert round(points[point]["macs_per_video"] / 1e12, 3) == pytest.approx(per_video, abs=5.1e-4)
        assert points[point]["macs_per_video"] == 3 * points[point]["macs_per_view"]
        assert sum(points[point]["parts"].values()) == points[point]["macs_per_view"]
    assert 0 < summary["assigner_macs"] <= 0.01 * summary["points"][0]["macs_per_view"]
    assert os.listdir(tmp_path) == []  # nothing is written before an evaluation


@pytest.mark.parametrize(
    ("change", "length_10", "length_7"),
    [("model.distill_token=true", 98.95, 48.41), ("model.embed=kernel", 99.06, 48.80)],
)
def test_flops_agree_with_the_costs_of_the_variants(change: str, length_10: float, length_7: float) -> None:
    from videoadapt.config.cost import point_macs

    found = point_macs(load_config(B_K400, [change]).model)
    assert [round(found[p] / 1e9, 2) for p in ("10", "7")] == [length_10, length_7]
    assert round(found["14"] / 1e9, 1) == 195.8


def test_image_models_cost_what_supervit_prints_at_keep_1() -> None:
    from videoadapt.config.cost import point_macs

    config = load_config(B_K400.with_name("deit_s_in1k.yaml"), ["model.points=[14,12,10,8]"])
    assert [round(v / 1e9, 2) for v in point_macs(config.model).values()] == [4.60, 3.32, 2.27, 1.44]


def test_a_model_of_one_point_needs_no_assigner(tmp_path: Path) -> None:
    summary = flops(load_config(B_K400, ["model.points=14", f"run.dir={tmp_path}"]))
    assert summary["assigner_macs"] is None


def test_config_errors_are_user_errors() -> None:
    assert issubclass(ConfigError, UserError)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.distill_token=true", "loss.lam=0"], "no loss trains its head if loss.lam is 0"),
        (
            ["model.points=[14@0.3,12]", "loss.dropped=ce", "model.distill_token=true"],
            "is not of the longest length; add 14",
        ),
        (["evaluate.cascade=['9,14:0.6']"], "different points of this model"),
        (["evaluate.cascade=['cascade:7,14:0.9']"], "evaluate.cascade: expected 7,14:0.9 without cascade:"),
        (["evaluate.leap=9:cost=0.5"], "evaluate.leap: leap '9:cost=0.5'"),
        (["evaluate.cascade=['7,14:60']"], "thresholds from 0 to 1"),
        (["evaluate.cascade=['7,14:0.6:prob']"], "a measure of probability, margin, entropy"),
        (["evaluate.cascade=['7,14:0.6','7,14:0.6']"], "expected different cascades"),
    ],
)
def test_contradictions_of_points_heads_and_cascades_are_errors(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(next(path for path in CONFIGS if path.name == "timesformer_b_k400.yaml"), words)


def test_a_file_named_best_does_not_change_which_checkpoint_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best").touch()
    assert with_absolute_paths(make_config({"run": {"checkpoint": "best"}})).run.checkpoint == Path("best")
