"""The videos that a config names: their files, ids and labels, whatever format the annotations have."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from videoadapt.config.load import Config
from videoadapt.data.index.class_names import class_number, kinetics400, read_classes, require_usual_order
from videoadapt.data.index.find_files import best_first, files_by_stem, video_id
from videoadapt.data.index.formats import SPLIT_NAMES, Entry, Source, Split, is_list, read_list, read_named
from videoadapt.data.index.text import normalised, read_text
from videoadapt.errors import ConfigError, UserError
from videoadapt.runtime.seeds import seed_of

_HOLDOUT_STEPS = 1 << 63  # `seed_of` draws from [0, 2^63)


class Listed(NamedTuple):
    """One video of a source."""

    path: str  # absolute; if no file was found, where it was expected
    video: str  # id: of Kinetics, the file's name without suffix; else the path as the source has it
    source: str  # the YouTube id of a Kinetics file, else empty
    label: int
    split: Split
    where: str  # file and line, or folder, for messages
    frames: int | None = None  # as a list of folders of frame images states them


@dataclass(frozen=True)
class Listing:
    """What a config names. Each video is once in a split, but may be in several."""

    videos: list[Listed]
    classes: tuple[str, ...]  # names in label order; without names, the numbers
    twice: list[str]  # a line for each video that its split lists again, with the same label
    copies: list[str]  # a line for each file that was left, because another of its name was taken
    notes: list[str]  # what people should know of the sources


def list_videos(config: Config) -> Listing:
    """All videos of `data.train` and `data.val`, in their order, whether or not their files are there.

    Files of Kinetics' and Something-Something's tables are found by name below `data.root`, else beside the table. A
    share `data.holdout` of the train videos, chosen by a hash of seed and source, is in split `holdout`. Raises
    `ConfigError`, naming file, line and label, for what cannot be used, and `UserError` for a video with two labels.
    """
    paths = _annotations(config)
    roots = {split: _root(path, config) for split, path in paths.items()}
    named = {split: read_named(path, split, roots[split]) for split, path in paths.items() if not is_list(path, split)}
    names, origin = _class_names(config, paths, named)
    numbers = {normalised(name): number for number, name in enumerate(names)}
    sources = {
        split: named.get(split) or read_list(path, split, roots[split], numbers) for split, path in paths.items()
    }
    listed, copies = _listed(sources, numbers, origin)
    _check(listed, paths, config, named=bool(names))
    videos, twice = _once(listed)
    held = [_hold_out(video, config) for video in videos] if config.data.holdout else videos
    notes = [source.note for source in sources.values() if source.note]
    return Listing(held, names or tuple(map(str, range(config.model.num_classes))), twice, copies, notes)


def fingerprint(config: Config) -> str:
    """64 hex digits that change when `list_videos` would list other videos, or with other labels, splits or classes.

    Where the files of tables and lists lie, or whether they are there, does not count, and is not looked up: only
    annotations that are folders are gone through. Raises `ConfigError` for annotations that cannot be read.
    """
    data = config.data
    sources = {split: _content(path, split, _root(path, config)) for split, path in _annotations(config).items()}
    classes = None if data.classes is None else read_classes(data.classes)
    drawn = (data.holdout, config.run.seed) if data.holdout else None
    return hashlib.sha256(json.dumps([sources, classes, config.model.num_classes, drawn]).encode()).hexdigest()


def _content(path: Path, split: Split, root: Path) -> list[str]:
    """Where names start, and what an annotation file says, or the classes and videos of a folder."""
    if not path.is_dir():
        return [str(root), read_text(path, f"data.{split}.annotations")]
    source = read_named(path, split, root)
    return [str(source.root), *sorted(source.classes), *(entry.name for entry in source.entries)]


def _root(path: Path, config: Config) -> Path:
    return Path(os.path.abspath(config.data.root or path.parent))


def _annotations(config: Config) -> dict[Split, Path]:
    given: dict[Split, Path | None] = {"train": config.data.train.annotations, "val": config.data.val.annotations}
    paths = {split: path for split, path in given.items() if path is not None}
    if not paths:
        raise ConfigError(
            "data.train.annotations, data.val.annotations: neither is given; name an official CSV or JSON, "
            "a `path label` list or a folder per class"
        )
    for split, path in paths.items():
        if not path.exists():
            raise ConfigError(f"data.{split}.annotations: {path} does not exist")
    return paths


def _class_names(
    config: Config, paths: Mapping[Split, Path], named: Mapping[Split, Source]
) -> tuple[tuple[str, ...], str]:
    """The names from `data.classes`, else from tables and folders, and where they are from; none for lists alone."""
    if config.data.classes is not None:
        names, origin = read_classes(config.data.classes), str(config.data.classes)
    else:
        names, origin = _names_found(paths, named)
    if len(set(map(normalised, names))) < len(names):
        raise ConfigError(f"{origin}: a class is named twice")
    if names and len(names) != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes: is {config.model.num_classes}, but {origin} has {len(names)} classes; change it, or "
            "name all classes in data.classes, which may be `kinetics400`"
        )
    require_usual_order(names, origin)
    return names, origin


def _names_found(paths: Mapping[Split, Path], named: Mapping[Split, Source]) -> tuple[tuple[str, ...], str]:
    found = [source.classes for source in named.values() if source.classes]  # train first
    known = set(map(normalised, found[0])) if found else set()
    new = sorted(name for classes in found[1:] for name in classes if normalised(name) not in known)
    if new:
        raise ConfigError(f"data.val.annotations: {paths['val']} has classes that {paths['train']} has not: {new}")
    return tuple(sorted(found[0])) if found else (), " and ".join(str(paths[split]) for split in named)


def _listed(sources: Mapping[Split, Source], numbers: Mapping[str, int], origin: str) -> tuple[list[Listed], list[str]]:
    files = {root: files_by_stem(root) for root in {source.root for source in sources.values() if source.by_name}}
    listed, copies = [], []
    for split, source in sources.items():
        for entry in source.entries:
            path, *others = _places(entry, source, split, files.get(source.root, {}))
            copies += [f"{other}: left, {path} is taken" for other in others]
            label = class_number(entry.label, numbers, origin=origin, where=entry.where)
            listed.append(Listed(path, *video_id(entry.name), label, split, entry.where, entry.frames))
    return listed, copies


def _places(entry: Entry, source: Source, split: Split, files: Mapping[str, list[str]]) -> list[str]:
    """The files that may be this video, the best first; if there is none, where it was expected."""
    found = files.get(os.path.splitext(entry.name)[0], []) if source.by_name else []
    if len(found) > 1:
        return best_first(found, source.root, SPLIT_NAMES[split], entry.label)
    return found or [os.path.abspath(os.path.join(source.root, entry.name))]


def _check(listed: Sequence[Listed], paths: Mapping[Split, Path], config: Config, *, named: bool) -> None:
    classes = config.model.num_classes
    for video in listed:
        if not 0 <= video.label < classes:
            raise ConfigError(
                f"{video.where}: label {video.label} of {video.video}: expected 0 to {classes - 1} (model.num_classes)"
            )
    for split, path in paths.items():
        videos = [video for video in listed if video.split == split]
        if not videos:
            expected = "; expected a folder per class, of videos or images" if path.is_dir() else ""
            raise ConfigError(f"data.{split}.annotations: {path} lists no video{expected}")
        if not named and classes == len(kinetics400()):
            _require_usual_numbers(videos)


def _require_usual_numbers(videos: Iterable[Listed]) -> None:
    """Raise `ConfigError` if folders per class of Kinetics-400 show that the numbers are of another order of names."""
    usual = {normalised(name): number for number, name in enumerate(kinetics400())}
    first = None
    for video in videos:
        folder = PurePath(video.path).parent.name
        number = usual.get(normalised(folder))
        if number is None:
            return
        if number != video.label and first is None:
            first = f"{video.where}: label {video.label}, but {folder} is class {number} in the order of Kinetics-400"
    if first is not None:
        raise ConfigError(f"{first} that released models share; number the labels as data.classes=kinetics400 does")


def _once(listed: Iterable[Listed]) -> tuple[list[Listed], list[str]]:
    """The videos, each once in a split, and a line for each that was listed again."""
    first: dict[tuple[Split, str], Listed] = {}
    videos, twice = [], []
    for video in listed:
        other = first.get((video.split, video.video)) or first.get((video.split, video.path))
        if other is None:
            first[video.split, video.video] = first[video.split, video.path] = video
            videos.append(video)
        elif other.label == video.label:
            twice.append(f"{video.video}: {other.where} and again {video.where}")
        else:
            raise UserError(
                f"{video.video} has two labels, {other.label} ({other.where}) and {video.label} ({video.where}); "
                "list it once"
            )
    return videos, twice


def _hold_out(video: Listed, config: Config) -> Listed:
    # By source, so that no two clips of one YouTube video end on both sides.
    drawn = seed_of("holdout", config.run.seed, video.source or video.video) / _HOLDOUT_STEPS
    return video._replace(split="holdout") if video.split == "train" and drawn < config.data.holdout else video
