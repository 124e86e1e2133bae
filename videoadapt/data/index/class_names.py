"""Class names in label order: from the file that a config names, or Kinetics-400's, in the order that all share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from videoadapt.data.index.text import _tidy, csv_rows, header, normalised, read_json, read_text
from videoadapt.errors import ConfigError

KINETICS_400 = "kinetics400"  # as a value of data.classes


@cache
def kinetics400() -> tuple[str, ...]:
    """The 400 names in the order of the label maps that come with released models and lists: sorted."""
    return tuple(Path(__file__).with_name("kinetics400.txt").read_text(encoding="utf-8").splitlines())


def read_classes(path: Path) -> tuple[str, ...]:
    """The names that `data.classes` stands for: a file's, or Kinetics-400's if no file is called `kinetics400`.

    A file holds a name a line, in label order; or is a CSV with the columns `id` and `name`; or a JSON object from
    names to numbers. Raises `ConfigError` unless the numbers are 0, 1, ... without a gap.
    """
    if str(path) == KINETICS_400 and not path.is_file():
        return kinetics400()
    if path.suffix.lower() == ".json":
        numbers = read_json(path, "data.classes")
        if not isinstance(numbers, dict):
            raise ConfigError(f"data.classes: {path}: expected a JSON object from class names to numbers")
        return _by_number(((name, str(number)) for name, number in numbers.items()), path)
    text = read_text(path, "data.classes")
    if {"id", "name"} <= set(header(text)):
        return _by_number(((name, number) for _, (name, number) in csv_rows(text, ("name", "id"), path)), path)
    return tuple(filter(None, map(_tidy, text.split("\n"))))


def _by_number(numbered: Iterable[tuple[str, str]], path: Path) -> tuple[str, ...]:
    try:
        names = sorted((int(number), _tidy(name)) for name, number in numbered)
    except ValueError as error:
        raise ConfigError(f"data.classes: {path}: expected a whole number for each class: {error}") from None
    if [number for number, _ in names] != list(range(len(names))):
        raise ConfigError(f"data.classes: {path}: expected each number from 0 to {len(names) - 1} once")
    return tuple(name for _, name in names)


def require_usual_order(names: Sequence[str], origin: str) -> None:
    """Raise `ConfigError` if these are the classes of Kinetics-400 in an order of their own.

    Weights with a head, and results by class, mean something only in the order that all share.
    """
    given, usual = list(map(normalised, names)), list(map(normalised, kinetics400()))
    if given == usual or set(given) != set(usual):
        return
    number = next(number for number, pair in enumerate(zip(given, usual, strict=True)) if pair[0] != pair[1])
    raise ConfigError(
        f"{origin}: class {number} is {names[number]!r}, but {kinetics400()[number]!r} in the order of Kinetics-400 "
        f"that released models share; use data.classes={KINETICS_400}, and number the labels of lists likewise"
    )


def class_number(label: str, numbers: Mapping[str, int], *, origin: str, where: str) -> int:
    """The number of a label, which is a class name or, failing that, a number.

    `numbers` are those of the plain names, which `origin` gave. Raises `ConfigError` for the label at `where`.
    """
    number = numbers.get(normalised(label))
    if number is not None:
        return number
    try:
        return int(label)
    except ValueError:
        pass
    if not numbers:
        raise ConfigError(f"{where}: label {label!r}: expected a number, or data.classes to name the classes")
    (near,) = difflib.get_close_matches(normalised(label), numbers, n=1, cutoff=0.0)
    raise ConfigError(f"{where}: label {label!r}: expected a number or a class of {origin}; did you mean {near!r}?")
