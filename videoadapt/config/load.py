"""Typed configs: YAML files, `base:` inheritance, `section.key=value` overrides, and errors that name the field.

All stages of a run share one config and one run folder (`run.dir`). A config is checked as a whole when it is loaded,
so that a contradiction is refused before any work.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from videoadapt.config.cascade import parse_cascade_spec
from videoadapt.config.points import Point
from videoadapt.config.sections import (
    AssignConfig,
    DataConfig,
    EvaluateConfig,
    IndexConfig,
    LabelConfig,
    LaunchConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PlanConfig,
    RunConfig,
    Section,
    SlurmConfig,
    TrainConfig,
)
from videoadapt.errors import ConfigError


class Config(Section):
    """Everything that one run needs; `load_config` makes it from a YAML file."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    index: IndexConfig = IndexConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    plan: PlanConfig = PlanConfig()
    label: LabelConfig = LabelConfig()
    assign: AssignConfig = AssignConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    parallel: ParallelConfig = ParallelConfig()
    launch: LaunchConfig = LaunchConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        short, model = self.data.short_side, self.model
        if short and not model.size <= short[0] <= short[1]:
            raise ConfigError(
                f"data.short_side: expected [LOW, HIGH] with model.size {model.size} <= LOW <= HIGH, got {list(short)}"
            )
        if self.data.crop_area and (short or not self.data.crop_area[0] <= self.data.crop_area[1] <= 1.0):
            raise ConfigError(
                f"data.crop_area: expected [LOW, HIGH] with LOW <= HIGH <= 1, and data.short_side=null, got "
                f"{list(self.data.crop_area)} and {short and list(short)}"
            )
        _check_token_labels(self.data, model)
        if self.label.source == "holdout" and self.data.holdout == 0.0:
            raise ConfigError(
                "label.source: holdout needs data.holdout above 0, the share of clips kept out of stage 1"
            )
        if self.assign.frames > model.num_frames:
            raise ConfigError(
                f"assign.frames: {self.assign.frames} is more than a clip has (model.num_frames {model.num_frames})"
            )
        if self.data.mixes and (self.train.batch // self.train.accumulate) % 2:
            raise ConfigError(
                f"train.batch: {self.train.batch} clips in {self.train.accumulate} parts (train.accumulate) are an odd "
                "number in each, but mixup and cutmix take clips in pairs"
            )
        if isinstance(self.parallel.groups, dict):
            _check_groups(self.parallel.groups, model.lengths)
        if self.loss.hard and self.loss.tau != 1.0:
            raise ConfigError("loss.tau: has no effect on hard targets; leave it at 1.0 or set loss.hard=false")
        self._check_teachers()
        self._check_distillation()
        for text in self.evaluate.cascade:
            parse_cascade_spec(text, model.points)
        if len(set(self.evaluate.cascade)) < len(self.evaluate.cascade):
            raise ConfigError(f"evaluate.cascade: expected different ones, got {list(self.evaluate.cascade)}")
        return self

    def _check_distillation(self) -> None:
        """The head of the distillation token enters the answer, so something must train it."""
        model = self.model
        if not model.distill_token or len(model.points) == 1:
            return
        if self.loss.lam == 0.0:
            raise ConfigError(
                "model.distill_token: nothing trains its head where loss.lam is 0; set model.distill_token=false"
            )
        if Point.parse(model.points[0]).length != model.lengths[0]:
            raise ConfigError(
                f"model.distill_token: the costliest point teaches and has no such token, but here it is "
                f"{model.points[0]}, which is not of the longest length; add {model.lengths[0]}"
            )

    def _check_teachers(self) -> None:
        """Where a length is needed at keep 1, it must be among the points."""
        for point in map(Point.parse, self.model.points):
            if str(point.length) in self.model.points:
                continue
            if self.train.draw == "sampled":
                raise ConfigError(
                    f"train.draw: sampled draws each length at keep 1, but model.points lacks {point.length}"
                )
            if self.loss.dropped == "kl":
                raise ConfigError(
                    f"loss.dropped: kl makes {point} learn from {point.length}, which is not among model.points; add "
                    "it, or set loss.dropped=ce"
                )


_MOST_MAP_CLASSES = 2048  # float16 has all whole numbers up to there


def _check_token_labels(data: DataConfig, model: ModelConfig) -> None:
    if (data.mix_token or data.token_labels) and (data.mixup or data.cutmix):
        raise ConfigError(
            "data.mixup, data.cutmix: they mix pixels and whole labels; set both to 0, or neither data.mix_token nor "
            "data.token_labels"
        )
    if data.token_labels and (model.dense_head is None or model.num_frames != 1):
        raise ConfigError(
            "data.token_labels: needs a head on patches that learns them, such as model.dense_head=0.25, and "
            "model.num_frames=1: label maps are of images"
        )
    if data.token_labels and model.num_classes > _MOST_MAP_CLASSES:
        raise ConfigError(
            f"data.token_labels: label maps are kept in float16, which numbers {_MOST_MAP_CLASSES} classes exactly, "
            f"but model.num_classes is {model.num_classes}; leave data.token_labels out"
        )


def _check_groups(groups: dict[str, int], lengths: tuple[int, ...]) -> None:
    named = [text for key in groups for text in key.split("+")]
    wanted = sorted(map(str, lengths), key=int, reverse=True)
    if sorted(named) != sorted(wanted):
        raise ConfigError(
            f"parallel.groups: {groups}: expected each length of model.points ({', '.join(wanted)}) once, as a key "
            "or in one such as 10+7; all keeps of a length are trained where the length is, for it teaches them"
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file, with `section.key=value` overrides (values in YAML syntax).

    A file may name another one to start from (`base: other.yaml`, relative to itself). `${NAME}` and `${NAME:-default}`
    in strings stand for environment variables. Raises `ConfigError`, naming the file or field.
    """
    values = _read(Path(path))
    for override in overrides:
        _apply(values, override)
    return make_config(_expand(values, ""), str(path))


def make_config(values: dict[str, Any], origin: str = "config") -> Config:
    """A checked config from nested dicts. Raises `ConfigError`: one line for each field that is wrong."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e) for e in error.errors()) + f" (in {origin})") from None


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"{path}: starts from itself; its chain of `base:` goes round in a circle")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this config: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` and `train:`, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name of another config file, got {base!r}")
    return _merge(_read(path.parent / base, (*above, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not sections or not name:
        raise ConfigError(f"override {override!r}: expected section.key=value, such as train.epochs=5")
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, dict) else {}
        values = values[section]
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[name] = text


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand(value: Any, field: str) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, f"{field}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, field) for v in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]  # as in a shell: set but empty is not set
        if found is None:
            raise ConfigError(f"{field}: environment variable {match[1]} is not set; set it, or pass {field}=...")
        return found

    return _VARIABLE.sub(lookup, value)


def _explain(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, [*Config.model_fields, *known_keys()], n=1, cutoff=0.0)
        return f"unknown key {field}; did you mean {near[0]}?"
    message = error["msg"].removeprefix("Value error, ")
    return (
        message
        if error["type"] == "value_error"
        else f"{field}: {message[0].lower() + message[1:]}, got {error['input']!r}"
    )


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All keys that a config may have, as `section.key`."""
    return list(_walk(section, prefix))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _walk(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


S = TypeVar("S", bound=Section)


def parse_settings(kind: type[S], bench: str, words: Sequence[str]) -> S:
    """Settings from `key=value` words, in YAML syntax. Raises `ConfigError`, naming benchmark and key."""
    values = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in kind.model_fields:
            raise ConfigError(f"{bench}: unknown key {key}; expected one of {', '.join(kind.model_fields)}")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key] = text
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{bench}: {_explain_setting(e)}" for e in error.errors())) from None


def _explain_setting(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    field = error["loc"][0] if error["loc"] else None
    return f"{field}: {message}, got {error['input']!r}" if field else message
