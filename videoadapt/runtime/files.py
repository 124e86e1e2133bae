"""Atomic writes (a file is written completely or not at all), and reads that name a damaged file and its remedy."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from videoadapt.config.parse import MAX_TEXT_BYTES, read_text
from videoadapt.errors import UserError
from videoadapt.runtime.console import say

if TYPE_CHECKING:
    import pandas as pd  # takes half a second to import, which commands without tables need not wait for
    import pyarrow as pa

Summary: TypeAlias = dict[str, Any]  # what a verb returns and writes as JSON
_DIGEST = b"videoadapt-digest"  # key in the metadata of a Parquet file
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD of fcntl.h, and the flag of renameat2(2)
# Names that `replacing` gives to temporary files: `.NAME.RANDOM.tmp`. Older versions wrote them without `.tmp`.
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp|\.(last|.+\.(safetensors|npz|parquet|jsonl?|csv))\.[a-z0-9_]{8}")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` at the end.

    After an exception, or if the process is killed, `path` is unchanged. The parent folder is created if necessary.

    Args:
        path: The file to create or replace.
        durable: Wait until the disk has it, milliseconds. Without, a power failure soon after may leave an empty file.

    Yields:
        A hidden file in the same folder, so that the renaming is atomic. It is locked until the end, so that
        `remove_abandoned` can tell the file of a killed process from the file of a running one.

    Raises:
        OSError: The disk is full, for example. The error names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with suppress(OSError):  # a file system without locks: an abandoned file stays there
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        if durable:
            _sync(temporary)
        temporary.chmod(0o644)  # mkstemp allows the owner only, but colleagues read run folders
        temporary.replace(path)
        if durable:
            _sync(path.parent)  # the renaming is a change of the folder
    except OSError as error:
        if error.errno is not None and error.filename in (None, name):
            error.filename = str(path)  # a failed write does not say of which file it was
        raise
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until the disk has a file, or the list of files in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder to write to, and puts it in the place of the folder `path` at the end.

    After an exception, or if the process is killed, `path` is unchanged. Files that only the old folder had are gone
    afterwards, so that no file of an earlier call stays beside those of this one. On a file system on which two folders
    cannot change places (NFS), a kill between two renames leaves the old folder as `.NAME.old`; the next call puts it
    back.

    Args:
        path: The folder to create or replace. Its parent is created if necessary.

    Yields:
        A hidden folder beside it, locked until the end as in `replacing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    _settle_old(path)  # of a process that was killed in the replacement
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        for name in filter(Path.is_file, temporary.rglob("*")):
            _sync(name)
        temporary.chmod(0o755)  # mkdtemp allows the owner only, but colleagues read run folders
        # A folder that is not empty cannot be replaced by renaming. Where two cannot change places at once, the old one
        # steps aside, under a name by which the next call finds it.
        if not (path.exists() and _exchange(temporary, path)):
            if path.exists():
                path.replace(_old_of(path))
            temporary.replace(path)
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)  # the old folder, if they changed places
        _settle_old(path)


def _old_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _settle_old(path: Path) -> None:
    """Removes the old folder of a complete replacement, and gives that of an incomplete one its name back."""
    old = _old_of(path)
    if old.is_dir():
        shutil.rmtree(old) if path.exists() else old.replace(path)


def _exchange(a: Path, b: Path) -> bool:
    """Lets two paths change places in one step; returns False where the system or the file system cannot (NFS)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Python has no function for it
    return bool(rename and rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def remove_abandoned(folder: Path) -> list[Path]:
    """Removes the temporary files and folders of killed processes in a folder, not in its subfolders.

    The file of a process that still writes is locked, and stays.

    Args:
        folder: The folder. It may be missing.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(folder.glob(".*")):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        with suppress(OSError):  # locked, or another process has just removed it
            handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # network file systems lock by writing
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
            finally:
                os.close(handle)
    return removed


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot represent.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Writes a table as Parquet, atomically and without its index, with `table_digest` in its metadata."""
    import pyarrow as pa

    table = pa.Table.from_pandas(frame, preserve_index=False)
    write_table(path, table.replace_schema_metadata())  # without pandas' metadata, which `to_pandas` trusts blindly


def write_table(path: Path, table: pa.Table) -> None:
    """Writes an Arrow table as `write_parquet` does, with the metadata of its schema."""
    from pyarrow import parquet

    metadata = (table.schema.metadata or {}) | {_DIGEST: table_digest(table).encode()}
    with replacing(path) as temporary:
        parquet.write_table(table.replace_schema_metadata(metadata), temporary, write_page_checksum=True)


def table_digest(table: pa.Table) -> str:
    """Returns 64 hex digits of SHA-256 over the names and values of all columns, and over the metadata of the schema.

    Two tables with the same rows in the same order have the same digest, whatever their chunks are.

    Args:
        table: Columns of numbers, booleans, text, or lists of these.
    """
    digest = hashlib.sha256(json.dumps(_own_metadata(table), sort_keys=True).encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"\n{name}\n".encode())
        for part in _as_bytes(column):
            digest.update(part)
    return digest.hexdigest()


def _own_metadata(table: pa.Table) -> dict[str, str]:
    metadata = table.schema.metadata or {}
    return {repr(key): repr(value) for key, value in metadata.items() if key != _DIGEST}


def _as_bytes(column: pa.ChunkedArray) -> Iterator[bytes | memoryview]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        yield pc.list_value_length(column).to_numpy().tobytes()
        column = pc.list_flatten(column)
    # As text, since values that are null have arbitrary bytes in the buffers of numbers.
    text = pc.fill_null(column.cast(pa.large_string()), "\0").combine_chunks()
    offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    yield np.diff(offsets).tobytes()
    if len(text) and offsets[-1] > offsets[0]:
        yield memoryview(text.buffers()[2])[offsets[0] : offsets[-1]]


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes a table as CSV, atomically and without its index."""
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False)


def read_json(path: Path, remedy: str, keys: Collection[str] = ()) -> Summary:
    """Reads a JSON object that another stage wrote.

    Args:
        path: The file.
        remedy: What the user can do if it is damaged, such as "run `label` again".
        keys: Keys that it must have.

    Raises:
        UserError: The file is missing or damaged, or lacks a key. The message ends with the remedy.
    """
    try:
        value = json.loads(read_text(path, MAX_TEXT_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; {remedy}") from None
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        raise UserError(f"{path}: damaged ({error.strerror}); {remedy}") from None  # too large, or no regular file
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise UserError(f"{path}: damaged ({_first_line(error)}); {remedy}") from None
    missing = [key for key in keys if key not in value] if isinstance(value, dict) else ["all keys"]
    if missing:
        raise UserError(f"{path}: damaged, or of another version (without {missing[0]}); {remedy}")
    return dict(value)


def read_parquet(path: Path, remedy: str, columns: Collection[str] = ()) -> pd.DataFrame:
    """Reads a table that another stage wrote with `write_parquet`; see `read_table`.

    Args:
        path: The file.
        remedy: As in `read_json`.
        columns: Columns that it must have.

    Raises:
        UserError: The file is missing or damaged, or lacks a column. The message ends with the remedy.
    """
    table = read_table(path, remedy).to_pandas()
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(f"{path}: damaged, or of another version (without the column {missing[0]}); {remedy}")
    return table


def read_table(path: Path, remedy: str) -> pa.Table:
    """Reads a Parquet file, and compares it with the digest that `write_table` put into its metadata.

    Prints a message about a file without a digest, which an older version wrote.

    Args:
        path: The file.
        remedy: As in `read_json`.

    Returns:
        The table, without the digest.

    Raises:
        UserError: The file is missing or damaged. The message ends with the remedy.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        metadata = dict(table.schema.metadata or {})
        recorded = metadata.pop(_DIGEST, None)
        if recorded is None:
            say(f"{path}: was written without a checksum, by an older version; damage in it cannot be found")
        elif recorded.decode(errors="replace") != table_digest(table):
            raise UserError(f"{path}: damaged (its checksum differs); {remedy}")
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; {remedy}") from None
    except (OSError, KeyError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({_first_line(error)}); {remedy}") from None
    # Of pandas' metadata, which older versions wrote, nothing is needed.
    return table.replace_schema_metadata({key: value for key, value in metadata.items() if key != b"pandas"})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
