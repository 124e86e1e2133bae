"""Lists the videos of a config, with file, id, label and split, from annotations of any format."""

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
from videoadapt.data.index.formats import (
    SPLIT_NAMES,
    AnnotationEntry,
    AnnotationSource,
    Split,
    is_list,
    read_list,
    read_named,
)
from videoadapt.data.index.text import normalised, read_text
from videoadapt.errors import ConfigError, UserError
from videoadapt.runtime.seeds import seed_of

_SEEDS = 1 << 63  # `seed_of` returns numbers in [0, 2^63)


class ListedVideo(NamedTuple):
    """One video of the annotations. Its file may be missing."""

    path: str  # absolute; the expected path if no file was found
    video: str  # id: for a Kinetics clip the file name without suffix, otherwise the path in the annotations
    source: str  # YouTube id of a Kinetics clip, otherwise empty
    label: int
    split: Split
    location: str  # file and line, or folder, for error messages
    frames: int | None = None  # number of frame images in the list, if given


@dataclass(frozen=True)
class Listing:
    """All videos of a config. A video occurs once in a split, and may occur in several splits."""

    videos: list[ListedVideo]
    classes: tuple[str, ...]  # names in label order; the numbers as text if the classes have no names
    repeated: list[str]  # one message for each video that a split lists again with the same label
    ignored_files: list[str]  # one message for each file that is not used because another has the same name
    notes: list[str]  # messages for the user about the annotations


def list_videos(config: Config) -> Listing:
    """Lists all videos of `data.train` and `data.val` in the order of the annotations.

    Video files of Kinetics and Something-Something tables are searched by name below `data.root`, or below the table's
    folder if `data.root` is not set. A fraction `data.holdout` of the train videos gets the split `holdout`. A hash of
    seed and source selects them, so the order of the list does not matter. Missing files are listed too.

    Raises:
        ConfigError: Annotations cannot be used. The message names file, line and label.
        UserError: A video has two labels in one split.
    """
    paths = _annotations(config)
    roots = {split: _root(path, config) for split, path in paths.items()}
    named = {split: read_named(path, split, roots[split]) for split, path in paths.items() if not is_list(path, split)}
    names, origin = _class_names(config, paths, named)
    numbers = {normalised(name): number for number, name in enumerate(names)}
    # Lists are read last, because class names decide where a path ends and its label begins.
    sources = {
        split: named.get(split) or read_list(path, split, roots[split], numbers) for split, path in paths.items()
    }
    listed, ignored_files = _look_up(sources, numbers, origin)
    _require_valid_labels(listed, paths, config, has_names=bool(names))
    videos, repeated = _drop_repeated(listed)
    if config.data.holdout:
        videos = [_hold_out(video, config) for video in videos]
    return Listing(
        videos=videos,
        classes=names or tuple(map(str, range(config.model.num_classes))),
        repeated=repeated,
        ignored_files=ignored_files,
        notes=[source.note for source in sources.values() if source.note],
    )


def fingerprint(config: Config) -> str:
    """Returns 64 hex digits that change when `list_videos` would return other videos, labels, splits or classes.

    Video files of tables and lists are not looked up, so their locations do not matter. Only annotations that are
    folders are searched.

    Raises:
        ConfigError: Annotations cannot be read.
    """
    data = config.data
    sources = {split: _content(path, split, _root(path, config)) for split, path in _annotations(config).items()}
    classes = None if data.classes is None else read_classes(data.classes)
    drawn = (data.holdout, config.run.seed) if data.holdout else None  # without holdout the seed changes nothing
    return hashlib.sha256(json.dumps([sources, classes, config.model.num_classes, drawn]).encode()).hexdigest()


def _content(path: Path, split: Split, root: Path) -> list[str]:
    """Returns the root and the text of an annotation file, or the root, classes and videos of a folder."""
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
    config: Config, paths: Mapping[Split, Path], named: Mapping[Split, AnnotationSource]
) -> tuple[tuple[str, ...], str]:
    """Returns class names and their origin: `data.classes` if given, otherwise tables and folders. Lists have none."""
    if config.data.classes is not None:
        names, origin = read_classes(config.data.classes), str(config.data.classes)
    else:
        names, origin = _names_of_sources(paths, named)
    if len(set(map(normalised, names))) < len(names):
        raise ConfigError(f"{origin}: a class is named twice")
    if names and len(names) != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes: is {config.model.num_classes}, but {origin} has {len(names)} classes; change it, or "
            "name all classes in data.classes, which may be `kinetics400`"
        )
    require_usual_order(names, origin)
    return names, origin


def _names_of_sources(
    paths: Mapping[Split, Path], named: Mapping[Split, AnnotationSource]
) -> tuple[tuple[str, ...], str]:
    found = [source.classes for source in named.values() if source.classes]  # train first
    known = set(map(normalised, found[0])) if found else set()
    # The model would never be trained for a class that only val has.
    new = sorted(name for classes in found[1:] for name in classes if normalised(name) not in known)
    if new:
        raise ConfigError(f"data.val.annotations: {paths['val']} has classes that are not in {paths['train']}: {new}")
    return tuple(sorted(found[0])) if found else (), " and ".join(str(paths[split]) for split in named)


def _look_up(
    sources: Mapping[Split, AnnotationSource], numbers: Mapping[str, int], origin: str
) -> tuple[list[ListedVideo], list[str]]:
    """Finds file, id and class number of each entry. Also returns a message for each file that is not used."""
    # Splits often share a root, which may hold 300,000 files: each root is searched once.
    roots = {source.root for source in sources.values() if source.search_by_name}
    files = {root: files_by_stem(root) for root in roots}
    listed, ignored_files = [], []
    for split, source in sources.items():
        for entry in source.entries:
            path, *others = _candidate_files(entry, source, split, files.get(source.root, {}))
            ignored_files += [f"{other}: ignored, {path} is used" for other in others]
            label = class_number(entry.label, numbers, origin=origin, location=entry.location)
            listed.append(ListedVideo(path, *video_id(entry.name), label, split, entry.location, entry.frames))
    return listed, ignored_files


def _candidate_files(
    entry: AnnotationEntry, source: AnnotationSource, split: Split, files: Mapping[str, list[str]]
) -> list[str]:
    """Returns the files that may be this video, the most likely first, or the expected path if there is none."""
    found = files.get(os.path.splitext(entry.name)[0], []) if source.search_by_name else []
    if len(found) > 1:
        return best_first(found, source.root, SPLIT_NAMES[split], entry.label)
    return found or [os.path.abspath(os.path.join(source.root, entry.name))]


def _require_valid_labels(
    listed: Sequence[ListedVideo], paths: Mapping[Split, Path], config: Config, *, has_names: bool
) -> None:
    """Raises `ConfigError` for a label outside the model's classes, an empty split, and numbers in a wrong order."""
    classes = config.model.num_classes
    for video in listed:
        if not 0 <= video.label < classes:
            raise ConfigError(
                f"{video.location}: label {video.label} of {video.video}: "
                f"expected 0 to {classes - 1} (model.num_classes)"
            )
    for split, path in paths.items():
        videos = [video for video in listed if video.split == split]
        if not videos:
            expected = "; expected a folder per class, of videos or images" if path.is_dir() else ""
            raise ConfigError(f"data.{split}.annotations: {path} lists no video{expected}")
        if not has_names and classes == len(kinetics400()):
            _require_usual_numbers(videos)


def _require_usual_numbers(videos: Iterable[ListedVideo]) -> None:
    """Raises `ConfigError` if folders have names of Kinetics-400 classes, but other class numbers."""
    usual = {normalised(name): number for number, name in enumerate(kinetics400())}
    first_wrong = None
    for video in videos:
        folder = PurePath(video.path).parent.name
        number = usual.get(normalised(folder))
        if number is None:
            return  # one folder that is not a class: this is another data set, with another order
        if number != video.label and first_wrong is None:
            first_wrong = (
                f"{video.location}: label {video.label}, but {folder} is class {number} in the order of Kinetics-400"
            )
    if first_wrong is not None:
        raise ConfigError(
            f"{first_wrong} that released models share; number the labels as data.classes=kinetics400 does"
        )


def _drop_repeated(listed: Iterable[ListedVideo]) -> tuple[list[ListedVideo], list[str]]:
    """Returns each video once per split, and a message for each repetition with the same label."""
    first: dict[tuple[Split, str], ListedVideo] = {}  # by id and by path, because each of them identifies a video
    videos, repeated = [], []
    for video in listed:
        other = first.get((video.split, video.video)) or first.get((video.split, video.path))
        if other is None:
            first[video.split, video.video] = first[video.split, video.path] = video
            videos.append(video)
        elif other.label == video.label:
            repeated.append(f"{video.video}: {other.location} and again {video.location}")
        else:
            raise UserError(
                f"{video.video} has two labels, {other.label} ({other.location}) and {video.label} "
                f"({video.location}); list it once"
            )
    return videos, repeated


def _hold_out(video: ListedVideo, config: Config) -> ListedVideo:
    # Drawn by source: two clips of one YouTube video are nearly the same, and must not be in two splits.
    drawn = seed_of("holdout", config.run.seed, video.source or video.video) / _SEEDS
    return video._replace(split="holdout") if video.split == "train" and drawn < config.data.holdout else video
