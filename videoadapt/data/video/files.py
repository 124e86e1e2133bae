"""File checks and one-line causes of read errors, shared by all readers."""

from __future__ import annotations

import os
from pathlib import Path

from videoadapt.errors import VideoError


def file_size(path: Path) -> int:
    """Bytes of a file. Raises `VideoError` if it is missing, empty, or no plain file: a pipe would block for ever."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from None
    if not path.is_file():
        raise VideoError(f"{path}: not a file")
    if size == 0:
        raise VideoError(f"{path}: the file is empty")
    return size


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder, perhaps one that cannot be read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def reason(error: BaseException) -> str:
    """The message of a library in one line: decord's carry a C++ stack trace, PyAV's repeat the path."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def cause_of(path: str, error: VideoError) -> str:
    """Why a file cannot be read, without its path, which the messages begin with."""
    return str(error).removeprefix(f"{path}: ")
