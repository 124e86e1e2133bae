"""What a source of annotations gives: its entries, their classes, and what it passes over."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from videoadapt.data.video.suffixes import MediaKind

Split = Literal["train", "val", "holdout", "calibrate"]

# Splits that are drawn from `train`, by the fractions in `data` of the same names.
DRAWN: tuple[Split, ...] = ("holdout", "calibrate")
# Names of a split in tables and folders. Those in `DRAWN` are never named in annotations.
SPLIT_NAMES: dict[Split, frozenset[str]] = {
    "train": frozenset({"train"}),
    "val": frozenset({"val", "validate", "validation"}),
}


class AnnotationEntry(NamedTuple):
    """One video of a source."""

    name: str  # path of the video in the source; in a table, the name of its file
    label: str  # class name, or number; empty if the source has no label for it
    location: str  # file and line, or folder, for error messages
    frames: int | None = None  # number of frame images in the list, if given
    kind: MediaKind | None = None  # by its suffix; a folder of frames in a class folder is of kind `image`


@dataclass(frozen=True)
class AnnotationSource:
    """Content of one annotation file or folder, before video files and class numbers are looked up."""

    entries: list[AnnotationEntry]
    root: Path  # absolute; relative names start here
    format: Literal["table", "list", "folder"]
    classes: frozenset[str] = frozenset()  # class names in the source; empty for a list
    note: str = ""  # a message for the user about the source
    passed_over: dict[str, list[str]] = field(default_factory=dict)  # kind -> files or lines that are no entries
