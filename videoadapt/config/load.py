"""Loads a config: YAML files with `base:` inheritance, `section.key=value` overrides, errors that name the field.

All stages of a run share one config and one run folder (`run.dir`). The whole config is checked when it is loaded, so
that a contradiction between two fields is an error before any work starts.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError, model_validator

from videoadapt.config.cascade import parse_cascade_spec, parse_leap_spec
from videoadapt.config.jobs import SlurmConfig
from videoadapt.config.parse import MAX_CONFIG_BYTES, MAX_DEPTH, NULLS, WrittenDict, WrittenList, parse_yaml, read_text
from videoadapt.config.points import Point
from videoadapt.config.sections import (
    TOP5,
    AssignConfig,
    CalibrateConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    IndexConfig,
    LabelConfig,
    LaunchConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PlanConfig,
    RunConfig,
    Section,
    ServeConfig,
    TrainConfig,
    is_path,
    is_section,
)
from videoadapt.config.suggest import suggest_keys
from videoadapt.errors import ConfigError, few, shown

Values: TypeAlias = dict[str, Any]  # sections, keys and values as YAML gives them, not yet checked
S = TypeVar("S", bound=Section)
S2 = TypeVar("S2", WrittenDict, WrittenList)

RUN_CONFIG = "config.yaml"  # the config in a run folder, which its stages write (`runtime/run_config.py`)
RUN_MARK = "# Written by videoadapt: the config of this run (docs/run_folder.md).\n"  # its first line
_MAX_MAP_CLASSES = 2048  # float16 represents each integer up to this one exactly
_MAX_ERRORS = 8  # wrong fields that one message names
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 4095, 255  # Linux' limits of a path and of each name in it
_MAX_BASES = 20  # files that start from each other
# ${NAME} and ${NAME:-default}; in a path also $NAME. A second dollar sign before it makes it plain text.
_IN_BRACES = r"\$?\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}"
_VARIABLE = re.compile(_IN_BRACES)
_VARIABLE_IN_PATH = re.compile(_IN_BRACES + r"|\$?\$(?P<bare>[A-Za-z_]\w*)")


class Config(Section):
    """All settings of a run. `load_config` makes it from a YAML file."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    index: IndexConfig = IndexConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    plan: PlanConfig = PlanConfig()
    label: LabelConfig = LabelConfig()
    assign: AssignConfig = AssignConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    parallel: ParallelConfig = ParallelConfig()
    serve: ServeConfig = ServeConfig()
    launch: LaunchConfig = LaunchConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        _check_crops(self.data, self.model.size)
        _check_token_labels(self.data, self.model)
        if self.label.source == "holdout" and self.data.holdout == 0.0:
            raise ConfigError(
                "label.source: holdout needs data.holdout above 0, the fraction of the clips kept out of stage 1"
            )
        if self.data.holdout + self.data.calibrate >= 1.0:
            raise ConfigError(
                f"data.calibrate: {self.data.calibrate:g} and data.holdout {self.data.holdout:g} leave no video "
                "of train for stage 1; expected a sum below 1"
            )
        _check_validation(self.run, self.data, self.train, self.model)
        if isinstance(self.train.freeze, int) and self.train.freeze > self.model.depth:
            raise ConfigError(f"train.freeze: {self.train.freeze} is more than model.depth {self.model.depth}")
        if "frames" not in self.assign.model_fields_set:
            frames = min(self.assign.frames, self.model.num_frames)  # an image has one
            # As in ModelConfig, the only way to set a field of a frozen object.
            object.__setattr__(self, "assign", self.assign.model_copy(update={"frames": frames}))
        if self.assign.frames > self.model.num_frames:
            raise ConfigError(
                f"assign.frames: {self.assign.frames} is more than the frames of a clip (model.num_frames "
                f"{self.model.num_frames})"
            )
        _check_pairs(self.data, self.train)
        _check_groups(self.parallel.groups, self.model)
        if self.loss.hard and self.loss.tau != 1.0:
            raise ConfigError("loss.tau: has no effect on hard targets; leave it at 1.0 or set loss.hard=false")
        _check_teachers(self.model, self.loss, self.train)
        _check_distillation(self.model, self.loss)
        _check_cascades(self.evaluate, self.model.points)
        return self

    def __repr__(self) -> str:
        model = self.model
        size = f"{model.num_frames} frames of {model.size}x{model.size}, {model.num_classes} classes"
        return f"<Config of {self.run.dir}: points {', '.join(model.points)}; {size}>"

    __str__ = __repr__  # pydantic's lists all keys, on one line


ConfigSource: TypeAlias = Config | str | Path  # what functions for Python users take: see `as_config`


def _check_crops(data: DataConfig, size: int) -> None:
    short = data.short_side
    if short and not size <= short[0] <= short[1]:
        raise ConfigError(
            f"data.short_side: expected [LOW, HIGH] with model.size {size} <= LOW <= HIGH, got {list(short)}"
        )
    if data.crop_area and (short or not data.crop_area[0] <= data.crop_area[1] <= 1.0):
        raise ConfigError(
            f"data.crop_area: expected [LOW, HIGH] with LOW <= HIGH <= 1, and data.short_side=null, got "
            f"{list(data.crop_area)} and {short and list(short)}"
        )


def _check_validation(run: RunConfig, data: DataConfig, train: TrainConfig, model: ModelConfig) -> None:
    if run.checkpoint == Path("best") and not train.validate_every:
        raise ConfigError("run.checkpoint: best is by the validations while training; set train.validate_every=1")
    if train.patience is not None and data.validate != "holdout" and data.val.annotations is None:
        raise ConfigError(
            "train.patience: needs videos to validate on; set data.val.annotations or data.validate=holdout, or "
            "train.patience=null"
        )
    if data.validate == "holdout" and train.validate_every and data.holdout == 0.0:
        raise ConfigError("data.validate: holdout needs data.holdout above 0, the fraction of train that is kept out")
    if train.best_metric is None:
        return
    name, slash, point = train.best_metric.partition("/")
    names = ("top1", "top5", "loss") if model.num_classes > TOP5 else ("top1", "loss")
    if name not in names or (slash and point not in model.points):
        raise ConfigError(
            f"train.best_metric: expected {' or '.join(names)}, alone or with a point of the model "
            f"({few(model.points)}), such as {names[0]}/{model.points[-1]}, got {shown(train.best_metric)}"
        )


def _check_token_labels(data: DataConfig, model: ModelConfig) -> None:
    # mixup and cutmix mix one label per image; token labels and mix_token have one for each patch.
    if (data.mix_token or data.token_labels) and (data.mixup or data.cutmix):
        raise ConfigError(
            "data.mixup, data.cutmix: they mix pixels and whole labels; set both to 0, or do not use data.mix_token "
            "and data.token_labels"
        )
    if data.token_labels and (model.dense_head is None or model.num_frames != 1):
        raise ConfigError(
            "data.token_labels: needs a head on patches that learns them, such as model.dense_head=0.25, and "
            "model.num_frames=1, because label maps are made for images"
        )
    if data.token_labels and model.num_classes > _MAX_MAP_CLASSES:
        raise ConfigError(
            f"data.token_labels: label maps are stored in float16, which represents {_MAX_MAP_CLASSES} class numbers "
            f"exactly, but model.num_classes is {model.num_classes}; leave data.token_labels out"
        )


def _check_pairs(data: DataConfig, train: TrainConfig) -> None:
    # Both clips of a pair must be in the same micro-batch.
    if data.mixes and train.micro_batch % 2:
        raise ConfigError(
            f"train.batch: {train.batch} clips in {train.accumulate} micro-batches (train.accumulate) are an odd "
            "number in each, but mixup and cutmix take clips in pairs"
        )


def _check_groups(groups: str | dict[str, int] | None, model: ModelConfig) -> None:
    if model.shares_stem and groups is not None and (groups == "auto" or len(groups) > 1):
        raise ConfigError(
            "parallel.groups: a stem that all lengths share (model.embed=stem, model.share_patch) needs one group for "
            "all, because its BatchNorms see all clips; set parallel.groups=null"
        )
    if not isinstance(groups, dict):
        return
    given = [length for key in groups for length in key.split("+")]
    expected = sorted(map(str, model.lengths), key=int, reverse=True)
    if sorted(given) != sorted(expected):
        raise ConfigError(
            f"parallel.groups: {groups}: expected each length of model.points ({few(expected)}) once, as a key "
            "or in one such as 10+7. The points with keep < 1 are trained in the group of their length, which has "
            "their teacher"
        )


def _check_teachers(model: ModelConfig, loss: LossConfig, train: TrainConfig) -> None:
    """Checks settings that need each length at keep 1, the teacher of the lower keeps."""
    for point in map(Point.parse, model.points):
        if str(point.length) in model.points:
            continue
        if train.draw == "sampled":
            raise ConfigError(
                f"train.draw: sampled draws each length at keep 1, but model.points does not have {point.length}"
            )
        if loss.dropped == "kl":
            raise ConfigError(
                f"loss.dropped: with kl, {point} learns from {point.length}, which is not in model.points; add it, or "
                "set loss.dropped=ce"
            )


def _check_distillation(model: ModelConfig, loss: LossConfig) -> None:
    """Checks that a loss trains the head of the distillation token, which is part of the logits at inference."""
    if not model.distill_token or len(model.points) == 1:
        return
    if loss.lam == 0.0:
        raise ConfigError(
            "model.distill_token: no loss trains its head if loss.lam is 0; set model.distill_token=false"
        )
    if Point.parse(model.points[0]).length != model.lengths[0]:
        raise ConfigError(
            f"model.distill_token: the costliest point is the teacher and has no distillation token. Here it is "
            f"{model.points[0]}, which is not of the longest length; add {model.lengths[0]} to model.points"
        )


def _check_cascades(evaluate: EvaluateConfig, points: Sequence[str]) -> None:
    parsers: dict[str, Callable[[str, Sequence[str]], object]] = {
        "cascade": partial(parse_cascade_spec, views=evaluate.views),
        "leap": parse_leap_spec,
    }
    for name, parse in parsers.items():
        texts: tuple[str, ...] = getattr(evaluate, name)
        for text in texts:
            if text.startswith(f"{name}:"):  # as `evaluate --policy` takes it
                raise ConfigError(f"evaluate.{name}: expected {text.partition(':')[2]} without {name}:, got {text}")
            try:
                parse(text, points)
            except ConfigError as error:
                raise ConfigError(f"evaluate.{name}: {error}") from None
        if len(set(texts)) < len(texts):
            raise ConfigError(f"evaluate.{name}: expected different {name}s, got {list(texts)}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Loads a config from a YAML file, or the config of a run from its folder.

    A file may start from another file (`base: other.yaml`, relative to its own folder). `${NAME}` and
    `${NAME:-default}` are replaced by environment variables. In paths, `$NAME`, `~` and `~USER` are, too. A second
    dollar sign keeps the first: `$$NAME` is the text `$NAME`.

    Args:
        path: The YAML file, or a folder with `config.yaml`. If a run has recorded it, `run.dir` is its folder, also if
            it was moved or copied since.
        overrides: Texts `section.key=value`. A value in brackets or quotes is YAML; every other value is text, which
            the type of the key gives its meaning. They replace values of the file. Later texts replace earlier ones.

    Raises:
        ConfigError: A file cannot be read, or fields are wrong. The message names the file and the wrong fields.
    """
    source = Path(path)
    if source.name == RUN_CONFIG and is_recorded(source):
        source = source.parent  # the file of a run that was copied means the copy, as its folder does
    values = _read_folder(source) if source.is_dir() else _read_with_base(source)
    for override in overrides:
        _apply_override(values, override)
    return make_config(_expand(values, "", Config), f"{path} or the overrides" if overrides else str(path))


def as_config(source: ConfigSource) -> Config:
    """Returns a config as it is, or loads it from a YAML file or a run folder; see `load_config`."""
    return source if isinstance(source, Config) else load_config(source)


def make_config(values: Values, origin: str = "config") -> Config:
    """Checks nested dicts and returns them as a `Config`.

    Args:
        values: Sections, each a dict of keys and values. A missing key gets its default.
        origin: The source of the values, for the error message.

    Raises:
        ConfigError: Fields are wrong. The message names all of them, in one line.
    """
    return _validate(Config, values, f" (in {origin})")


def parse_settings(kind: type[S], command: str, words: Sequence[str]) -> S:
    """Parses the settings of a benchmark. They are not part of a config.

    Args:
        kind: A section with the settings.
        command: The name of the benchmark, for error messages.
        words: Texts `key=value`, with the value in YAML syntax.

    Raises:
        ConfigError: A key is unknown or a value is wrong.
    """
    values: Values = {}
    try:
        for word in words:
            keys, value = _parse_override(word, 1, "rounds=5", kind)
            values[".".join(keys)] = value
        return _validate(kind, _expand(values, "", kind))
    except ConfigError as error:
        raise ConfigError(f"{command}: {error}") from None


def dump_config(config: Config) -> str:
    """Returns the config as YAML, from which `load_config` makes an equal config."""
    return yaml.safe_dump(_escaped(config.model_dump(mode="json"), Config), sort_keys=False)


def config_folder() -> Path:
    """Returns the folder of the configs that come with the package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def dump_value(key: str, value: Any) -> str:
    """Returns the value of a key as YAML in one line, from which `load_config` reads an equal value."""
    text = yaml.safe_dump(_escaped(value, _type_of(key.split("."), Config)), default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def known_keys(section: type[Section] = Config) -> list[str]:
    """Returns all keys of a config (or of one section), as `section.key`."""
    return list(_walk_keys(section, ""))


def _walk_keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if is_section(kind):
            yield from _walk_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _validate(kind: type[S], values: Values, suffix: str = "") -> S:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        messages = [_error_message(kind, each) for each in found[:_MAX_ERRORS]]
        more = [f"and {len(found) - _MAX_ERRORS} more"] if len(found) > _MAX_ERRORS else []
        raise ConfigError("; ".join(messages + more) + suffix) from None


def _error_message(kind: type[Section], error: Any) -> str:
    """Returns one error of pydantic as one clause of a sentence, without pydantic's error codes and links."""
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        field = field[:_MAX_NAME_BYTES]
        return f"unknown key {field}; {remedy_for_key(field, kind)}"
    if error["type"] == "model_type":
        return f"{field}: expected a section of keys, each as `key: value` in its own line, got {shown(error['input'])}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":  # raised by our own checks, whose messages name the field and the value
        return message
    return f"{field}: {message[0].lower() + message[1:]}, got {shown(error['input'])}"


def with_absolute_paths(config: Config) -> Config:
    """Returns the config for use in any working directory: each relative path that exists is absolute.

    A text that names no file stays as it is: it may be the name of a timm model (`train.init`) or of a set of classes
    (`data.classes`).
    """

    def absolute(text: str) -> str:
        return os.path.abspath(text) if os.path.exists(text) else text

    values = _map_paths(config.model_dump(mode="json"), Config, absolute)
    values["run"]["dir"] = os.path.abspath(config.run.dir)
    if config.data.classes is not None and not config.data.classes.is_file():
        values["data"]["classes"] = str(config.data.classes)  # a set of classes, also beside a folder of its name
    if config.run.checkpoint in (Path("best"), Path("last")):  # words, also beside a file of that name
        values["run"]["checkpoint"] = str(config.run.checkpoint)
    return Config.model_validate(values)


def _map_paths(value: Any, kind: Any, change: Callable[[str], str]) -> Any:
    """Changes all paths in nested dicts and lists, in place, and returns the value; `kind` is its type."""
    if isinstance(value, dict):
        value.update({k: _map_paths(each, _types(kind).get(k, kind), change) for k, each in value.items()})
    elif isinstance(value, list):
        value[:] = [_map_paths(each, kind, change) for each in value]
    elif isinstance(value, str) and is_path(kind):
        return change(value)
    return value


def is_recorded(path: Path) -> bool:
    """Returns whether a stage has written this config into a run folder, and not a person."""
    try:
        return read_text(path, MAX_CONFIG_BYTES).startswith(RUN_MARK)
    except (OSError, ValueError):  # ValueError: no UTF-8
        return False


def _read_folder(folder: Path) -> Values:
    """Reads the config in a folder. Paths below the recorded place of a run are moved to its present place."""
    if not (folder / RUN_CONFIG).exists():
        runs = sorted(path.parent for path in folder.glob(f"*/{RUN_CONFIG}"))
        raise ConfigError(
            f"{folder}: a folder without {RUN_CONFIG}; expected a YAML file, or the folder of a run, in which `index` "
            f"or `train` has written {RUN_CONFIG}{f', such as {few(runs)}' if runs else ''}"
        )
    if not is_recorded(folder / RUN_CONFIG):
        return _read_with_base(folder / RUN_CONFIG)
    values = _read_yaml(folder / RUN_CONFIG)
    run = values.setdefault("run", {})
    if not isinstance(run, dict):
        return values  # the check of the values names this error
    recorded, present = str(run.get("dir")), str(_escaped(str(folder), Path))

    def moved(text: str) -> str:
        return present + text[len(recorded) :] if text.startswith(f"{recorded}/") else text

    _map_paths(values, Config, moved)
    run["dir"] = present
    return values


def remedy_for_key(wrong: str, kind: type[Section] = Config) -> str:
    """Returns what to do about an unknown key: a similar one, or where to find all."""
    known = known_keys(kind)
    if similar := suggest_keys(wrong, known):
        return f"did you mean {' or '.join(similar)}?"
    if kind is not Config:
        return f"the keys are {', '.join(known)}"
    section = wrong.partition(".")[0]
    return f"`videoadapt config{f' {section}' if section in Config.model_fields else ''}` lists the keys"


def _read_with_base(path: Path, children: tuple[Path, ...] = ()) -> Values:
    """Reads a file and its `base:` files. `children` are the files whose `base:` led to this one."""
    if path.resolve() in children:
        raise ConfigError(f"{path}: starts from itself; its `base:` entries form a circle")
    if len(children) == _MAX_BASES:
        raise ConfigError(f"{path}: more than {_MAX_BASES} files start from each other with `base:`")
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name of another config file, got {shown(base)}")
    base = _expand_text(base, f"{path}: base", in_path=True)
    return _merge(_read_with_base(path.parent / base, (*children, path.resolve())), values, Config)


def _read_yaml(path: Path) -> Values:
    try:
        content = parse_yaml(read_text(path, MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config or run folder") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this config: {error.strerror}") from None
    except ValueError as error:  # YamlError, or UnicodeDecodeError
        raise ConfigError(f"{path}: not valid YAML: {error}", getattr(error, "excerpt", "")) from None
    values = {} if content is None else content  # an empty file
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` and `train:`, got {shown(values)}")
    return values


def _merge(base: Values, values: Values, kind: Any) -> Values:
    """Merges sections of a type, and `slurm.extra`, key by key. An empty section changes nothing.

    Every other value is replaced: lists, and `parallel.groups`, whose keys are one partition of the lengths.
    """
    merged = dict(base)
    for key, value in values.items():
        old, inner = merged.get(key), _types(kind).get(key)
        if _is_merged(inner) and isinstance(old, dict) and isinstance(value, dict | None):
            merged[key] = _merge(old, value or {}, inner)
        else:
            merged[key] = value
    return merged


def _is_merged(kind: Any) -> bool:
    """Returns whether a field of this type keeps the keys of a base that a file does not name."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return is_section(plain) or get_origin(plain) is dict


def _apply_override(values: Values, override: str) -> None:
    (*sections, name), value = _parse_override(override, 2, "train.epochs=5", Config)
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, dict) else {}
        values = values[section]
    values[name] = value


def _parse_override(override: str, min_keys: int, example: str, kind: type[Section]) -> tuple[list[str], Any]:
    """Splits `key.key=value` into keys and value.

    A value in brackets or quotes is read as YAML, if it is valid. Every other value is text as it stands: YAML would
    cut `fix #12` at the `#`, and read `job: 7` as a section.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if equals and min_keys > 1 == len(keys) and (similar := [k for k in suggest_keys(path, known_keys()) if "." in k]):
        meant = " or ".join(shlex.quote(f"{key}={text}") for key in similar)
        raise ConfigError(f"override {shown(override)}: a key has its section before it; did you mean {meant}?")
    if not equals or not min_keys <= len(keys) <= MAX_DEPTH or not all(keys):
        form = "section.key=value" if min_keys > 1 else "key=value"
        raise ConfigError(f"override {shown(override)}: expected {form}, such as {example}")
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        with suppress(ValueError):
            return keys, parse_yaml(text)
    if text == "~" and is_path(_type_of(keys, kind)):
        return keys, text  # the home folder; in a YAML file, a `~` without quotes is null
    return keys, None if text in NULLS else text


def _type_of(keys: Sequence[str], kind: Any) -> Any:
    """Returns the type of the field of a section; None if there is no such field."""
    for key in keys:
        kind = _types(kind).get(key)
    return kind


@cache
def _types(kind: Any) -> dict[str, Any]:
    """Returns the types of the fields of a section by name; nothing for any other type."""
    return get_type_hints(kind, include_extras=True) if is_section(kind) else {}


def _expand(value: Any, field: str, kind: Any) -> Any:
    """Replaces variables, and `~` in paths, in all texts of nested dicts and lists.

    Args:
        value: A value of a config, not yet checked.
        field: Its keys, for error messages.
        kind: Its type; None if it is unknown.
    """
    if isinstance(value, dict):
        types = _types(kind)
        inner = {k: _expand(each, f"{field}.{k}".lstrip("."), types.get(k, kind)) for k, each in value.items()}
        return _with_text(WrittenDict(inner), value, field, kind)
    if isinstance(value, list):
        return _with_text(WrittenList(_expand(each, field, kind) for each in value), value, field, kind)
    return _expand_text(value, field, in_path=is_path(kind)) if isinstance(value, str) else value


def _with_text(expanded: S2, written: Any, field: str, kind: Any) -> S2:
    if text := getattr(written, "text", ""):
        expanded.text = _expand_text(text, field, in_path=is_path(kind))
    return expanded


def _expand_text(text: str, field: str, *, in_path: bool) -> str:
    def lookup(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        groups = match.groupdict()
        name = groups["name"] or groups["bare"]
        # As with `:-` in a shell, a variable that is set to an empty string counts as not set.
        found = os.environ.get(name) or groups["default"]
        if found is None:
            raise ConfigError(
                f"{field}: environment variable {name} is not set; set it, or pass {field}=..., or write ${match[0]} "
                "if the dollar sign is part of the text"
            )
        return found

    expanded = (_VARIABLE_IN_PATH if in_path else _VARIABLE).sub(lookup, text)
    _require_text(expanded, field)
    return _expand_home(expanded, field) if in_path else expanded


def _expand_home(text: str, field: str) -> str:
    path = os.path.expanduser(text) if text.startswith("~") else text
    if path.startswith("~"):
        raise ConfigError(f"{field}: {shown(text)}: no such user; write ./{text} if the name begins with `~`")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES or any(len(os.fsencode(n)) > _MAX_NAME_BYTES for n in path.split("/")):
        raise ConfigError(
            f"{field}: expected a path of at most {_MAX_PATH_BYTES} bytes, each name in it of at most "
            f"{_MAX_NAME_BYTES}, got {shown(text)}"
        )
    return path


def _require_text(text: str, field: str) -> None:
    """Raises ConfigError for characters that no path, no file in UTF-8 and no command can have."""
    try:
        if "\0" not in text.encode().decode():
            return
    except UnicodeEncodeError:  # half of a surrogate pair, or a byte of the command line that is not UTF-8
        pass
    raise ConfigError(f"{field}: expected text in UTF-8 without NUL characters, got {shown(text)}")


def _escaped(value: Any, kind: Any) -> Any:
    """Returns values that `_expand` turns into `value`."""
    if isinstance(value, dict):
        return {key: _escaped(each, _types(kind).get(key, kind)) for key, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each, kind) for each in value]
    if not isinstance(value, str):
        return value
    in_path = is_path(kind)
    text = (_VARIABLE_IN_PATH if in_path else _VARIABLE).sub(lambda match: f"${match[0]}", value)
    return f"./{text}" if in_path and text.startswith("~") else text
