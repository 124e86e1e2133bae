"""Reads lists of TimeSformer, SlowFast, VideoMAE and MMAction2: one `path label` or `folder total_frames label` a line.

Spaces, tabs, commas or semicolons separate the fields. A path may contain them, and may stand in double quotes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple, NoReturn

from videoadapt.data.index.class_names import whole_number
from videoadapt.data.index.find_files import NearFiles
from videoadapt.data.index.sources import AnnotationEntry, AnnotationSource, Split
from videoadapt.data.index.text import normalised, read_text, require_usable
from videoadapt.data.video.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_media, media_kind
from videoadapt.errors import ConfigError

_MAX_LINE_CHARACTERS = 10_000  # a path has at most 4,096 bytes
_MAX_SHOWN_CHARACTERS = 200

_SEPARATOR = re.compile(r"[ \t,;]+")
_QUOTED_PATH = re.compile(r'"((?:[^"]|"")+)"(?:[ \t,;]+(.*))?')  # "" stands for a quote inside quotes, as in a CSV
_FRAMES_AND_LABEL = re.compile(r"(\d+)[ \t,;]+(.*)")
_FOLDER_AND_FRAMES = re.compile(r"(.*[^ \t,;])[ \t,;]+(\d+)")
_FOLDER_AND_NUMBERS = re.compile(r"(.*?[^ \t,;])[ \t,;]+([-+.\d]+(?:[ \t,;]+[-+.\d]+)*)")
_NUMBERS = re.compile(r"[-+.\d \t,;]*\d[-+.\d \t,;]*")
# The first suffix of a video or image that a separator follows: fields after it are not part of the path.
_PATH_THEN_FIELDS = re.compile(
    rf"(.+?(?:{'|'.join(map(re.escape, sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES)))})\"?)[ \t,;]+([^/]*)", re.IGNORECASE
)
_DECIMAL = re.compile(r"-?\d+\.\d*")

_PATH_COLUMNS = frozenset(
    {"path", "file", "filename", "file_name", "filepath", "file_path", "name", "clip", "clip_name"}
)
_VIDEO_COLUMNS = frozenset({"video", "video_path", "video_name", "video_id", "image", "frame_dir", "folder", "id"})
_FRAME_COLUMNS = frozenset({"frames", "total_frames", "num_frames", "length"})
_LABEL_COLUMNS = frozenset({"label", "labels", "label_id", "class", "class_id", "class_name", "class_index", "target"})

_COMMENTS = "lines that begin with # (a file whose name begins with # is written ./#NAME)"
_HEADERS = "header lines"


class _Line(NamedTuple):
    text: str
    location: str  # FILE:LINE


def read_list(path: Path, split: Split, root: Path, known: Collection[str], files: NearFiles) -> AnnotationSource:
    """Reads a list. A line that begins with # is a comment, unless a file has the name that it states.

    Args:
        path: The list.
        split: The split of the list in the config, for error messages.
        root: Folder where relative paths start.
        known: Normalised class names. They show where the path ends and a label of several words begins.
        files: Finds the file that a path means.

    Raises:
        ConfigError: A line cannot be used. The message names file and line.
    """
    fields = _Fields(root, known, files)
    source = AnnotationSource([], root, "list")
    # `splitlines` would also split at characters such as U+2028, which a path may contain.
    for number, raw in enumerate(read_text(path, f"data.{split}.annotations").split("\n"), start=1):
        line = _Line(raw.strip(), f"{path}:{number}")
        if not line.text:
            continue
        if len(line.text) > _MAX_LINE_CHARACTERS:  # before expressions that take more than linear time
            raise ConfigError(f"{line.location}: the line has {len(line.text)} characters; expected `path label`")
        require_usable(line.text, "line", line.location)
        if fields.is_comment(line):
            source.passed_over.setdefault(_COMMENTS, []).append(_shown(line))
        elif not source.entries and fields.is_header(line):
            source.passed_over.setdefault(_HEADERS, []).append(_shown(line))
        else:
            source.entries.append(fields.entry(line))
    return source


def _shown(line: _Line) -> str:
    return f"{line.location}: {line.text[:_MAX_SHOWN_CHARACTERS]}"


class _Fields:
    """Splits the lines of one list into path, number of frames and label."""

    def __init__(self, root: Path, known: Collection[str], files: NearFiles) -> None:
        self._root = root
        self._files = files
        self._known = known
        # A label has at most as many separators as the longest class name.
        self._label_gaps = 1 + max((sum(name.count(mark) for mark in "_,;\t") for name in known), default=0)

    def is_comment(self, line: _Line) -> bool:
        if not line.text.startswith("#"):
            return False
        path, _ = self._split_label(line)
        return not self._exists(path)

    def is_header(self, line: _Line) -> bool:
        """Returns whether a line has the names of the columns of a list.

        Raises:
            ConfigError: The line has names of columns in another order, or of columns that are not supported.
        """
        names = [name.strip('"').lower() for name in _SEPARATOR.split(line.text)]
        paths, labels = _PATH_COLUMNS | _VIDEO_COLUMNS, _LABEL_COLUMNS
        if len(names) == 1 or not (paths & set(names) and labels & set(names)) or names[-1] in self._known:
            return False
        if names[0] in paths and names[-1] in labels and _FRAME_COLUMNS.issuperset(names[1:-1]):
            return True
        if all(name in paths | labels | _FRAME_COLUMNS or name in {"", "index", "split"} for name in names):
            raise ConfigError(
                f"{line.location}: looks like a header of the columns {', '.join(names)}; expected the columns "
                "path, label; reorder the columns, or remove the others"
            )
        return False

    def entry(self, line: _Line) -> AnnotationEntry:
        """Returns the video of a line. Its label is empty if the line has none.

        Raises:
            ConfigError: The line has fields that are not understood.
        """
        quoted = _QUOTED_PATH.fullmatch(line.text)
        path, fields = (quoted[1].replace('""', '"'), quoted[2] or "") if quoted else self._split_path(line)
        counted = None if self._is_label(fields) else _FRAMES_AND_LABEL.fullmatch(fields)
        frames, label = (int(counted[1]), counted[2]) if counted else (None, fields)
        label = label.strip('"')
        if frames is not None and is_media(path) and not os.path.isdir(self._root / path):
            _refuse_fields(line, path, fields, "; three fields are for folders of frame images")
        if _NUMBERS.fullmatch(label) and whole_number(label) is None and not self._is_label(label):
            if _DECIMAL.fullmatch(label):
                raise ConfigError(
                    f"{line.location}: label {label!r}: expected a whole number or a class name; write "
                    f"{label.partition('.')[0]} (spreadsheets and pandas write 1.0 for 1 in a column with gaps)"
                )
            _refuse_fields(line, path, fields, ", or `folder total_frames label`")
        return AnnotationEntry(path, label, line.location, frames, media_kind(path))

    def _is_label(self, text: str) -> bool:
        return whole_number(text.strip('"')) is not None or normalised(text) in self._known

    def _split_label(self, line: _Line) -> tuple[str, str]:
        """Splits a line into path and label: at the first separator before a known class name, otherwise at the last.

        A line that ends in the suffix of a video, or that names an existing file as a whole, has no label.
        """
        text = line.text
        gaps = [gap for gap in _SEPARATOR.finditer(text) if gap.start() > 0]
        # The first match gives the longest class name: `arm wrestling` rather than `wrestling`.
        known = (gap for gap in gaps[-self._label_gaps :] if normalised(text[gap.end() :]) in self._known)
        gap = next(known, gaps[-1] if gaps else None)
        if gap is None:
            return text.strip('"'), ""
        path, label = text[: gap.start()].strip('"'), text[gap.end() :].strip('"')
        whole = text.strip('"')
        if not self._is_label(label) and (is_media(whole) or self._exists(whole)):
            return whole, ""
        return path, label

    def _split_path(self, line: _Line) -> tuple[str, str]:
        """Splits a line without quotes into the path and the fields after it: a label, or `total_frames label`."""
        path, label = self._split_label(line)
        if not label or is_media(path) or self._exists(path):  # a folder may itself be called `clip 7`
            return path, label
        file = _PATH_THEN_FIELDS.fullmatch(path)
        folder = _FOLDER_AND_FRAMES.fullmatch(path)
        if folder is not None and not os.path.isdir(self._root / folder[1].strip('"')):
            folder = _FOLDER_AND_NUMBERS.fullmatch(path)
        found = file if file is not None and not os.path.isdir(self._root / file[1].strip('"')) else folder
        return (found[1].strip('"'), f"{found[2]} {label}") if found is not None else (path, label)

    def _exists(self, path: str) -> bool:
        return os.path.exists(self._files.find(os.path.abspath(self._root / path)).path)


def _refuse_fields(line: _Line, path: str, fields: str, form: str) -> NoReturn:
    raise ConfigError(
        f"{line.location}: expected `path label`{form}; got the fields {fields[:_MAX_SHOWN_CHARACTERS]!r} after "
        f"{path[:_MAX_SHOWN_CHARACTERS]}. Several labels of one video (multi-label), start frames and times are not "
        'supported; a path that contains them is written in quotes: "PATH" LABEL'
    )
