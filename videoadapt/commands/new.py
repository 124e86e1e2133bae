"""`videoadapt new`: looks at a folder of data, and writes a config for fine-tuning on it, with the reasons.

The config is `configs/finetune_template.yaml` with other values and a reason beside each; the explanations of the keys
stand only in the template.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from videoadapt.commands.recommend import SPEED_S, Alternative, MachineFacts, Setting, crops, points_of, recommend
from videoadapt.config.load import Config, config_folder, dump_value, load_config, make_config
from videoadapt.config.parse import parse_yaml
from videoadapt.data.index.survey import Survey, survey
from videoadapt.errors import UserError, few, one_line, plural
from videoadapt.model.weights.facts import WeightsFacts, weights_facts
from videoadapt.performance.memory import training_memory
from videoadapt.performance.timing import bf16_is_fast, time_of, training_speed
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.learn_then_test import videos_needed
from videoadapt.runtime.console import duration, print_table, say
from videoadapt.runtime.files import replacing
from videoadapt.runtime.machine import available_cpus, busy, pick_device

_TEMPLATE = config_folder() / "finetune_template.yaml"
_LINE = re.compile(r"(?P<indent> *)(?P<key>[a-z_]+):.*")  # of the template; comments have their own lines
_PAGES = "# Change what you like. docs/finetune.md says how to choose, docs/config.md has all keys."
_OF_VIDEOS = ("data.short_side", "model.stride_frames", "model.fps")  # a config for images does without them
# Values that agree with nearly all others: no crops, room for every point, and clips for every stage.
_ALLOW_ALL = ("label.source=train", "data.holdout=1e-9", "data.short_side=null", "model.size=16384", "model.patch=2")
_FEW_EPOCHS = 4
_FEW_STEPS = 100  # of a training: below, its curves are mostly chance
_BUSY = 1.3  # slowdown of the machine from which it is said
_ROUND_MIN = 10  # minutes from which they are shown whole
_MEMORY_USED = 0.8  # of a GPU's memory, at most: the prediction does not count what CUDA itself needs


@dataclass(frozen=True)
class NewRun:
    """A config that was written."""

    config: Path
    run: Path  # the run folder
    data: Survey
    weights: str | None  # names the source and its layout, and says what the source says of itself
    machine: MachineFacts
    seconds: dict[str, float]  # by stage, on an idle machine, without reading the videos
    minutes: float  # for training on an idle machine; the settings were chosen for it
    alternatives: list[Alternative]  # other inputs, and the time that they take
    notes: list[str]
    commands: list[str]  # what to run next


def new(
    folder: Path,
    data: Path,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    *,
    minutes: float | None = None,
) -> NewRun:
    """Writes `config.yaml` for a run on a folder of data.

    Args:
        folder: Receives `config.yaml`, and lists and class names if the data have none. It is created.
        data: The data; see `survey`.
        weights: A file, a folder, or the name of a timm model.
        overrides: Texts `section.key=value`; they replace what would be chosen.
        minutes: The time that training may take on an idle machine; see `recommend`.

    Raises:
        UserError: `folder` has a config already, or other lists or class names than would be written, or the data or
            the weights cannot be used. Nothing is written then.
    """
    path = Path(os.path.abspath(folder)) / "config.yaml"
    if path.exists():
        raise UserError(f"{path} exists, and is never overwritten; name another folder, or move it away")
    facts = None if weights is None else weights_facts(_source(weights))
    said = _wanted(overrides, facts)
    wanted = said.data
    # A folder may have the name of a set of classes.
    classes = str(wanted.classes.absolute() if wanted.classes.is_file() else wanted.classes) if wanted.classes else None
    found = survey(Path(os.path.abspath(data)), path.parent, wanted.kind, classes, wanted.source_pattern)
    _require_unlike(path.parent, found.files)
    machine = measure_machine(found, facts)
    holdout = wanted.holdout if "data.holdout" in _given(overrides) else None
    chosen = recommend(found, facts, machine, minutes, holdout=holdout, calibrate=wanted.calibrate)
    settings = {
        **_agreeing(chosen.settings, said, _given(overrides), found),
        "run.dir": Setting(str(path.parent / "run"), "beside this file"),
        "train.init": Setting(weights and _source(weights), "" if weights else "no weights were given"),
    }
    # In one line: the name of a folder may have line breaks, which would end the comment.
    header = f"# Written by `videoadapt new` on {date.today()}: fine-tuning on {one_line(os.path.abspath(data))}."
    # The survey has used data.classes; a drawn val split comes with a file of its own.
    config, text = _checked(
        header, settings, [word for word in overrides if not word.startswith("data.classes")], machine, path
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, content in {**found.files, "config.yaml": text}.items():
        with replacing(path.parent / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return NewRun(
        config=path,
        run=config.run.dir,
        data=replace(found, files={}),
        weights=f"{facts.label}; {facts.origin}" if facts else None,
        machine=machine,
        seconds=_by_stage(chosen.seconds | _assign_s(config, found.clips("train")), config),
        minutes=chosen.minutes,
        alternatives=chosen.alternatives,
        notes=_notes(found, facts, config),
        commands=_commands(path, found, config),
    )


def _require_unlike(folder: Path, files: Mapping[str, str]) -> None:
    """Raises `UserError` if a file would be replaced by another text: it may be the user's own list."""
    for name, text in files.items():
        path = folder / name
        if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == text.encode()):
            raise UserError(
                f"{path} exists, and `new` would write another one there; name another folder for the config, or move "
                "the file away"
            )


def _checked(
    header: str, settings: dict[str, Setting], overrides: Sequence[str], machine: MachineFacts, path: Path
) -> tuple[Config, str]:
    """Returns the config and its text: with the user's settings, and in parts that fit into the memory of a GPU.

    Raises:
        ConfigError: The user's settings contradict each other or the chosen ones.
    """
    text = fill_template(settings, header)
    if overrides:
        settings = settings | _overridden(text, overrides)
        text = fill_template(settings, header)
    config = make_config(parse_yaml(text), str(path))
    if machine.device == "cuda" and "train.accumulate" not in _given(overrides):
        fitting = parts_that_fit(config, torch.cuda.get_device_properties(0).total_memory)
        text = fill_template(settings | {"train.accumulate": fitting}, header)
    return config, text


def fill_template(settings: Mapping[str, Setting], header: str) -> str:
    """Returns the template with other values, and the reason of each behind it.

    Args:
        settings: The values by key. A key that is left out keeps the template's value; one that the template does not
            have comes at the end of its section.
        header: A comment in place of the template's.
    """
    schema = f"# yaml-language-server: $schema={config_folder() / 'schema.json'}"  # for editors
    written, lines = set(), [schema, header, _PAGES]
    images = "model.temporal" in settings and not settings["model.temporal"].value
    left_out = {key for key in _OF_VIDEOS if images and key not in settings}
    comments: list[str] = []  # that stand above the next key
    for key, line in template_lines():
        written.add(key)
        if not key:
            comments.append(line)
            continue
        if key not in left_out:
            lines += [*comments, _line(line.partition(":")[0], key, settings[key]) if key in settings else line]
        comments = []
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        if key in written:
            continue
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        inside = range(lines.index(f"{section}:") + 1, len(lines))
        end = next((number for number in inside if not lines[number].startswith(" ")), len(lines))
        lines.insert(end, _line(f"  {name}", key, setting))
    return "\n".join(lines) + "\n"


def _line(name: str, key: str, setting: Setting) -> str:
    reason = f"  # {setting.reason}" if setting.reason else ""
    return f"{name}: {dump_value(key, setting.value)}{reason}"


def template_lines() -> list[tuple[str, str]]:
    """Returns the key, empty for comments, and the text of each line below the template's header."""
    lines = _TEMPLATE.read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    sections: list[str] = []
    found = []
    for line in lines[begin:]:
        if match := _LINE.fullmatch(line):
            sections[len(match["indent"]) // 2 :] = [match["key"]]
        found.append((".".join(sections) if match else "", line))
    return found


def parts_that_fit(config: Config, memory_bytes: int) -> Setting:
    """Returns the fewest micro-batches of a step whose activations fit into the memory of a device.

    The micro-batches are equally large, and keep the pairs of mixup and cutmix together.
    """
    memory = training_memory(config, pick_device(config.run.device))
    clips, least = config.train.batch, 2 if config.data.mixes else 1
    possible = [parts for parts in range(1, clips // least + 1) if clips % (parts * least) == 0]
    fits = (n for n in possible if memory.bytes(config.model.points, clips // n) <= _MEMORY_USED * memory_bytes)
    parts = next(fits, possible[-1])
    needed = memory.bytes(config.model.points, clips // parts) / 2**30
    return Setting(parts, f"a part takes about {needed:.1f} of {memory_bytes / 2**30:.0f} GiB")


def measure_machine(data: Survey, weights: WeightsFacts | None) -> MachineFacts:
    """Measures the speed of training on this machine, with two blocks of the model: a few seconds."""
    device, cpus = pick_device("auto"), available_cpus()
    model = {
        key: value for key, value in (weights.model if weights else {}).items() if key in {"width", "heads", "patch"}
    }
    model = {"width": 192, "heads": 3, "patch": 16} | model
    frames = 1 if data.kind == "images" else 4
    model |= {"depth": 2, "num_frames": frames, "temporal": frames > 1, "size": 10 * model["patch"], "num_classes": 10}
    precision = "bf16" if bf16_is_fast(device) else "fp32"
    config = make_config({"run": {"precision": precision}, "model": model | {"points": ["10"]}})
    speed = training_speed(config, clips=(8 if device.type == "cuda" else 4) // frames)
    name = torch.cuda.get_device_name() if device.type == "cuda" else plural(cpus, "CPU core")
    return MachineFacts(device.type, name, cpus, precision, *speed)  # type: ignore[arg-type]


def _assign_s(config: Config, clips: int) -> dict[str, float]:
    """Returns the time of `assign`, which fits to the holdout of so many clips, by a step on this machine."""
    if not config.data.holdout:
        return {}
    settings, device = config.assign, pick_device(config.run.device)
    assigner = Assigner(settings, len(config.model.points)).to(device)
    shape = (settings.batch, 3, settings.frames, settings.size, settings.size)
    thumbnails = torch.zeros(shape, dtype=torch.uint8, device=device)
    seconds = time_of(lambda: assigner(thumbnails).sum().backward(), device)
    steps = settings.epochs * max(1, round(config.data.holdout * clips) // settings.batch)
    return {"assign": seconds.idle * steps}


def _stages(config: Config) -> list[str]:
    """Returns the stages to run. Without a holdout there is nothing to label, and no assigner."""
    return [
        "train",
        *(("label", "assign") if config.data.holdout else ()),
        *(("calibrate",) if config.data.calibrate else ()),
        "evaluate",
    ]


def _by_stage(seconds: Mapping[str, float], config: Config) -> dict[str, float]:
    """Returns the times in the order in which the stages run."""
    return {stage: seconds[stage] for stage in _stages(config)}


def print_new(result: NewRun) -> None:
    """Prints what was found, how long the stages take, and what to run next."""
    data = result.data
    rows = [
        (split, sum(counts), sum(map(bool, counts)), _range(counts))
        for split, counts in data.counts.items()
        if any(counts)
    ]
    print_table(f"Data: {data.kind}, {len(data.classes)} classes", ("split", data.kind, "classes", "of a class"), rows)
    say(_describe(data))
    say(f"weights: {result.weights or 'none, the model starts from random ones'}")
    print_table(_alternatives_title(result), *_alternatives_table(result))
    rate = f"{result.machine.macs_per_s / 1e9:.0f} GMACs/s in {result.machine.precision}"
    say(f"time on {result.machine.name}, {rate}, if nothing else runs: {_times(result.seconds)}, and reading of files")
    if result.machine.slowdown > _BUSY:
        say(_busy(result))
    say(
        f"settings are chosen for {result.minutes:g} min of training on an idle machine; another line of the table: "
        "--minutes with its time"
    )
    for note in result.notes:
        say(f"note: {note}")
    folder = result.config.parent
    say(f"written: {result.config}; its comments have the reasons")
    say(f"{folder} stands for this config in every command; {result.run}, the run folder, gets all results. Next:")
    print("\n".join(result.commands))


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {duration(each)}" for stage, each in seconds.items())


def _busy(result: NewRun) -> str:
    """Returns how long the stages take on the machine as it is at present."""
    slowdown, wanted = result.machine.slowdown, busy()
    measured = {"evaluate": SPEED_S}  # it takes no longer on a busy machine
    seconds = {
        stage: slowdown * (each - measured.get(stage, 0)) + measured.get(stage, 0)
        for stage, each in result.seconds.items()
    }
    return (
        f"the machine is busy{f' ({wanted})' if wanted else ''}: at present about {slowdown:.2g} times as long, "
        f"{_times(seconds)}; --minutes counts an idle machine, and a lower number trains for less time"
    )


def _alternatives_title(result: NewRun) -> str:
    least = result.alternatives[0].least_epochs
    return (
        f"Inputs, the preferred ones first; chosen (*) is the first whose {least} epochs take at most "
        f"{result.minutes:g} min, or else the last one, with fewer epochs"
    )


def _alternatives_table(result: NewRun) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns columns and rows: what the model could see, and how long that takes."""
    videos = result.data.kind == "videos"
    rows = [
        (
            f"{each.pixels}{' *' if each.chosen else ''}",
            *((str(each.frames),) if videos else ()),
            ", ".join(map(str, each.points)),
            str(each.frozen or "-"),
            str(each.epochs or "-"),
            f"{each.minutes:.1f}" if each.minutes < _ROUND_MIN else f"{each.minutes:.0f}",
        )
        for each in result.alternatives
    ]
    columns = ("pixels", *(("frames",) if videos else ()), "points", "frozen blocks")
    return (*columns, f"epochs in {result.minutes:g} min", f"min for {result.alternatives[0].least_epochs}"), rows


def _range(counts: Sequence[int]) -> str:
    """Returns the videos of the smallest and the largest class."""
    least, most = min(filter(None, counts)), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def _describe(data: Survey) -> str:
    short = f"short side {data.short_side.low:.0f} / {data.short_side.middle:.0f} / {data.short_side.high:.0f} pixels"
    opened = f"of the {data.opened} that were opened"
    if data.kind == "images":
        return f"{short} (small / usual / large), {opened}"
    seconds = f"{data.seconds.low:.1f} / {data.seconds.middle:.1f} / {data.seconds.high:.1f} s (short / usual / long)"
    return f"durations {seconds}, {data.fps.low:.3g} to {data.fps.high:.3g} frames a second, {short}, {opened}"


def _notes(data: Survey, weights: WeightsFacts | None, config: Config) -> list[str]:
    notes = list(data.notes)
    epochs, trained = config.train.epochs, 1 - config.data.holdout - config.data.calibrate
    steps = epochs * max(1, round(data.clips("train") * trained) // config.train.batch)
    if steps < _FEW_STEPS:
        notes.append(
            f"the whole training has about {steps} steps: the curves of so few are mostly chance, and one epoch tells "
            "nothing; let it end, and go by the intervals of `evaluate` (docs/finetune.md, How many epochs)"
        )
    if config.data.calibrate:
        held_out, promise = round(data.clips("train") * config.data.calibrate), config.calibrate
        needed = videos_needed(0.0, promise.eps, promise.delta / 2)  # an order of policies has half of delta at most
        if needed is not None and held_out < needed:
            notes.append(
                f"data.calibrate: about {held_out} clips; calibrate.eps {promise.eps:g} takes at least {needed}, even "
                "if nothing is lost: keep more clips, or promise less with a larger calibrate.eps (docs/calibrate.md)"
            )
    if not config.data.holdout:
        costliest, cheapest = config.model.points[0], config.model.points[-1]
        notes.append(
            "data.holdout is 0, so that there is no assigner. A cascade needs none: after `evaluate`, try "
            f"--policy cascade:{cheapest},{costliest}:0.9 (docs/points.md)"
        )
    if epochs < _FEW_EPOCHS:
        fitting = plural(epochs, "epoch")
        notes.append(f"only {fitting} of training for this time: use a GPU, smaller weights, or more --minutes")
    if data.unreadable:
        notes.append(
            f"{plural(len(data.unreadable), 'file')} of the {data.opened} that were opened cannot be read, the first: "
            f"{data.unreadable[0]}; `videoadapt index` lists all"
        )
    empty = [name for name, count in zip(data.classes, data.counts["train"], strict=True) if not count]
    if empty:
        notes.append(f"{plural(len(empty), 'class')} without a video in train: {few(empty)}")
    if weights is None:
        notes.append(
            "without pretrained weights, some thousand clips are needed to learn anything: give --weights FILE, or "
            "--weights vit_small_patch16_224.augreg_in21k, which timm downloads"
        )
    elif weights.normalisation is None:
        notes.append(f"{weights.label} does not state its normalisation: check model.mean and model.std")
    return notes


def _commands(path: Path, data: Survey, config: Config) -> list[str]:
    folder = path.parent  # a folder with a config.yaml stands for it
    shown = shlex.quote(os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder))
    sample = "PHOTO.jpg" if data.kind == "images" else "CLIP.mp4"
    stages = [f"videoadapt {stage} {shown}" for stage in (*_stages(config), "report")]
    return [*stages, f"videoadapt predict {shown} {sample}"]


def _source(text: str) -> str:
    """Returns the absolute path of a file, or the text if there is none: the name of weights or of a set of classes."""
    return os.path.abspath(text) if os.path.exists(text) else text


def _wanted(overrides: Sequence[str], facts: WeightsFacts | None) -> Config:
    """Returns a config with what the user says, before the rest is chosen: other values mean nothing.

    Raises:
        ConfigError: A key or its value is wrong.
    """
    # The template's values of what is chosen later must not contradict the user now.
    depth = [f"model.depth={facts.model['depth']}"] if facts is not None and "depth" in facts.model else []
    return load_config(_TEMPLATE, [*_ALLOW_ALL, *depth, *overrides])


def _agreeing(settings: Mapping[str, Setting], said: Config, given: set[str], data: Survey) -> dict[str, Setting]:
    """Returns the chosen settings with crops and points that agree with the `given` keys of what the user said."""
    agreeing = dict(settings)
    if "model.size" in given:
        patch = said.model.patch if "model.patch" in given else settings["model.patch"].value
        agreeing["model.points"] = Setting(points_of(said.model.size // patch), "as many as model.size allows")
        agreeing |= crops(data, said.model.size)
    for key, other in (("data.crop_area", "data.short_side"), ("data.short_side", "data.crop_area")):
        if key in given and other in agreeing and getattr(said.data, key.removeprefix("data.")) is not None:
            agreeing[other] = Setting(None, f"{key} is given")
    return agreeing


def _given(overrides: Sequence[str]) -> set[str]:
    """Returns the keys of overrides."""
    return {text.partition("=")[0].strip() for text in overrides}


def _overridden(text: str, overrides: Sequence[str]) -> dict[str, Setting]:
    """Returns the settings that a user gave, with the types of a config."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        values: Any = load_config(path, overrides).model_dump(mode="json")
    in_template = {key for key, _ in template_lines()}
    found = {}
    for key in _given(overrides):
        names = key.split(".")
        if key not in in_template:  # slurm.stages for slurm.stages.assign.nodes: a section has one line for each key
            names = names[:2]
        value = values
        for name in names:
            value = value[name]
        found[".".join(names)] = Setting(value, "as given")
    return found
