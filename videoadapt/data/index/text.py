"""Reads text, JSON and CSV files that people wrote. Each error names the file and, if possible, the line."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from videoadapt.config import parse
from videoadapt.errors import ConfigError, shown

_MAX_CHARACTERS = 10_000  # of a path or a label; a path has at most 4,096 bytes
_MAX_SHOWN = 200  # characters of a line in a message
_SURROGATE = re.compile("[\ud800-\udfff]")
_FOLDER_CHARACTERS = str.maketrans({" ": "_", "(": "-", ")": "-", "'": "-"})


def read_text(path: Path, field: str) -> str:
    r"""Returns the text of a UTF-8 file, with `\n` as line ends and without a byte order mark.

    Args:
        path: The file.
        field: The config field that names the file, for error messages.

    Raises:
        ConfigError: The file cannot be read, is larger than 256 MiB, is no regular file, or is not UTF-8.
    """
    try:
        # -sig: spreadsheets on Windows write a byte order mark.
        return parse.read_text(path, parse.MAX_TEXT_BYTES, "utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{field}: {path} is not a text file in UTF-8") from None


def read_json(path: Path, field: str) -> Any:
    """Returns the content of a JSON file.

    Args:
        path: The file.
        field: The config field that names the file, for error messages.

    Raises:
        ConfigError: The file cannot be read or is not valid JSON, or an object has a key twice.
    """
    try:
        return parse.parse_json(read_text(path, field))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: not usable JSON: {error}") from None


def require_usable(text: str, what: str, location: str) -> None:
    """Checks that a text from annotations can be the name of a file, and can be written in UTF-8.

    Args:
        text: The text.
        what: Its meaning, for the message: `path` or `label`.
        location: File and line, for the message.

    Raises:
        ConfigError: It has a NUL character or half of a surrogate pair, or more than 10,000 characters.
    """
    if len(text) <= _MAX_CHARACTERS and "\0" not in text and not _SURROGATE.search(text):
        return
    raise ConfigError(
        f"{location}: {what} {shown(text)}: expected at most {_MAX_CHARACTERS:,} characters in UTF-8, none of them NUL"
    )


def header(text: str) -> list[str]:
    """Returns the fields of a text's first line in lower case. In a CSV, they are the column names."""
    return [strip_quotes(name).lower() for name in text.partition("\n")[0].split(",")]


def csv_rows(text: str, columns: Sequence[str], path: Path) -> Iterator[tuple[str, list[str]]]:
    """Iterates over the rows of a CSV that has a header. Blank lines and other columns are skipped.

    Args:
        text: The content of the CSV.
        columns: Lower-case names of the columns to return.
        path: The file, for error messages.

    Yields:
        `FILE:LINE` of the row, and the row's fields in the order of `columns`.

    Raises:
        ConfigError: A column is missing, a row is too short, or a row is not valid CSV.
    """
    names = header(text)
    missing = [column for column in columns if column not in names]
    if missing:
        raise ConfigError(
            f"{path}:1: no column {' or '.join(missing)}; expected {', '.join(columns)}, got "
            f"{', '.join(names)[:_MAX_SHOWN]}"
        )
    indices = [names.index(column) for column in columns]
    reader = csv.reader(io.StringIO(text, newline=""))  # newline="": the csv module splits the lines itself
    next(reader)  # the header
    try:
        for row in reader:
            if not any(row):
                continue
            if len(row) <= max(indices):
                raise ConfigError(f"{path}:{reader.line_num}: expected {len(names)} fields, got {len(row)}")
            yield f"{path}:{reader.line_num}", [row[index].strip() for index in indices]
    except csv.Error as error:  # for example a quote that is never closed: the field grows beyond the limit
        raise ConfigError(f"{path}:{reader.line_num}: not a row of a CSV: {error}") from None


def normalised(name: str) -> str:
    """Returns the form of a class name for comparisons.

    `arm wrestling` and a folder `arm_wrestling` are equal, and so are `curling (sport)` and `curling_-sport-`, which
    is MMAction2's name of its folder. Both unicode forms of a letter with an accent are equal.
    """
    return nfc(strip_quotes(name)).translate(_FOLDER_CHARACTERS)


def nfc(text: str) -> str:
    """Returns a text in the composed unicode form. macOS stores names in the decomposed form: `e` and an accent."""
    return unicodedata.normalize("NFC", text)


def strip_quotes(name: str) -> str:
    """Removes spaces and double quotes at both ends. Some label maps quote names inside JSON strings."""
    return name.strip().strip('"')
