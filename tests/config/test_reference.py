"""The reference of keys, and the schema for editors: complete, current, and as generous as the loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

import write_config_reference as writer
from videoadapt.config.load import Config, known_keys, load_config, make_config
from videoadapt.config.parse import parse_yaml
from videoadapt.config.reference import SCHEMA_FILE, describe, editor_schema
from videoadapt.errors import ConfigError

CONFIGS = sorted(SCHEMA_FILE.parent.rglob("*.yaml"))
SCHEMA = jsonschema.Draft7Validator(editor_schema())


def errors(text: str) -> list[str]:
    values: Any = json.loads(json.dumps(yaml.safe_load(text)))  # names in JSON are text, as editors read them
    return [error.message for error in SCHEMA.iter_errors(values)]


def test_the_page_and_the_schema_are_what_the_fields_say() -> None:
    remedy = "run python tools/write_config_reference.py"
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(describe()), remedy
    # Versions of pydantic differ in the order of the names.
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json.loads(writer.schema()), remedy


def test_every_key_is_described_in_sentences() -> None:
    keys = [key for section in describe() for key in section.keys]
    assert [key.name for key in keys] == [key for key in known_keys() if ".stages." not in key] + ["slurm.stages"]
    assert [key.name for key in keys if not key.description.endswith((".", ")"))] == []


def test_a_default_reads_back() -> None:
    for section in describe():
        for key in section.keys:
            default: Any = parse_yaml(key.default)
            for name in reversed(key.name.split(".")):
                default = {name: default}
            assert make_config(default) == Config(), key.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_find_the_schema_and_no_error_in_a_config(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert errors(text) == []
    words, _, schema = text.partition("\n")[0].partition("=")
    assert words == "# yaml-language-server: $schema"
    assert (path.parent / schema).samefile(SCHEMA_FILE)


@pytest.mark.parametrize(
    "text",
    [
        "model: {points: 14}",
        "model: {points: [14, 14@0.7, 7]}",
        "train:\nmodel: {depth: 12}",
        "train: {milestones: [11, 14.5], ema: null, init: vit_small_patch16_224}",
        "train: {lr: '${LR}', betas: ['${B}', 0.9]}\nrun: {dir: $HOME/x, seed: '${SEED}'}",
        "slurm: {time_minutes: '4:00:00', exclude: [n01, n02], account: 1234, setup: module load cuda}",
        "slurm: {time_minutes: 1-12, constraint: [a100|h100], stages: {assign: {gpus_per_task: 0}}}",
        "slurm: {gpus_per_node: 4, mail_type: 'END,FAIL', extra: {exclusive: true, nodelist: n07}}",
        "parallel: {groups: {14: 2, 10+7: 1}, shard: 0/4}",
        "data: {workers: auto, root: ~/k400, val: {annotations: 2024}}\nevaluate: {cascade: '10,14:0.6'}",
    ],
)
def test_the_schema_accepts_what_the_loader_accepts(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LR": "0.1", "B": "0.5", "SEED": "3"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a.yaml").write_text(text)
    load_config(tmp_path / "a.yaml")
    assert errors(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "model: {lenght: 3}",
        "train: {epochs: many}",
        "train: {epochs: 0}",
        "train: {optimizer: adam}",
        "train: {betas: [0.9]}",
        "train: {nesterov: 3}",
        "epochs: 3",
        "train: 3",
        "data: {train: a.csv}",
        "slurm: {time_minutes: tomorrow}",
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        make_config(yaml.safe_load(text))
    assert errors(text)
