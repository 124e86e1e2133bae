"""Named class sets (Kinetics-400, -600 and -700), their order, and the number of a class name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from videoadapt.data.index.text import normalised
from videoadapt.errors import ConfigError, shown

# A value of data.classes, and the file in this folder with the class names in the order of released models.
# kinetics400: label map of MMAction2. kinetics700: label map of MMAction2, equal to GluonCV's list. kinetics600: the
# names of Kinetics-600, in the order of UniFormerV2's map from Kinetics-600 to Kinetics-710 (also in MMAction2).
CLASS_SETS: Mapping[str, str] = {
    "kinetics400": "Kinetics-400",
    "kinetics600": "Kinetics-600",
    "kinetics700": "Kinetics-700",
}


@cache
def class_set(key: str) -> tuple[str, ...]:
    """Returns the class names of a named set, sorted. Released models and label maps use this order.

    Args:
        key: A key of `CLASS_SETS`.
    """
    return tuple(Path(__file__).with_name(f"{key}.txt").read_text(encoding="utf-8").splitlines())


def class_set_of_size(classes: int) -> str | None:
    """Returns the key of the named set with this number of classes, or None."""
    return next((key for key in CLASS_SETS if len(class_set(key)) == classes), None)


def numbers_of(names: Sequence[str]) -> dict[str, int]:
    """Returns the number of each class, by normalised name."""
    return {normalised(name): number for number, name in enumerate(names)}


def require_usual_order(names: Sequence[str], origin: str) -> None:
    """Checks that `names` are in the usual order, if they are the classes of a named set.

    Released weights with a head, and results by class, are only valid in this order.

    Args:
        names: Class names in label order. Names of another data set may have any order.
        origin: The file or folder that gave the names, for error messages.

    Raises:
        ConfigError: `names` are the names of a set in another order.
    """
    key = class_set_of_size(len(names))
    if key is None:
        return
    given, usual = list(map(normalised, names)), list(map(normalised, class_set(key)))
    if given == usual or set(given) != set(usual):  # not the same set: other classes, or only some of them
        return
    number = next(number for number, pair in enumerate(zip(given, usual, strict=True)) if pair[0] != pair[1])
    raise ConfigError(
        f"{origin}: class {number} is {names[number]!r}, but {class_set(key)[number]!r} in the order of "
        f"{CLASS_SETS[key]} that released models share; use data.classes={key}, and number the labels of lists in "
        "its order"
    )


def class_number(label: str, numbers: Mapping[str, int], *, first: int, origin: str, location: str) -> int:
    """Returns the number of a label, which is a class name or a number. A class name takes precedence.

    Args:
        label: The label in the annotations.
        numbers: Number of each class, by normalised name. Empty if the classes have no names.
        first: The number that the annotations give to class 0.
        origin: The file or folder that gave the class names, for error messages.
        location: File and line of the label, for error messages.

    Raises:
        ConfigError: The label is neither a name nor a number. The message suggests the most similar class name.
    """
    number = numbers.get(normalised(label))  # before numbers, because a class may be called `7`
    if number is not None:
        return number
    given = whole_number(label)
    if given is not None:
        return given - first
    if not numbers:
        raise ConfigError(f"{location}: label {shown(label)}: expected a number, or class names in data.classes")
    (similar,) = difflib.get_close_matches(  # cutoff 0: always one
        normalised(label)[:_MAX_COMPARED], numbers, n=1, cutoff=0.0
    )
    raise ConfigError(
        f"{location}: label {shown(label)}: expected a number or a class of {origin}; did you mean {similar!r}?"
    )


def whole_number(label: str) -> int | None:
    """Returns the number that a label states in decimal digits, or None if it is not such a number."""
    digits = label.removeprefix("-")
    # `int` would also accept `1_0`, other scripts' digits and, slowly, thousands of digits.
    return int(label) if digits.isascii() and digits.isdigit() and len(digits) <= _MAX_DIGITS else None


_MAX_DIGITS = 18
_MAX_COMPARED = 200  # characters; the time of a comparison grows with their square
