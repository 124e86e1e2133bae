"""The videos that a config names, with their labels: from `path label` lists, or from a folder per class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from videoadapt.config import Config
from videoadapt.data.probe import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from videoadapt.data.sampling import seed_of
from videoadapt.errors import ConfigError, UserError

Split = Literal["train", "val", "holdout"]

_SEPARATOR = re.compile(r"[ \t,;]+")
_HOLDOUT_STEPS = 1 << 63  # `seed_of` draws from [0, 2^63)


@dataclass(frozen=True)
class Listed:
    """One video of a source: its absolute path, its id (the path as the source has it), and its label."""

    path: str
    video: str
    label: int
    split: Split
    where: str  # file and line, or folder, for messages


def list_videos(config: Config) -> tuple[list[Listed], tuple[str, ...]]:
    """All videos of `data.train` and `data.val`, and the class names in label order; without names, the numbers.

    A share `data.holdout` of the train videos, chosen by a hash of seed and video id, is in split `holdout`. Raises
    `ConfigError`, naming file, line and label, for what cannot be used, `UserError` for a video that is listed twice.
    """
    sources = _sources(config)
    names = _class_names(config, sources)
    numbers = {_plain(name): number for number, name in enumerate(names)}
    listed = []
    for split, source in sources.items():
        videos = _folder(source, split, numbers) if source.is_dir() else _list(source, split, numbers, config.data.root)
        for video in videos:
            if not 0 <= video.label < config.model.num_classes:
                last = config.model.num_classes - 1
                raise ConfigError(
                    f"{video.where}: label {video.label} of {video.video}: expected 0 to {last} (model.num_classes)"
                )
            listed.append(video)
    _refuse_twice(listed)
    held = [_hold_out(video, config) for video in listed]
    return held, names or tuple(map(str, range(config.model.num_classes)))


def _sources(config: Config) -> dict[Split, Path]:
    given: dict[Split, Path | None] = {"train": config.data.train.annotations, "val": config.data.val.annotations}
    sources = {split: path for split, path in given.items() if path is not None}
    if not sources:
        raise ConfigError(
            "data.train.annotations, data.val.annotations: neither is given; name a `path label` list or a folder"
        )
    for split, path in sources.items():
        if not path.exists():
            raise ConfigError(f"data.{split}.annotations: {path} does not exist")
    return sources


def _class_names(config: Config, sources: Mapping[Split, Path]) -> tuple[str, ...]:
    """The names from `data.classes`, else from the folders; none for lists with numbers."""
    if config.data.classes is not None:
        names = tuple(filter(None, (line.strip() for line in _lines(config.data.classes, "data.classes"))))
        origin = str(config.data.classes)
    else:
        names, origin = _folder_classes(sources)
    if len({_plain(name) for name in names}) < len(names):
        raise ConfigError(f"{origin}: a class is named twice")
    if names and len(names) != config.model.num_classes:
        raise ConfigError(f"model.num_classes: is {config.model.num_classes}, but {origin} has {len(names)} classes")
    return names


def _folder_classes(sources: Mapping[Split, Path]) -> tuple[tuple[str, ...], str]:
    found = {split: {p.name for p in _visible(path) if p.is_dir()} for split, path in sources.items() if path.is_dir()}
    new = found.get("val", set()) - found.get("train", found.get("val", set()))
    if new:
        raise ConfigError(
            f"data.val.annotations: {sources['val']} has classes that {sources['train']} has not: {sorted(new)}"
        )
    origin = " and ".join(str(sources[split]) for split in found)
    return tuple(sorted(set().union(*found.values()))), origin


def _folder(folder: Path, split: Split, numbers: Mapping[str, int]) -> Iterator[Listed]:
    for kind in sorted(p for p in _visible(folder) if p.is_dir()):
        label = numbers.get(_plain(kind.name))
        if label is None:
            raise ConfigError(f"{kind}: this folder's name is not a class of data.classes")
        for parent, folders, files in os.walk(kind, followlinks=True):
            folders.sort()
            for path in sorted(Path(parent, name) for name in files if not name.startswith(".")):
                if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                    yield Listed(os.path.abspath(path), path.relative_to(folder).as_posix(), label, split, str(kind))


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _list(path: Path, split: Split, numbers: Mapping[str, int], root: Path | None) -> Iterator[Listed]:
    base = root or path.parent
    for number, line in enumerate(_lines(path, f"data.{split}.annotations"), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            where = f"{path}:{number}"
            video, label = _parse(text, numbers, where)
            yield Listed(os.path.abspath(base / video), video, label, split, where)


def _parse(text: str, numbers: Mapping[str, int], where: str) -> tuple[str, int]:
    """Path and label of a line: the label is the last field. Both may hold spaces; the longest class name counts."""
    gaps = [gap for gap in _SEPARATOR.finditer(text) if gap.start() > 0]
    for gap in gaps if numbers else ():
        label = numbers.get(_plain(text[gap.end() :]))
        if label is not None:
            return text[: gap.start()].strip('"'), label
    if not gaps:
        raise ConfigError(f"{where}: expected `path label`, got {text!r}")
    field = text[gaps[-1].end() :].strip('"')
    if not re.fullmatch(r"-?\d+", field):
        known = "a class of data.classes" if numbers else "data.classes to name the classes"
        raise ConfigError(f"{where}: label {field!r}: expected a number, or {known}")
    return text[: gaps[-1].start()].strip('"'), int(field)


def _plain(name: str) -> str:
    """A class name as it is compared: folders are often called arm_wrestling for `arm wrestling`."""
    return name.strip().strip('"').replace(" ", "_")


def _lines(path: Path, field: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{field}: {path} is not a text file in UTF-8") from None


def _refuse_twice(listed: list[Listed]) -> None:
    first: dict[str, Listed] = {}
    for video in listed:
        other = first.setdefault(video.path, video)
        if other is not video:
            splits = "twice in" if other.split == video.split else f"in both {other.split} and"
            raise UserError(
                f"{video.path} is {splits} {video.split} ({other.where}, {video.where}); list each video once"
            )


def _hold_out(video: Listed, config: Config) -> Listed:
    drawn = seed_of("holdout", config.run.seed, video.video) / _HOLDOUT_STEPS
    if video.split != "train" or drawn >= config.data.holdout:
        return video
    return Listed(video.path, video.video, video.label, "holdout", video.where)
