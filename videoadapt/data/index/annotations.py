"""Lists the videos of a config, with file, id, label and split, from annotations of any format."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from videoadapt.config.load import Config
from videoadapt.data.index.class_files import ClassFile, read_classes
from videoadapt.data.index.class_folders import read_class_folders, scan_class_folders
from videoadapt.data.index.class_names import CLASS_SETS, require_usual_order
from videoadapt.data.index.find_files import NearFiles, video_id
from videoadapt.data.index.formats import is_list, read_table
from videoadapt.data.index.identity import ListedVideo, drop_repeated, require_same_content
from videoadapt.data.index.labels import Classes, label_lists
from videoadapt.data.index.lists import read_list
from videoadapt.data.index.look_up import FileLookup
from videoadapt.data.index.media_kinds import select_kind
from videoadapt.data.index.probe_pool import readable_files
from videoadapt.data.index.sources import AnnotationEntry, AnnotationSource, Split
from videoadapt.data.index.text import nfc, normalised, read_text, require_usable
from videoadapt.errors import ConfigError, UserError, plural
from videoadapt.runtime.machine import worker_count
from videoadapt.runtime.seeds import seed_of

_SEEDS = 1 << 63  # `seed_of` returns numbers in [0, 2^63)
_MAX_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Listing:
    """All videos of a config. A video occurs once in a split, and may occur in several splits."""

    videos: list[ListedVideo]
    classes: tuple[str, ...]  # names in label order; the numbers as text if the classes have no names
    repeated: list[str]  # one message for each video that a split lists again with the same label
    ignored_files: list[str]  # one message for each file that is not used because another has the same name
    passed_over: dict[str, list[str]]  # files and lines that are not videos of the population, by kind
    notes: list[str]  # messages for the user about the annotations


def list_videos(config: Config) -> Listing:
    """Lists all videos of `data.train` and `data.val` in the order of the annotations.

    Video files of Kinetics and Something-Something tables are searched by name below `data.root`, or below the table's
    folder if `data.root` is not set. A fraction `data.holdout` of the train videos gets the split `holdout`, and
    another fraction `data.calibrate` the split `calibrate`. A hash of seed and source selects them, so the order of the
    list does not matter. Missing files are listed too.

    Raises:
        ConfigError: Annotations cannot be used. The message names file, line and label.
        UserError: A video has two labels in one split, or a file name is not UTF-8.
    """
    paths = _annotations(config)
    named = {split: _read_named(path, split, config) for split, path in paths.items() if not is_list(path, split)}
    classes, notes = _classes(config, paths, named)
    # Lists are read last, because class names decide where a path ends and its label begins.
    near = NearFiles()
    sources = {
        split: named.get(split) or _read_list(path, split, config, classes, near) for split, path in paths.items()
    }
    _require_entries(sources, paths)
    labels, label_notes = _label(sources, classes)
    lookup = FileLookup(sources, near)
    listed = [
        _listed(lookup.path(entry, source, split), entry, source, label, split)
        for split, source in sources.items()
        for entry, label in zip(source.entries, labels[split], strict=True)
    ]
    _require_utf8(listed)
    listed, id_notes = require_same_content(listed)
    videos, repeated = drop_repeated(listed)
    if config.data.source_pattern is not None:
        notes.append(_sources_note(videos, config.data.source_pattern))
        videos = [video._replace(source=source_of(video, config.data.source_pattern)) for video in videos]
    if config.data.holdout or config.data.calibrate:
        videos = [_draw_split(video, config) for video in videos]
    notes += [*label_notes, *lookup.notes(), *id_notes, *(source.note for source in sources.values())]
    return Listing(
        videos=videos,
        classes=classes.names or tuple(map(str, range(config.model.num_classes))),
        repeated=repeated,
        ignored_files=lookup.ignored_files,
        passed_over=_passed_over(sources),
        notes=[note for note in notes if note],
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
    file = None if data.classes is None else read_classes(data.classes)
    drawn = (data.holdout, config.run.seed) if data.holdout else None  # without a draw the seed changes nothing
    parts: list[Any] = [sources, file and file.names, config.model.num_classes, drawn]
    # Settings that are not at their default, so that manifests of earlier versions stay valid.
    parts += [first for first in (file and file.first,) if first] + [kind for kind in (data.kind,) if kind != "auto"]
    parts += [("calibrate", data.calibrate, config.run.seed)] if data.calibrate else []
    parts += [("source_pattern", data.source_pattern)] if data.source_pattern is not None else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _content(path: Path, split: Split, root: Path) -> list[str]:
    """Returns the root and the text of an annotation file, or the root, classes and videos of a folder."""
    if not path.is_dir():
        return [str(root), read_text(path, f"data.{split}.annotations")]
    found = scan_class_folders(path)
    return [str(found.root), *sorted(found.classes), *(entry.name for entry in found.entries)]


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


def _read_named(path: Path, split: Split, config: Config) -> AnnotationSource:
    """Reads a source that has class names: a table or a folder."""
    if not path.is_dir():
        return read_table(path, split, _root(path, config))
    can_read = partial(readable_files, workers=worker_count(config.data.workers), timeout_s=config.index.timeout_s)
    return select_kind(read_class_folders(path, can_read), config.data.kind, split, path)


def _read_list(path: Path, split: Split, config: Config, classes: Classes, near: NearFiles) -> AnnotationSource:
    source = read_list(path, split, _root(path, config), classes.numbers, near)
    return select_kind(source, config.data.kind, split, path)


def _classes(
    config: Config, paths: Mapping[Split, Path], named: Mapping[Split, AnnotationSource]
) -> tuple[Classes, list[str]]:
    """Returns the classes of `data.classes` if given, otherwise of tables and folders, and messages for the user."""
    empty = {
        name
        for source in named.values()
        if source.format == "folder"
        for name in source.classes - {entry.label for entry in source.entries}
    }
    without = f"class folders without a video: {', '.join(sorted(empty)[:_MAX_SHOWN])}" if empty else ""
    if config.data.classes is not None:
        file, origin = read_classes(config.data.classes), str(config.data.classes)
    else:
        names, origin = _names_of_sources(paths, named)
        file = ClassFile(names, note=_numeric_order(names))
    if len(set(map(normalised, file.names))) < len(file.names):
        raise ConfigError(f"{origin}: a class is named twice")
    if file.names and len(file.names) != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes: is {config.model.num_classes}, but {origin} has {plural(len(file.names), 'class')}; "
            f"change it, or name all classes in data.classes, which may be {', '.join(CLASS_SETS)}"
            f"{f'; {without}' if without else ''}"
        )
    require_usual_order(file.names, origin)
    return Classes(file.names, origin, config.model.num_classes, file.first), [file.note, without]


def _numeric_order(names: Sequence[str]) -> str:
    """Returns a message if class folders are numbers whose order is not that of their labels: 0, 1, 10, 2."""
    if all(name.isascii() and name.isdigit() for name in names) and list(map(int, names)) != sorted(map(int, names)):
        shown = ", ".join(names[:_MAX_SHOWN])
        return f"class folders are numbers in the order of text: {shown}, ...; data.classes may give another order"
    return ""


def _names_of_sources(
    paths: Mapping[Split, Path], named: Mapping[Split, AnnotationSource]
) -> tuple[tuple[str, ...], str]:
    found = [source.classes for source in named.values() if source.classes]  # train first
    known = set(map(normalised, found[0])) if found else set()
    # The model would never be trained for a class that only val has.
    new = sorted(name for classes in found[1:] for name in classes if normalised(name) not in known)
    if new:
        raise ConfigError(
            f"data.val.annotations: {paths['val']} has classes that are not in {paths['train']}: {new[:_MAX_SHOWN]}"
        )
    return tuple(sorted(found[0])) if found else (), " and ".join(str(paths[split]) for split in named)


def _require_entries(sources: Mapping[Split, AnnotationSource], paths: Mapping[Split, Path]) -> None:
    for split, source in sources.items():
        for entry in source.entries if source.format != "folder" else ():
            require_usable(entry.name, "path", entry.location)
            require_usable(entry.label, "label", entry.location)
        if not source.entries:
            expected = "; expected a folder per class, of videos or images" if source.format == "folder" else ""
            raise ConfigError(f"data.{split}.annotations: {paths[split]} lists no video{expected}")


def _label(sources: Mapping[Split, AnnotationSource], classes: Classes) -> tuple[dict[Split, list[int]], list[str]]:
    """Returns the class number of each entry by split, and messages for the user."""
    lists = {split: source for split, source in sources.items() if source.format == "list"}
    of_lists, notes = label_lists(list(lists.values()), classes)
    labels = dict(zip(lists, of_lists, strict=True))
    for split, source in sources.items():
        if split not in labels:
            labels[split] = [classes.number(entry) for entry in source.entries]
    return labels, notes


def _listed(path: str, entry: AnnotationEntry, source: AnnotationSource, label: int, split: Split) -> ListedVideo:
    # The composed form: the same files have the same ids after a copy from macOS, which decomposes names.
    name = nfc(entry.name)
    guessed = "" if source.format == "table" else name
    return ListedVideo(path, *video_id(name), label, split, entry.location, entry.frames, guessed)


def _passed_over(sources: Mapping[Split, AnnotationSource]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for split, source in sources.items():
        for kind, items in source.passed_over.items():
            kinds.setdefault(f"{split}: {kind}", []).extend(items)
    return kinds


def source_of(video: ListedVideo, pattern: str) -> str:
    """Returns the source of a video by `data.source_pattern`, or else the known one; empty: a source of its own."""
    return _matched(video, pattern) or video.source


def _matched(video: ListedVideo, pattern: str) -> str:
    match = re.fullmatch(pattern, video.video)
    return match[1] or "" if match else ""


def _sources_note(videos: Sequence[ListedVideo], pattern: str) -> str:
    """Returns in words how many sources the videos have. Raises `ConfigError` if the pattern matches none of them."""
    of_sources = [source for video in videos if (source := _matched(video, pattern))]
    if not of_sources:
        raise ConfigError(
            f"data.source_pattern: {pattern!r} matches none of {plural(len(videos), 'video')}, such as "
            f"{videos[0].video!r}; it must match the whole text, and its group must not be empty"
        )
    found = f"{plural(len(of_sources), 'video')} of {plural(len(set(of_sources)), 'source')}"
    others = [video.video for video in videos if not _matched(video, pattern)]
    if others:
        found += (
            f"; it does not match {plural(len(others), 'video')}, such as {others[0]!r}: the source of each is its "
            "YouTube video, or else itself"
        )
    return f"data.source_pattern: {found}"


def _require_utf8(listed: Sequence[ListedVideo]) -> None:
    """Raises `UserError` for a file name that is not UTF-8: file systems allow it, Parquet and JSON do not."""
    for video in listed:
        try:
            video.path.encode()
        except UnicodeEncodeError:
            raise UserError(f"{video.path!r} ({video.location}): its name is not UTF-8; rename it") from None


def _draw_split(video: ListedVideo, config: Config) -> ListedVideo:
    # Drawn by source: two clips of one source are nearly the same, and must not be in two splits.
    drawn = seed_of("holdout", config.run.seed, video.source or video.video) / _SEEDS
    if video.split != "train":
        return video
    # The two splits begin at the two ends, so that a change of one fraction leaves the videos of the other.
    if drawn < config.data.holdout:
        return video._replace(split="holdout")
    return video._replace(split="calibrate") if drawn >= 1 - config.data.calibrate else video
