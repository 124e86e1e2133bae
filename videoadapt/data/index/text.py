"""Text that people and other programs wrote, read with errors that name the file, and the line where there is one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from videoadapt.errors import ConfigError


def read_text(path: Path, field: str) -> str:
    r"""The text of a file in UTF-8, lines ended by `\n`. Raises `ConfigError`, naming the config's field."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{field}: {path} is not a text file in UTF-8") from None


def read_json(path: Path, field: str) -> Any:
    """What a JSON file holds. Raises `ConfigError`, naming file and line."""
    try:
        return json.loads(read_text(path, field))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None


def header(text: str) -> list[str]:
    """The column names of a CSV, if its first line holds such: its fields in lower case."""
    return [name.strip().strip('"').lower() for name in text.partition("\n")[0].split(",")]


def csv_rows(text: str, columns: Sequence[str], path: Path) -> Iterator[tuple[str, list[str]]]:
    """For each row of a CSV with a header, its file and line, and its fields in these columns, in this order.

    Other columns and blank lines are passed over. Raises `ConfigError`, naming file, line and column.
    """
    names = header(text)
    missing = [column for column in columns if column not in names]
    if missing:
        raise ConfigError(
            f"{path}:1: no column {' or '.join(missing)}; expected {', '.join(columns)}, got {', '.join(names)}"
        )
    places = [names.index(column) for column in columns]
    reader = csv.reader(io.StringIO(text, newline=""))
    next(reader)
    try:
        for row in reader:
            if not any(row):
                continue
            if len(row) <= max(places):
                raise ConfigError(f"{path}:{reader.line_num}: expected {len(names)} fields, got {len(row)}")
            yield f"{path}:{reader.line_num}", [row[place].strip() for place in places]
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: not a row of a CSV: {error}") from None


def normalised(name: str) -> str:
    """A class name as it is compared: folders are often called arm_wrestling for `arm wrestling`."""
    return _tidy(name).replace(" ", "_")


def _tidy(name: str) -> str:
    return name.strip().strip('"')  # some label maps quote what is already a string
