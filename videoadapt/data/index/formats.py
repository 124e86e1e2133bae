"""Reads annotations into one common form. One function per format.

- Kinetics (`_kinetics`): a CSV with the columns `label, youtube_id, time_start, time_end, split` in any order, or the
  JSON object from YouTube ids to `{"annotations": {"label", "segment"}, "subset"}`.
- Something-Something V2 (`_something_something`): a JSON list of `{"id", "template", "label"}`. The class is the
  template without brackets.
- Lists of TimeSformer, SlowFast, VideoMAE and MMAction2 (`read_list`): `path label`, or `folder total_frames label` for
  folders of frame images. Spaces, tabs, commas or semicolons separate the fields. Paths may contain them.
- Folders (`_class_folders`): a folder with one folder per class, with videos at any depth. An image directly in the
  folder of a class is a video of one frame. A deeper folder with images and no videos is one video of these frames.
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

# Names of a split in tables and folders. `holdout` is drawn from `train` and never named in annotations.
SPLIT_NAMES: dict[Split, frozenset[str]] = {
    "train": frozenset({"train"}),
    "val": frozenset({"val", "validate", "validation"}),
}
_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_SEPARATOR = re.compile(r"[ \t,;]+")
_FOLDER_AND_FRAMES = re.compile(r"(?P<folder>.*[^ \t,;])[ \t,;]+(?P<frames>\d+)")


class AnnotationEntry(NamedTuple):
    """One video of a source."""

    name: str  # path of the video in the source; in a table, the name of its file
    label: str  # class name, or number
    location: str  # file and line, or folder, for error messages
    frames: int | None = None  # number of frame images in the list, if given


@dataclass(frozen=True)
class AnnotationSource:
    """Content of one annotation file or folder, before video files and class numbers are looked up."""

    entries: list[AnnotationEntry]
    root: Path  # absolute; relative names start here
    classes: frozenset[str] = frozenset()  # class names in the source; empty for a list
    search_by_name: bool = False  # True: the file may be anywhere below root and have any suffix of a video
    note: str = ""  # a message for the user about the source


def is_list(path: Path, split: Split) -> bool:
    """Returns whether an annotation file is a list of paths with labels.

    Class names of a list are optional. Every other source, a table or a folder, has class names.

    Raises:
        ConfigError: The file cannot be read.
    """
    if path.is_dir() or path.suffix.lower() == ".json":
        return False
    # A table without some columns is still a table, and a later error names the missing column. One
    # matching field is not enough: the first line of a list may be `label,...` by chance.
    return len(set(_COLUMNS) & set(header(read_text(path, f"data.{split}.annotations")))) <= 1


def read_named(path: Path, split: Split, root: Path) -> AnnotationSource:
    """Reads a source that has class names: a table or a folder.

    Args:
        path: The annotation file, or the folder with one folder per class.
        split: Rows of this split are returned if a table has several.
        root: Folder with the video files of a table. A folder of classes is its own root.

    Raises:
        ConfigError: The source cannot be used. The message names file, line and column.
    """
    field = f"data.{split}.annotations"
    if path.is_dir():
        return _class_folders(path)
    if path.suffix.lower() != ".json":
        return _kinetics(_csv_clips(read_text(path, field), path), split, path, root)
    content = read_json(path, field)
    if isinstance(content, dict):
        return _kinetics(_json_clips(content, path), split, path, root)
    if isinstance(content, list):
        return _something_something(content, path, root)
    raise ConfigError(f"{field}: {path}: expected a JSON list or object of videos")


class _KineticsClip(NamedTuple):
    """A row of a Kinetics table. Label and times are not checked yet."""

    location: str
    label: Any
    youtube_id: str
    start: Any  # seconds: text in a CSV, a number in JSON
    end: Any
    split: str


def _csv_clips(text: str, path: Path) -> Iterator[_KineticsClip]:
    return (_KineticsClip(location, *fields) for location, fields in csv_rows(text, _COLUMNS, path))


def _json_clips(content: dict[str, Any], path: Path) -> Iterator[_KineticsClip]:
    for youtube_id, video in content.items():
        location = f"{path}: {youtube_id}"
        try:
            start, end = video["annotations"]["segment"]
            yield _KineticsClip(location, video["annotations"]["label"], youtube_id, start, end, str(video["subset"]))
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f'{location}: expected {{"annotations": {{"label": NAME, "segment": [START, END]}}, "subset": SPLIT}}'
            ) from None


def _kinetics(clips: Iterator[_KineticsClip], split: Split, path: Path, root: Path) -> AnnotationSource:
    every = list(clips)
    rows = [clip for clip in every if clip.split.lower() in SPLIT_NAMES[split]]
    note = ""
    if every and not rows:
        _require_usable_split(every, split, path)
        rows = every
        note = f"data.{split}.annotations: all rows of {path} are of split {rows[0].split!r}; they are used as {split}"
    entries = [_kinetics_entry(clip) for clip in rows]
    return AnnotationSource(entries, root, frozenset(entry.label for entry in entries), search_by_name=True, note=note)


def _require_usable_split(clips: Iterable[_KineticsClip], split: Split, path: Path) -> None:
    """Refuses a table without rows of `split`, unless all its rows are of one unknown split, such as `test`.

    A table of `train` that is used as `val`, or the reverse, is most likely a mistake in the config.
    """
    found = sorted({clip.split for clip in clips})
    if len(found) > 1 or any(found[0].lower() in names for names in SPLIT_NAMES.values()):
        raise ConfigError(
            f"data.{split}.annotations: {path}: column split: expected rows of split "
            f"{' or '.join(sorted(SPLIT_NAMES[split]))}, got only {', '.join(found)}"
        )


def _kinetics_entry(clip: _KineticsClip) -> AnnotationEntry:
    for column, value in (("label", clip.label), ("youtube_id", clip.youtube_id)):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{clip.location}: {column}: expected a name, got {value!r}")
    start_s = _whole_seconds(clip.start, "time_start", clip.location)
    end_s = _whole_seconds(clip.end, "time_end", clip.location)
    # The file name that all download tools for Kinetics use.
    return AnnotationEntry(f"{clip.youtube_id}_{start_s:06d}_{end_s:06d}.mp4", clip.label, clip.location)


def _whole_seconds(value: Any, column: str, location: str) -> int:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not (seconds.is_integer() and seconds >= 0):
        raise ConfigError(f"{location}: {column}: expected a whole number of seconds, got {value!r}")
    return int(seconds)


def _something_something(content: list[Any], path: Path, root: Path) -> AnnotationSource:
    entries, classes = [], set()
    for number, video in enumerate(content, start=1):
        location = f"{path}: entry {number}"
        if not isinstance(video, dict) or not video.get("id"):
            raise ConfigError(f'{location}: expected an object with "id" and "template", got {video!r}')
        if video.get("template"):
            label = str(video["template"]).replace("[", "").replace("]", "")
            classes.add(label)
        elif video.get("label"):
            # `label` is a caption of this video, such as "holding potato". It is rarely a class, so it is
            # looked up in data.classes and does not add a class.
            label, location = str(video["label"]), f"{location}, which has no template"
        else:
            raise ConfigError(f"{location}: {video['id']} has neither template nor label; a test split cannot be used")
        entries.append(AnnotationEntry(f"{video['id']}.webm", label, location))
    return AnnotationSource(entries, root, frozenset(classes), search_by_name=True)


def _class_folders(folder: Path) -> AnnotationSource:
    try:
        class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        _refuse_folder(error)
    entries = []
    for class_folder in class_folders:
        for parent, files in walk(class_folder, onerror=_refuse_folder):
            relative = os.path.relpath(parent, folder).replace(os.sep, "/")
            names = _with_suffix(files, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
            if parent != str(class_folder) and names and not _with_suffix(names, VIDEO_SUFFIXES):
                videos = [relative]  # one video, with the images as its frames
            else:
                videos = [f"{relative}/{name}" for name in names]
            entries += [AnnotationEntry(name, class_folder.name, str(class_folder)) for name in videos]
    return AnnotationSource(entries, Path(os.path.abspath(folder)), frozenset(path.name for path in class_folders))


def _with_suffix(files: Iterable[str], suffixes: frozenset[str]) -> list[str]:
    return [name for name in files if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")]


def _refuse_folder(error: OSError) -> NoReturn:
    raise ConfigError(
        f"cannot read the folder {error.filename}: {error.strerror}; without it the list of videos is incomplete"
    ) from None


def read_list(path: Path, split: Split, root: Path, known: Container[str]) -> AnnotationSource:
    """Reads a list with one `path label` or `folder total_frames label` a line. Lines that start with # are skipped.

    Args:
        path: The list.
        split: The split of the list in the config, for error messages.
        root: Folder where relative paths start.
        known: Normalised class names. They show where the path ends and a label of several words begins.

    Raises:
        ConfigError: A line cannot be used. The message names file and line.
    """
    entries = []
    # `splitlines` would also split at characters such as U+2028, which a path may contain.
    for number, line in enumerate(read_text(path, f"data.{split}.annotations").split("\n"), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            location = f"{path}:{number}"
            name, label = _split_label(text, known, location)
            folder, frames = _split_frame_count(name, root, location)
            entries.append(AnnotationEntry(folder, label, location, frames))
    return AnnotationSource(entries, root)


def _split_label(text: str, known: Container[str], location: str) -> tuple[str, str]:
    """Splits a line into path and label: at the first separator before a known class name, otherwise at the last."""
    gaps = [gap for gap in _SEPARATOR.finditer(text) if gap.start() > 0]
    if not gaps:
        raise ConfigError(f"{location}: expected `path label`, got {text!r}")
    # The first match gives the longest class name: `arm wrestling` rather than `wrestling`.
    gap = next((gap for gap in gaps if normalised(text[gap.end() :]) in known), gaps[-1])
    return text[: gap.start()].strip('"'), text[gap.end() :].strip('"')


def _split_frame_count(name: str, root: Path, location: str) -> tuple[str, int | None]:
    """Splits `folder total_frames` into folder and number. Returns any other path unchanged, with None."""
    match = _FOLDER_AND_FRAMES.fullmatch(name) if name[-1:].isdigit() else None
    if match is None or os.path.exists(root / name):  # a folder may itself be called `clip 7`
        return name, None
    folder = match["folder"].strip('"')
    if os.path.splitext(folder)[1].lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not os.path.isdir(root / folder):
        raise ConfigError(f"{location}: expected `path label`; three fields are for folders of frame images")
    return folder, int(match["frames"])
