"""Finds video files below a root folder by their names, in any layout of folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from videoadapt.data.index.text import normalised
from videoadapt.data.video.probe import VIDEO_SUFFIXES

# A YouTube id of 11 characters, then the start and the end of the clip in seconds.
_KINETICS_NAME = re.compile(r"(?:.*/)?(([A-Za-z0-9_-]{11})_\d{6}_\d{6})(?:\.\w+)?")
_WORDS = re.compile(r"[a-z]+")


def video_id(name: str) -> tuple[str, str]:
    """Returns the id of a video and the YouTube id of its source.

    A Kinetics clip has the same id in every folder and container, for example `0wR5jVB-WPk_000417_000427`. The id of
    any other video is `name` itself, and its YouTube id is empty.

    Args:
        name: Path of the video in the annotations.
    """
    kinetics = _KINETICS_NAME.fullmatch(name)
    return (kinetics[1], kinetics[2]) if kinetics else (name, "")


def walk(root: Path, onerror: Callable[[OSError], object] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Iterates over a folder and all folders below it. Symbolic links are followed, each folder is visited once.

    Args:
        root: The folder to start from.
        onerror: Called with the error of a folder that cannot be read. None skips unreadable folders.

    Yields:
        The path of a folder and the sorted names of its files.
    """
    seen = set()
    for parent, folders, files in os.walk(root, onerror=onerror, followlinks=True):
        stat = os.stat(parent)
        # A link may point to a parent of itself: without this check the walk would never end.
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()  # os.walk visits the folders in this list
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()  # in place: os.walk visits the folders in this order
        yield parent, sorted(files)


def files_by_stem(root: Path) -> dict[str, list[str]]:
    """Returns the paths of all video files below `root`, by file name without suffix."""
    found: dict[str, list[str]] = {}
    for parent, files in walk(root):
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in VIDEO_SUFFIXES:
                found.setdefault(stem, []).append(os.path.join(parent, name))
    return found


def best_first(paths: list[str], root: Path, split_names: frozenset[str], label: str) -> list[str]:
    """Sorts several files with the name of one video, the most likely file first.

    Files below a folder of the video's split come first, then files below a folder of its class, then the others by
    path.

    Args:
        paths: Files of the same name, all below `root`.
        root: The folder that was searched. Its own path is not considered.
        split_names: Names of the split. They match whole words of a folder's name: `val` matches `videos_val`.
        label: Class name of the video.
    """

    def rank(path: str) -> tuple[bool, bool, str]:
        folders = PurePath(path).relative_to(root).parts[:-1]
        words = {word for folder in folders for word in _WORDS.findall(folder.lower())}
        return not words & split_names, normalised(label) not in map(normalised, folders), path  # False sorts first

    return sorted(paths, key=rank)
