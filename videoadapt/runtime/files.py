"""Atomic file writes: a file is written completely or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd  # takes half a second to import, which commands without tables need not wait for


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` at the end.

    After an exception, or if the process is killed, `path` is unchanged. The parent folder is created if necessary.

    Args:
        path: The file to create or replace.

    Yields:
        A hidden file in the same folder, so that the renaming is atomic.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # Without fsync, a power failure after the renaming could leave an empty file under the final name.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp allows the owner only, but colleagues read run folders
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the renaming is a change of the folder
        finally:
            os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot represent.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Writes a table as Parquet, atomically and without its index."""
    with replacing(path) as temporary:
        frame.to_parquet(temporary, index=False)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes a table as CSV, atomically and without its index."""
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False)
