"""Class names in label order: read from the file in `data.classes`, or the built-in list of Kinetics-400."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from videoadapt.data.index.text import csv_rows, header, normalised, read_json, read_text, strip_quotes
from videoadapt.errors import ConfigError

KINETICS_400 = "kinetics400"  # this value of data.classes selects the built-in list


@cache
def kinetics400() -> tuple[str, ...]:
    """Returns the 400 class names of Kinetics-400, sorted. Released models and label maps use this order."""
    return tuple(Path(__file__).with_name("kinetics400.txt").read_text(encoding="utf-8").splitlines())


def read_classes(path: Path) -> tuple[str, ...]:
    """Returns the class names of `data.classes` in label order.

    Args:
        path: A text file with one name a line in label order, a CSV with the columns `id` and `name`, or a JSON
            object from names to numbers. `kinetics400` selects the built-in list if no file has this name.

    Raises:
        ConfigError: The file cannot be read, or its numbers are not 0, 1, 2, ... without a gap.
    """
    if str(path) == KINETICS_400 and not path.is_file():
        return kinetics400()
    if path.suffix.lower() == ".json":
        numbers = read_json(path, "data.classes")
        if not isinstance(numbers, dict):
            raise ConfigError(f"data.classes: {path}: expected a JSON object from class names to numbers")
        return _sort_by_number(((name, str(number)) for name, number in numbers.items()), path)
    text = read_text(path, "data.classes")
    if {"id", "name"} <= set(header(text)):
        return _sort_by_number(((name, number) for _, (name, number) in csv_rows(text, ("name", "id"), path)), path)
    return tuple(filter(None, map(strip_quotes, text.split("\n"))))


def _sort_by_number(numbered: Iterable[tuple[str, str]], path: Path) -> tuple[str, ...]:
    try:
        names = sorted((int(number), strip_quotes(name)) for name, number in numbered)
    except ValueError as error:
        raise ConfigError(f"data.classes: {path}: expected a whole number for each class: {error}") from None
    if [number for number, _ in names] != list(range(len(names))):
        raise ConfigError(f"data.classes: {path}: expected each number from 0 to {len(names) - 1} once")
    return tuple(name for _, name in names)


def require_usual_order(names: Sequence[str], origin: str) -> None:
    """Checks that `names` are in the usual order, if they are the classes of Kinetics-400.

    Released weights with a head, and results by class, are only valid in this order.

    Args:
        names: Class names in label order. Names of another data set may have any order.
        origin: The file or folder that gave the names, for error messages.

    Raises:
        ConfigError: `names` are the 400 names in another order.
    """
    given, usual = list(map(normalised, names)), list(map(normalised, kinetics400()))
    if given == usual or set(given) != set(usual):  # not the same set: other classes, or only some of the 400
        return
    number = next(number for number, pair in enumerate(zip(given, usual, strict=True)) if pair[0] != pair[1])
    raise ConfigError(
        f"{origin}: class {number} is {names[number]!r}, but {kinetics400()[number]!r} in the order of Kinetics-400 "
        f"that released models share; use data.classes={KINETICS_400}, and number the labels of lists in its order"
    )


def class_number(label: str, numbers: Mapping[str, int], *, origin: str, location: str) -> int:
    """Returns the number of a label, which is a class name or a number. A class name takes precedence.

    Args:
        label: The label in the annotations.
        numbers: Number of each class, by normalised name. Empty if the classes have no names.
        origin: The file or folder that gave the class names, for error messages.
        location: File and line of the label, for error messages.

    Raises:
        ConfigError: The label is neither a name nor a number. The message suggests the most similar class name.
    """
    number = numbers.get(normalised(label))  # before numbers, because a class may be called `7`
    if number is not None:
        return number
    try:
        return int(label)
    except ValueError:
        pass
    if not numbers:
        raise ConfigError(f"{location}: label {label!r}: expected a number, or class names in data.classes")
    (similar,) = difflib.get_close_matches(normalised(label), numbers, n=1, cutoff=0.0)  # cutoff 0: always one
    raise ConfigError(
        f"{location}: label {label!r}: expected a number or a class of {origin}; did you mean {similar!r}?"
    )
