"""File checks and short error texts, shared by all readers."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from videoadapt.errors import VideoError

_MAX_REASON_CHARACTERS = 200
_HASH_CHUNK_BYTES = 1 << 20


def file_size(path: Path, if_missing: str = "") -> int:
    """Returns the size of a file in bytes, with one look at the file system.

    Args:
        path: The file.
        if_missing: The message about a file that does not exist; by default, the one of the system.

    Raises:
        VideoError: The file is missing, empty, or not a regular file.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError(f"{path}: {if_missing or error.strerror}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise VideoError(f"{path}: {reason(error)}") from None
    return _size_of_regular(path, status)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading. It asks the open file for its kind: each question by name is one more for the server.

    Raises:
        VideoError: The file is missing, empty, or not a regular file.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to open a pipe would block for ever
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from None
    with os.fdopen(number, "rb") as file:
        _size_of_regular(path, os.fstat(number))
        yield file


def _size_of_regular(path: Path, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{path}: not a regular file")
    if status.st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    return status.st_size


def exists(path: str | Path) -> bool:
    """Returns whether a file or folder exists, even if it cannot be read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # no permission, or a name that the file system rejects: the reader reports it
        return True
    return True


def digest(content: bytes = b"") -> hashlib.blake2b:
    """Returns the hash object that all content hashes use; its hexdigest has 32 digits."""
    return hashlib.blake2b(content, digest_size=16)


def hash_file(path: Path) -> str:
    """Returns 32 hex digits, the hash of a file's bytes.

    Raises:
        VideoError: The file cannot be read.
    """
    hashed = digest()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                hashed.update(chunk)
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from None
    return hashed.hexdigest()


def reason(error: BaseException) -> str:
    """Returns one line with the message of a library's error.

    Messages of decord contain a C++ stack trace; messages of PyAV repeat the path, but `strerror` does not.
    """
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    # An error without a message, such as EOFError(), is named by its class.
    return lines[0][:_MAX_REASON_CHARACTERS] if lines else type(error).__name__


def cause_of(path: str, error: VideoError) -> str:
    """Returns the message of an error without the path at its start."""
    return str(error).removeprefix(f"{path}: ")
