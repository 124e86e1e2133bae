"""What annotations say, format by format: official Kinetics tables, Something-Something's JSON, lists, folders.

- Kinetics: a CSV with the columns `label, youtube_id, time_start, time_end, split` in any order, or the JSON object
  from YouTube ids to `{"annotations": {"label", "segment"}, "subset"}`.
- Something-Something V2: a JSON list of `{"id", "template", "label"}`; the class is the template without brackets.
- Lists of TimeSformer, SlowFast, VideoMAE and MMAction2: `path label`, or `folder total_frames label` for folders of
  frame images, which must hold as many frames; fields are separated by spaces, tabs, commas or semicolons, and paths
  may hold any of these.
- A folder with a folder per class. Videos lie in it at any depth. Images directly in the folder of a class are videos
  of one frame; a folder further down that holds images and no videos is one video, with the images as its frames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from videoadapt.data.index.find_files import walk
from videoadapt.data.index.text import csv_rows, header, normalised, read_json, read_text
from videoadapt.data.video.images import IMAGE_SUFFIXES
from videoadapt.data.video.probe import VIDEO_SUFFIXES
from videoadapt.errors import ConfigError

Split = Literal["train", "val", "holdout"]

SPLIT_NAMES: dict[Split, frozenset[str]] = {
    "train": frozenset({"train"}),
    "val": frozenset({"val", "validate", "validation"}),
}
_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_SEPARATOR = re.compile(r"[ \t,;]+")
_COUNTED = re.compile(r"(?P<folder>.*[^ \t,;])[ \t,;]+(?P<frames>\d+)")


class Entry(NamedTuple):
    """One video of a source."""

    name: str  # its path as the source has it; in a table, the name of its file
    label: str  # class name, or number
    where: str  # file and line, or folder, for messages
    frames: int | None = None  # as a list states them


@dataclass(frozen=True)
class Source:
    """What an annotation file or folder says, before files and classes are looked up."""

    entries: list[Entry]
    root: Path  # absolute: where names start
    classes: frozenset[str] = frozenset()  # the names that it brings
    by_name: bool = False  # a file may lie anywhere below root, with any suffix of a video
    note: str = ""  # what people should know of it


def is_list(path: Path, split: Split) -> bool:
    """Whether a source is a list, whose labels need not be names; else it is a table or a folder."""
    if path.is_dir() or path.suffix.lower() == ".json":
        return False
    return len(set(_COLUMNS) & set(header(read_text(path, f"data.{split}.annotations")))) <= 1


def read_named(path: Path, split: Split, root: Path) -> Source:
    """A table or a folder, which names its classes; of a table of several splits, the rows of this one.

    `root` is where the files of a table are. Raises `ConfigError`, naming file, line and column.
    """
    field = f"data.{split}.annotations"
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() != ".json":
        return _kinetics(_csv_clips(read_text(path, field), path), split, path, root)
    content = read_json(path, field)
    if isinstance(content, dict):
        return _kinetics(_json_clips(content, path), split, path, root)
    if isinstance(content, list):
        return _something(content, path, root)
    raise ConfigError(f"{field}: {path}: expected a JSON list or object of videos")


class _Clip(NamedTuple):
    """A row of a Kinetics table; times as the file has them."""

    where: str
    label: Any
    youtube_id: str
    start: Any
    end: Any
    split: str


def _csv_clips(text: str, path: Path) -> Iterator[_Clip]:
    return (_Clip(where, *fields) for where, fields in csv_rows(text, _COLUMNS, path))


def _json_clips(content: dict[str, Any], path: Path) -> Iterator[_Clip]:
    for youtube_id, video in content.items():
        where = f"{path}: {youtube_id}"
        try:
            start, end = video["annotations"]["segment"]
            yield _Clip(where, video["annotations"]["label"], youtube_id, start, end, str(video["subset"]))
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f'{where}: expected {{"annotations": {{"label": NAME, "segment": [START, END]}}, "subset": SPLIT}}'
            ) from None


def _kinetics(clips: Iterator[_Clip], split: Split, path: Path, root: Path) -> Source:
    every = list(clips)
    rows = [clip for clip in every if clip.split.lower() in SPLIT_NAMES[split]]
    given, note = {clip.split for clip in every}, ""
    if every and not rows:
        found = ", ".join(sorted(given))
        if len(given) > 1 or any(found.lower() in names for names in SPLIT_NAMES.values()):
            raise ConfigError(
                f"data.{split}.annotations: {path}: column split: expected rows of split "
                f"{' or '.join(sorted(SPLIT_NAMES[split]))}, got only {found}"
            )
        rows, note = every, f"data.{split}.annotations: all rows of {path} are of split {found!r}, taken as {split}"
    entries = [_clip_entry(clip) for clip in rows]
    return Source(entries, root, frozenset(entry.label for entry in entries), by_name=True, note=note)


def _clip_entry(clip: _Clip) -> Entry:
    for column, value in (("label", clip.label), ("youtube_id", clip.youtube_id)):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{clip.where}: {column}: expected a name, got {value!r}")
    start_s, end_s = _seconds(clip.start, "time_start", clip.where), _seconds(clip.end, "time_end", clip.where)
    return Entry(f"{clip.youtube_id}_{start_s:06d}_{end_s:06d}.mp4", clip.label, clip.where)


def _seconds(value: Any, column: str, where: str) -> int:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not (seconds.is_integer() and seconds >= 0):
        raise ConfigError(f"{where}: {column}: expected a whole number of seconds, got {value!r}")
    return int(seconds)


def _something(content: list[Any], path: Path, root: Path) -> Source:
    entries, classes = [], set()
    for number, video in enumerate(content, start=1):
        where = f"{path}: entry {number}"
        if not isinstance(video, dict) or not video.get("id"):
            raise ConfigError(f'{where}: expected an object with "id" and "template", got {video!r}')
        if video.get("template"):
            label = str(video["template"]).replace("[", "").replace("]", "")
            classes.add(label)
        elif video.get("label"):
            # A caption of the video: it names a class only by chance, and so brings none.
            label, where = str(video["label"]), f"{where}, which has no template"
        else:
            raise ConfigError(f"{where}: {video['id']} has neither template nor label; a test split cannot be used")
        entries.append(Entry(f"{video['id']}.webm", label, where))
    return Source(entries, root, frozenset(classes), by_name=True)


def _folder(folder: Path) -> Source:
    try:
        kinds = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        _refuse(error)
    entries = []
    for kind in kinds:
        for parent, files in walk(kind, onerror=_refuse):
            inside = os.path.relpath(parent, folder).replace(os.sep, "/")
            names = _with_suffix(files, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
            if parent != str(kind) and names and not _with_suffix(names, VIDEO_SUFFIXES):
                entries.append(Entry(inside, kind.name, str(kind)))
            else:
                entries += [Entry(f"{inside}/{name}", kind.name, str(kind)) for name in names]
    return Source(entries, Path(os.path.abspath(folder)), frozenset(kind.name for kind in kinds))


def _with_suffix(files: Iterable[str], suffixes: frozenset[str]) -> list[str]:
    return [name for name in files if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")]


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError(
        f"cannot read the folder {error.filename}: {error.strerror}; its videos would be left out"
    ) from None


def read_list(path: Path, split: Split, root: Path, known: Container[str]) -> Source:
    """A list of paths with labels; `known` are the plain names of the classes, `root` is where relative paths start.

    Raises `ConfigError`, naming file and line.
    """
    entries = []
    for number, line in enumerate(read_text(path, f"data.{split}.annotations").split("\n"), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            where = f"{path}:{number}"
            name, label = _path_and_label(text, known, where)
            folder, frames = _folder_and_count(name, root, where)
            entries.append(Entry(folder, label, where, frames))
    return Source(entries, root)


def _path_and_label(text: str, known: Container[str], where: str) -> tuple[str, str]:
    """The label is the last field. Path and label may hold separators: the longest class name counts."""
    gaps = [gap for gap in _SEPARATOR.finditer(text) if gap.start() > 0]
    if not gaps:
        raise ConfigError(f"{where}: expected `path label`, got {text!r}")
    gap = next((gap for gap in gaps if normalised(text[gap.end() :]) in known), gaps[-1])
    return text[: gap.start()].strip('"'), text[gap.end() :].strip('"')


def _folder_and_count(name: str, root: Path, where: str) -> tuple[str, int | None]:
    """The folder and the number in `folder total_frames`; any other path as it is."""
    counted = _COUNTED.fullmatch(name) if name[-1:].isdigit() else None
    if counted is None or os.path.exists(root / name):
        return name, None
    folder = counted["folder"].strip('"')
    if os.path.splitext(folder)[1].lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not os.path.isdir(root / folder):
        raise ConfigError(f"{where}: expected `path label`; three fields are for folders of frame images")
    return folder, int(counted["frames"])
