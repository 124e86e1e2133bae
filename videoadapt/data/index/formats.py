"""Reads tables of annotations into one common form, and says which format a source has.

- Kinetics (`_kinetics`): a CSV with the columns `label, youtube_id, time_start, time_end, split` in any order, or the
  JSON object from YouTube ids to `{"annotations": {"label", "segment"}, "subset"}`.
- Something-Something V2 (`_something_something`): a JSON list of `{"id", "template", "label"}`. The class is the
  template without brackets.
- Lists with one `path label` a line: see `lists`.
- Folders with one folder per class: see `class_folders`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from videoadapt.data.index.sources import SPLIT_NAMES, AnnotationEntry, AnnotationSource, Split
from videoadapt.data.index.text import csv_rows, header, read_json, read_text
from videoadapt.errors import ConfigError, shown

_MAX_SECONDS = 1_000_000  # names of files have six digits
_MAX_SHOWN = 100  # characters of a key in a message
_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")


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


def read_table(path: Path, split: Split, root: Path) -> AnnotationSource:
    """Reads a table of Kinetics or Something-Something.

    Args:
        path: The CSV or JSON file.
        split: Rows of this split are returned if a table has several.
        root: Folder with the video files.

    Raises:
        ConfigError: The source cannot be used. The message names file, line and column.
    """
    field = f"data.{split}.annotations"
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
        location = f"{path}: {youtube_id[:_MAX_SHOWN]}"
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
    source = AnnotationSource(entries, root, "table", frozenset(entry.label for entry in entries), note)
    known = {name for names in SPLIT_NAMES.values() for name in names}
    for clip in every if rows is not every else ():
        if clip.split.lower() not in known:  # `test`, or a misspelled name: no split of a run uses these rows
            source.passed_over.setdefault(f"rows of split {clip.split!r}", []).append(clip.location)
    return source


def _require_usable_split(clips: Iterable[_KineticsClip], split: Split, path: Path) -> None:
    """Refuses a table without rows of `split`, unless all its rows are of one unknown split, such as `test`.

    A table of `train` that is used as `val`, or the reverse, is most likely a mistake in the config.
    """
    found = sorted({clip.split for clip in clips})
    if len(found) > 1 or any(found[0].lower() in names for names in SPLIT_NAMES.values()):
        raise ConfigError(
            f"data.{split}.annotations: {path}: column split: expected rows of split "
            f"{' or '.join(sorted(SPLIT_NAMES[split]))}, got only {', '.join(found)[:_MAX_SHOWN]}"
        )


def _kinetics_entry(clip: _KineticsClip) -> AnnotationEntry:
    for column, value in (("label", clip.label), ("youtube_id", clip.youtube_id)):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{clip.location}: {column}: expected a name, got {shown(value)}")
    start_s = _whole_seconds(clip.start, "time_start", clip.location)
    end_s = _whole_seconds(clip.end, "time_end", clip.location)
    # The file name that all download tools for Kinetics use.
    return AnnotationEntry(f"{clip.youtube_id}_{start_s:06d}_{end_s:06d}.mp4", clip.label, clip.location)


def _whole_seconds(value: Any, column: str, location: str) -> int:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):  # Overflow: JSON has integers of any size
        seconds = -1.0
    if not (seconds.is_integer() and 0 <= seconds < _MAX_SECONDS):
        raise ConfigError(f"{location}: {column}: expected a whole number of seconds, got {shown(value)}")
    return int(seconds)


def _something_something(content: list[Any], path: Path, root: Path) -> AnnotationSource:
    entries, classes = [], set()
    for number, video in enumerate(content, start=1):
        location = f"{path}: entry {number}"
        if not isinstance(video, dict) or not video.get("id"):
            raise ConfigError(f'{location}: expected an object with "id" and "template", got {shown(video)}')
        if video.get("template"):
            label = str(video["template"]).replace("[", "").replace("]", "")
            classes.add(label)
        elif video.get("label"):
            # `label` is a caption of this video, such as "holding potato". It is rarely a class, so it is
            # looked up in data.classes and does not add a class.
            label, location = str(video["label"]), f"{location}, which has no template"
        else:
            raise ConfigError(
                f"{location}: {str(video['id'])[:_MAX_SHOWN]} has neither template nor label; "
                "a test split cannot be used"
            )
        entries.append(AnnotationEntry(f"{video['id']}.webm", label, location))
    return AnnotationSource(entries, root, "table", frozenset(classes))
