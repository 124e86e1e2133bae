"""Lists a folder with one folder per class, with videos or images at any depth.

An image directly in the folder of a class is a video of one frame. A deeper folder with images and no videos is one
video of these frames. Everything else is passed over, and counted by kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from videoadapt.data.index.find_files import is_left_out, walk
from videoadapt.data.index.sources import AnnotationEntry, AnnotationSource
from videoadapt.data.index.text import nfc
from videoadapt.data.video.suffixes import is_image, is_known, is_media, is_video, media_kind, suffix_of
from videoadapt.errors import ConfigError


@dataclass(frozen=True)
class ClassFolders:
    """The files of a folder per class, sorted by what their names say."""

    root: Path  # absolute
    classes: tuple[str, ...]  # names of the class folders, in label order
    entries: list[AnnotationEntry]  # videos, images, and files whose suffix does not say what they are
    passed_over: dict[str, list[str]]  # kind -> paths below root


def scan_class_folders(folder: Path) -> ClassFolders:
    """Sorts all files below a folder per class by their names. Opens none of them.

    Raises:
        ConfigError: A folder cannot be read.
    """
    found = ClassFolders(Path(os.path.abspath(folder)), tuple(_class_names(folder)), [], {})
    for path in _children(folder):
        if not path.is_dir():
            _pass_over(found, path.name, outside=True)
        elif is_left_out(path.name):
            found.passed_over.setdefault(_folder_kind(path.name), []).append(path.name)
        else:
            _scan_class(path, folder, found)
    return found


def read_class_folders(folder: Path, can_read: Callable[[Sequence[str]], set[str]]) -> AnnotationSource:
    """Lists the videos and images of a folder per class.

    Args:
        folder: The folder.
        can_read: Called with the absolute paths of files of unknown suffix. It returns those that are videos.

    Raises:
        ConfigError: A folder cannot be read.
    """
    found = scan_class_folders(folder)
    readable = can_read([str(found.root / entry.name) for entry in found.entries if entry.kind is None])
    entries = []
    for entry in found.entries:
        if entry.kind is not None:
            entries.append(entry)
        elif str(found.root / entry.name) in readable:
            entries.append(entry._replace(kind="video"))
        else:
            _pass_over(found, entry.name)
    return AnnotationSource(entries, found.root, "folder", frozenset(found.classes), passed_over=found.passed_over)


def _class_names(folder: Path) -> list[str]:
    names = [path.name for path in _children(folder) if path.is_dir() and not is_left_out(path.name)]
    return [nfc(name) for name in names]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda path: (nfc(path.name), path.name))
    except OSError as error:
        _refuse_folder(error)


def _scan_class(class_folder: Path, folder: Path, found: ClassFolders) -> None:
    left_out: list[str] = []
    for parent, files in walk(class_folder, onerror=_refuse_folder, left_out=left_out):
        relative = os.path.relpath(parent, folder).replace(os.sep, "/")
        entry = AnnotationEntry(relative, nfc(class_folder.name), str(class_folder))
        visible = [name for name in files if not name.startswith(".")]
        frames = set(filter(is_image, visible))
        if parent == str(class_folder) or any(map(is_video, visible)):
            frames.clear()
        if frames:
            found.entries.append(entry._replace(kind="image"))  # one video, with the images as its frames
        for name in files:
            path = f"{relative}/{name}"
            if name in frames:
                continue
            if name.startswith(".") or (is_known(name) and not is_media(name)):
                _pass_over(found, path)
            else:
                found.entries.append(entry._replace(name=path, kind=media_kind(name)))
    for path in left_out:
        found.passed_over.setdefault(_folder_kind(os.path.basename(path)), []).append(os.path.relpath(path, folder))


def _pass_over(found: ClassFolders, path: str, *, outside: bool = False) -> None:
    kind = _file_kind(path) + (" outside a class folder" if outside else "")
    found.passed_over.setdefault(kind, []).append(path)


def _file_kind(path: str) -> str:
    name = os.path.basename(path)
    if name.startswith("."):
        return "hidden files"
    return f"files {suffix_of(name)}" if suffix_of(name) else "files without suffix"


def _folder_kind(name: str) -> str:
    return "hidden folders" if name.startswith(".") else f"folders {name}"


def _refuse_folder(error: OSError) -> NoReturn:
    raise ConfigError(
        f"cannot read the folder {error.filename}: {error.strerror}; without it the list of videos is incomplete"
    ) from None
