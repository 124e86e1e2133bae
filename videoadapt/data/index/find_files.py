"""Finds video files by their names: below a root folder in any layout, or near the path that a list states."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from videoadapt.data.index.text import nfc, normalised
from videoadapt.data.video.suffixes import is_image, is_media, is_video, suffix_of

# A YouTube id of 11 characters, then the start and the end of the clip in seconds.
_KINETICS_NAME = re.compile(r"(?:.*/)?(([A-Za-z0-9_-]{11})_\d{6}_\d{6})(?:\.\w+)?")
_WORDS = re.compile(r"[a-z]+")

# Folders that network drives and archive programs add beside videos, in lower case. They hold thumbnails and deleted
# files, some under the names of the videos.
_FOREIGN_FOLDERS = frozenset(
    {"@eadir", "__macosx", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "lost+found"}
    | {"system volume information"}
)


def video_id(name: str) -> tuple[str, str]:
    """Returns the id of a video and the YouTube id of its source.

    A Kinetics clip has the same id in every folder and container, for example `0wR5jVB-WPk_000417_000427`. The id of
    any other video is `name` itself, and its YouTube id is empty.

    Args:
        name: Path of the video in the annotations.
    """
    kinetics = _KINETICS_NAME.fullmatch(name)
    return (kinetics[1], kinetics[2]) if kinetics else (name, "")


def is_clip_id(video: str) -> bool:
    """Returns whether the id of a video is that of a Kinetics clip, which is the same in every folder."""
    return video_id(video)[1] != "" and video_id(video)[0] == video


def is_left_out(folder: str) -> bool:
    """Returns whether a folder of this name is not searched: it is hidden, or a program made it (`@eaDir`)."""
    return folder.startswith(".") or folder.lower() in _FOREIGN_FOLDERS


def walk(
    root: Path, onerror: Callable[[OSError], object] | None = None, left_out: list[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Iterates over a folder and all folders below it. Symbolic links are followed, each folder is visited once.

    Args:
        root: The folder to start from.
        onerror: Called with the error of a folder that cannot be read. None skips unreadable folders.
        left_out: Gets the paths of the folders that are not visited because of their name (see `is_left_out`).

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
        if left_out is not None:
            left_out += [os.path.join(parent, name) for name in sorted(folders) if is_left_out(name)]
        # In place: os.walk visits the folders in this order.
        folders[:] = sorted(name for name in folders if not is_left_out(name))
        yield parent, sorted(files)


def videos_below(root: Path) -> list[str]:
    """Returns the paths of all video files below `root` that are not hidden, in the order of the walk."""
    visible = ((parent, name) for parent, files in walk(root) for name in files if not name.startswith("."))
    return [os.path.join(parent, name) for parent, name in visible if is_video(name)]


def media_below(root: Path, left_out: list[str], *, images: bool) -> list[str]:
    """Returns the paths of all videos below `root`: video files, and folders with images but without video files.

    Args:
        root: The folder.
        left_out: Gets the paths of all other files and folders that are not hidden, and of folders that cannot be
            listed, with the reason.
        images: Each image of a folder without video files is a video, not the folder.
    """
    found: list[str] = []
    unvisited: list[str] = []
    unreadable: list[OSError] = []
    for parent, files in walk(root, unreadable.append, unvisited):
        visible = [name for name in files if not name.startswith(".")]
        videos = [name for name in visible if is_video(name)]
        frames = [] if videos else [name for name in visible if is_image(name)]
        found += [parent] if frames and not images else [os.path.join(parent, name) for name in videos or frames]
        left_out += [os.path.join(parent, name) for name in visible if name not in {*videos, *frames}]
    left_out += [folder for folder in unvisited if not os.path.basename(folder).startswith(".")]
    left_out += [f"{error.filename} ({error.strerror})" for error in unreadable]
    return found


def files_by_stem(root: Path) -> dict[str, list[str]]:
    """Returns the paths of all video files below `root`, by file name without suffix."""
    found: dict[str, list[str]] = {}
    for path in videos_below(root):
        found.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    return found


class NearFile(NamedTuple):
    """The file that a path of a list means."""

    path: str  # absolute; the path as listed if no file is found
    found_by: str = ""  # why the path differs from the listed one; empty if it does not
    similar: tuple[str, ...] = ()  # for a missing file: files in its folder with the same stem


class NearFiles:
    """Looks for the files of a list. Each folder is read once, because lists have many files in few folders."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, list[str]]] = {}  # folder -> composed stem -> file names

    def find(self, path: str) -> NearFile:
        r"""Finds the file of a listed path.

        A path that does not exist may be written in another unicode form than the file's name, with `\` for `/`, or
        without suffix. A file with another suffix is not taken, because it may be another file.

        Args:
            path: Absolute path.
        """
        folder, name = os.path.split(path)
        if name in self._stems(folder).get(_stem(name), ()) or os.path.exists(path):
            return NearFile(path)
        if "\\" in path and os.path.exists(path.replace("\\", "/")):
            return NearFile(path.replace("\\", "/"), "with / for \\")
        folder = self._folder(folder)
        files = self._stems(folder).get(_stem(name), [])
        for file in files:
            if nfc(file) == nfc(name):
                return NearFile(os.path.join(folder, file), "in another unicode form")
        videos = list(filter(is_video, files))
        if len(videos) == 1 and not is_media(name):
            return NearFile(os.path.join(folder, videos[0]), "without suffix")
        return NearFile(path, similar=tuple(os.path.join(folder, file) for file in filter(is_media, files)))

    def _folder(self, folder: str) -> str:
        """Returns a folder in the unicode form of its name on disk, or unchanged if there is no such folder."""
        found, missing = folder, []
        while not os.path.isdir(found) and os.path.basename(found):
            found, name = os.path.split(found)
            missing.append(name)
        for name in reversed(missing):
            same = [file for file in self._stems(found).get(_stem(name), ()) if nfc(file) == nfc(name)]
            if not same:
                return folder
            found = os.path.join(found, same[0])
        return found

    def _stems(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._names:
            stems: dict[str, list[str]] = {}
            try:
                names = sorted(os.listdir(folder))
            except OSError:  # a missing or unreadable folder: its files are reported one by one
                names = []
            for name in names:
                stems.setdefault(_stem(name), []).append(name)
            self._names[folder] = stems
        return self._names[folder]


def _stem(name: str) -> str:
    return nfc(os.path.splitext(name)[0] if is_media(name) else name)


def best_first(paths: list[str], root: Path, split_names: frozenset[str], label: str) -> list[str]:
    """Sorts several files with the name of one video, the most likely file first.

    Files below a folder of the video's split come first, then files below a folder of its class, then the others by
    path. Among equals an animated GIF comes last: it may be a preview.

    Args:
        paths: Files of the same name, all below `root`.
        root: The folder that was searched. Its own path is not considered.
        split_names: Names of the split. They match whole words of a folder's name: `val` matches `videos_val`.
        label: Class name of the video.
    """

    def rank(path: str) -> tuple[bool, bool, bool, str]:
        folders = PurePath(path).relative_to(root).parts[:-1]
        words = {word for folder in folders for word in _WORDS.findall(folder.lower())}
        in_class = normalised(label) in map(normalised, folders)
        return not words & split_names, not in_class, suffix_of(path) == ".gif", path  # False sorts first

    return sorted(paths, key=rank)
