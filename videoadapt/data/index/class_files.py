"""Reads the class names of `data.classes`, in the shapes that other projects write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from videoadapt.data.index.class_names import CLASS_SETS, class_set, whole_number
from videoadapt.data.index.text import csv_rows, header, read_json, read_text, require_usable, strip_quotes
from videoadapt.errors import ConfigError, shown

_MAX_LINE_CHARACTERS = 500
_NUMBER_FIRST = re.compile(r"(\d+)(?:[ \t]*[,;:|\t][ \t]*|[.)]?[ \t]+)(.+)")
_NUMBER_LAST = re.compile(r"(.*[^ \t,;:|])(?:[ \t]*[,;:|\t][ \t]*|[ \t]+)(\d+)")

# Columns of a CSV, in lower case. `label` is a name beside a number, and a number beside a name.
_NUMBER_COLUMNS = ("id", "class_id", "label_id", "index", "idx", "number", "class_index", "classid", "label")
_NAME_COLUMNS = (
    "name",
    "class",
    "class_name",
    "classname",
    "label_name",
    "display_name",
    "action",
    "category",
    "label",
)


class ClassFile(NamedTuple):
    """The classes of a file."""

    names: tuple[str, ...]  # in label order
    first: int | None = None  # the number of the first class, 0 or 1; None if the file has no numbers
    note: str = ""  # a message for the user on how the file was read


def read_classes(path: Path) -> ClassFile:
    """Returns the class names of `data.classes` in label order.

    Numbers count from 0 or from 1.

    Args:
        path: One of these; `kinetics400`, `kinetics600` and `kinetics700` select a built-in list if no file has this
            name.

            - A text file with a line per class: names in label order, or names with their numbers before or after them.
            - A CSV with a header that names a column of numbers (`id`) and one of names (`name`).
            - JSON: a list of names, or an object from names to numbers or from numbers to names.

    Raises:
        ConfigError: The file cannot be read, or its numbers have a gap.
    """
    if str(path) in CLASS_SETS and not path.is_file():
        return ClassFile(class_set(str(path)))
    if path.suffix.lower() == ".json":
        found = _from_json(read_json(path, "data.classes"), path)
    else:
        if not path.exists():
            raise ConfigError(f"data.classes: {path} does not exist; built in are {', '.join(CLASS_SETS)}")
        found = _from_text(read_text(path, "data.classes"), path)
    if not found.names:
        raise ConfigError(f"data.classes: {path}: names no class")
    for number, name in enumerate(found.names):
        require_usable(name, "name", f"data.classes: {path}: class {number}")
    return found


def write_classes(names: Sequence[str]) -> tuple[str, str]:
    """Returns the name and the text of a file from which `read_classes` returns these names.

    It has a line per class. Names such as `1 run`, `2 walk` and `10 jump` would be read as names with numbers, in
    another order: they are a JSON list.
    """
    text = "".join(f"{name}\n" for name in names)
    with suppress(ConfigError):
        if _from_text(text, Path("classes.txt")).names == tuple(names):
            return "classes.txt", text
    return "classes.json", json.dumps(list(names), ensure_ascii=False, indent=0) + "\n"


def _from_text(text: str, path: Path) -> ClassFile:
    columns = _columns(header(text))
    if columns is not None:
        number, name = columns
        return _by_number([(names, count) for _, (names, count) in csv_rows(text, (name, number), path)], path)
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if not lines:
        return ClassFile(())
    longest = max(lines, key=len)
    if len(longest) > _MAX_LINE_CHARACTERS:  # before expressions that take more than linear time
        raise ConfigError(f"data.classes: {path}: expected a name a line, got {shown(longest)}")
    for pattern, where in ((_NUMBER_FIRST, "before"), (_NUMBER_LAST, "after")):
        numbered = _numbered(lines, pattern)
        if numbered is None:
            continue
        found = _by_number(numbered, path)
        note = f"data.classes: {path}: the number {where} each name is its number, such as {lines[0]!r}"
        return found._replace(note=". ".join(filter(None, (note, found.note))))
    return ClassFile(tuple(filter(None, map(strip_quotes, lines))))


def _columns(names: Sequence[str]) -> tuple[str, str] | None:
    """Returns the columns of numbers and names of a CSV, or None if the first line is not such a header."""
    number = next((column for column in _NUMBER_COLUMNS if column in names), None)
    name = next((column for column in _NAME_COLUMNS if column in names and column != number), None)
    return (number, name) if number is not None and name is not None else None


def _numbered(lines: Sequence[str], pattern: re.Pattern[str]) -> list[tuple[str, str]] | None:
    """Returns names and numbers if all lines have both and no name occurs twice, as in `level 1` and `level 2`."""
    pairs = []
    for line in lines:
        match = pattern.fullmatch(line)
        if match is None:
            return None
        pairs.append((match[2], match[1]) if pattern is _NUMBER_FIRST else (match[1], match[2]))
    return pairs if len({name for name, _ in pairs}) == len(pairs) else None


def _from_json(content: Any, path: Path) -> ClassFile:
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):  # the config of a Hugging Face model
        content = content["id2label"]
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return ClassFile(tuple(map(strip_quotes, content)))
    if isinstance(content, list):
        return _by_number(_objects(content, path), path)
    if not isinstance(content, dict):
        raise ConfigError(
            f"data.classes: {path}: expected a JSON object from class names to numbers, or a list of names"
        )
    if any(not isinstance(value, (str, int)) for value in content.values()):
        raise ConfigError(f"data.classes: {path}: expected a whole number for each class: {shown(content)}")
    by_name = [(name, str(number)) for name, number in content.items()]
    if any(whole_number(number) is None for _, number in by_name) and all(
        whole_number(name) is not None for name, _ in by_name
    ):
        by_name = [(number, name) for name, number in by_name]
    return _by_number(by_name, path)


def _objects(content: list[Any], path: Path) -> Iterator[tuple[str, str]]:
    for number, item in enumerate(content, start=1):
        columns = _columns(list(item)) if isinstance(item, dict) else None
        if columns is None:
            raise ConfigError(
                f"data.classes: {path}: entry {number}: expected a name, or an object with `id` and `name`"
            )
        yield str(item[columns[1]]), str(item[columns[0]])


def _by_number(numbered: Iterable[tuple[str, str]], path: Path) -> ClassFile:
    pairs = []
    for name, text in numbered:
        number = whole_number(text)
        if number is None:
            raise ConfigError(
                f"data.classes: {path}: expected a whole number for each class, got {shown(text)} for {shown(name)}"
            )
        pairs.append((number, strip_quotes(name)))
    pairs.sort()
    names = tuple(name for _, name in pairs)
    for first in (0, 1):
        if [number for number, _ in pairs] == list(range(first, first + len(pairs))):
            note = f"data.classes: {path} numbers the classes from 1; {names[0]!r} has the label 0" if first else ""
            return ClassFile(names, first, note)
    raise ConfigError(
        f"data.classes: {path}: expected each number from 0 to {len(pairs) - 1} once, or from 1 to {len(pairs)}; if "
        "the numbers are parts of the names, write the names as a JSON list"
    )
