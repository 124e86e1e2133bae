"""Where the file of a video is: found by its name, by one walk over a root, however the folders are laid out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from videoadapt.data.index.text import normalised
from videoadapt.data.video.probe import VIDEO_SUFFIXES

_KINETICS_NAME = re.compile(r"(?:.*/)?(([A-Za-z0-9_-]{11})_\d{6}_\d{6})(?:\.\w+)?")  # YouTube id, start and end in s
_WORDS = re.compile(r"[a-z]+")


def video_id(name: str) -> tuple[str, str]:
    """The id of a video, and the YouTube id of its source.

    A file of Kinetics has the same id in any folder and container: `0wR5jVB-WPk_000417_000427`. Any other has its path
    as it is given, and no source.
    """
    kinetics = _KINETICS_NAME.fullmatch(name)
    return (kinetics[1], kinetics[2]) if kinetics else (name, "")


def walk(root: Path, onerror: Callable[[OSError], object] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each folder below a root with the names of its files, sorted; links are followed, but into no folder twice.

    A folder that cannot be read is handed to `onerror`, or passed over.
    """
    seen = set()
    for parent, folders, files in os.walk(root, onerror=onerror, followlinks=True):
        stat = os.stat(parent)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()
        yield parent, sorted(files)


def files_by_stem(root: Path) -> dict[str, list[str]]:
    """The paths of all video files below a root, by their names without suffix."""
    found: dict[str, list[str]] = {}
    for parent, files in walk(root):
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in VIDEO_SUFFIXES:
                found.setdefault(stem, []).append(os.path.join(parent, name))
    return found


def best_first(paths: list[str], root: Path, split_names: frozenset[str], label: str) -> list[str]:
    """Files of one name: below a folder named after the split, then in one named as the class, then in order.

    `split_names` are looked for as words: `val` is in `videos_val`.
    """

    def rank(path: str) -> tuple[bool, bool, str]:
        folders = PurePath(path).relative_to(root).parts[:-1]
        words = {word for folder in folders for word in _WORDS.findall(folder.lower())}
        return not words & split_names, normalised(label) not in map(normalised, folders), path

    return sorted(paths, key=rank)
