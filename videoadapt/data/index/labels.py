"""Finds the class of each video of a list, and compares it with the class that the path names.

A list may count its labels from 0 or from 1, and a label beside the wrong class looks like any other number. Folders
and file names (`Archery/v_Archery_g01_c01.avi`) often name the class, and show which numbers are meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

from videoadapt.data.index.class_names import (
    CLASS_SETS,
    class_number,
    class_set,
    class_set_of_size,
    numbers_of,
    whole_number,
)
from videoadapt.data.index.sources import AnnotationEntry, AnnotationSource
from videoadapt.data.index.text import nfc, normalised
from videoadapt.errors import ConfigError

_PARENTS_OF_ABSOLUTE_PATHS = 2  # folders further up are of the machine: /home/run is not the class `run`
_MIN_CHARACTERS_IN_FILE_NAME = 3  # of a class name; `a.mp4` does not name the class `a`
_MAX_SHOWN = 100  # characters of a label in a message
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Classes:
    """The classes of a config."""

    names: tuple[str, ...]  # in label order; empty if the classes have no names
    origin: str  # the file or folder that gave the names, for messages
    count: int  # model.num_classes
    first: int | None = None  # the number of the first class in data.classes; None if it has no numbers

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Number of each class, by normalised name."""
        return numbers_of(self.names)

    def number(self, entry: AnnotationEntry, first: int = 0) -> int:
        """Returns the class number of an entry. `first` is the number that its source gives to class 0.

        Raises:
            ConfigError: The label is neither a name nor a number, or is not in the range of the classes.
        """
        number = class_number(entry.label, self.numbers, first=first, origin=self.origin, location=entry.location)
        if not 0 <= number < self.count:
            hint = "; -1 often stands for a video without a label" if entry.label == "-1" else ""
            raise ConfigError(
                f"{entry.location}: label {entry.label[:_MAX_SHOWN]} of {entry.name}: expected {first} to "
                f"{self.count - 1 + first} (model.num_classes){hint}"
            )
        return number


def label_lists(lists: Sequence[AnnotationSource], classes: Classes) -> tuple[list[list[int]], list[str]]:
    """Returns the class number of each entry of each list, and messages for the user.

    Args:
        lists: The lists of all splits. They count labels from the same number.
        classes: The classes.

    Raises:
        ConfigError: A label cannot be used, or contradicts the class that all paths of a folder name.
    """
    named = ClassesInPaths.of(lists, classes)
    notes = []
    entries, unlabelled = [], []
    for source in lists:
        given = [named.label(entry, classes) for entry in source.entries]
        unlabelled += [entry for entry in source.entries if not entry.label]
        entries.append(given)
    if unlabelled:
        notes.append(
            f"videos without a label, which have the class of their folder: {len(unlabelled)}, the first: "
            f"{unlabelled[0].location}: {unlabelled[0].name}"
        )
    every = [entry for given in entries for entry in given]
    first, note = _first_label(every, named, classes)
    notes += [note] if note else []
    numbers = [[classes.number(entry, first) for entry in given] for given in entries]
    notes += named.compare(every, [number for given in numbers for number in given], classes)
    return numbers, notes


class ClassesInPaths:
    """The classes that the paths of lists name, by a folder or by the file name."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self._numbers = numbers
        # Words of each class name, longest first: `arm wrestling` rather than `wrestling`.
        words = {tuple(_words(name)): number for name, number in numbers.items()}
        self._words = {
            key: number for key, number in words.items() if len("".join(key)) >= _MIN_CHARACTERS_IN_FILE_NAME
        }
        self._longest = max(map(len, self._words), default=0)

    @classmethod
    def of(cls, lists: Sequence[AnnotationSource], classes: Classes) -> ClassesInPaths:
        """Uses the class names; without names, those of a named set if all folders of a list are its classes."""
        if classes.names:
            return cls(classes.numbers)
        key = class_set_of_size(classes.count)
        usual = cls(numbers_of(class_set(key)) if key else {})
        # One folder that is not a class: this is another data set, with another order.
        fits = any(all(usual._in_folder(entry) is not None for entry in source.entries) for source in lists)
        return usual if fits else cls({})

    def named(self, entry: AnnotationEntry) -> int | None:
        """Returns the class that a path names, or None."""
        number = self._in_folder(entry)
        return self._in_file_name(entry) if number is None else number

    def label(self, entry: AnnotationEntry, classes: Classes) -> AnnotationEntry:
        """Returns an entry without a label with the class of its folder, and any other entry as it is.

        Raises:
            ConfigError: No folder of its path is a class.
        """
        if entry.label:
            return entry
        number = self._in_folder(entry)
        if number is None or not classes.names:
            raise ConfigError(
                f"{entry.location}: expected `path label`, got {entry.name!r}; a video without a label needs a folder "
                f"that is a class{f' of {classes.origin}' if classes.names else ', and class names in data.classes'}"
            )
        return entry._replace(label=classes.names[number])

    def compare(self, entries: Sequence[AnnotationEntry], numbers: Sequence[int], classes: Classes) -> list[str]:
        """Compares labels with the classes that the paths name.

        Returns:
            A message if some videos have another label than others of their folder.

        Raises:
            ConfigError: All videos of a class by folder have another label, or most videos of a class by file name.
        """
        wrong: dict[int, list[tuple[AnnotationEntry, int]]] = {}
        right: dict[int, int] = {}
        for entry, number in zip(entries, numbers, strict=True):
            named = self.named(entry)
            if named == number:
                right[number] = right.get(number, 0) + 1
            elif named is not None:
                wrong.setdefault(named, []).append((entry, number))
        for named, videos in wrong.items():
            entry, number = videos[0]
            # A file name may have the words of a class by chance, so that one of them proves nothing.
            by_folder = self._in_folder(entry) is not None
            if not right.get(named) and (by_folder or sum(map(len, wrong.values())) > sum(right.values())):
                raise ConfigError(self._contradiction(entry, number, named, classes))
        if not wrong:
            return []
        entry, number = next(iter(wrong.values()))[0]
        count = sum(map(len, wrong.values()))
        return [
            f"videos with another label than the class that their path names: {count}, the first: {entry.location}: "
            f"{entry.name}: label {entry.label}"
        ]

    def _contradiction(self, entry: AnnotationEntry, number: int, named: int, classes: Classes) -> str:
        folder = self._folder(entry)
        place = folder if folder is not None else PurePath(entry.name).name
        if classes.names:
            return (
                f"{entry.location}: label {entry.label} is {classes.names[number]!r}, but {place} names the class "
                f"{classes.names[named]!r}, number {named}; number the labels in the order of {classes.origin}, from "
                "0, or rename the file or folder"
            )
        key = class_set_of_size(classes.count)
        assert key is not None  # otherwise no path names a class
        return (
            f"{entry.location}: label {entry.label}, but {place} is class {named} in the order of {CLASS_SETS[key]} "
            f"that released models share; number the labels as data.classes={key} does, from 0"
        )

    def _in_folder(self, entry: AnnotationEntry) -> int | None:
        folder = self._folder(entry)
        return None if folder is None else self._numbers[normalised(folder)]

    def _folder(self, entry: AnnotationEntry) -> str | None:
        """Returns the nearest folder of a path that is a class."""
        path = PurePath(entry.name)
        parents = [parent.name for parent in path.parents]
        if path.is_absolute():
            del parents[_PARENTS_OF_ABSOLUTE_PATHS:]
        return next((name for name in parents if normalised(name) in self._numbers), None)

    def _in_file_name(self, entry: AnnotationEntry) -> int | None:
        """Returns the only class whose words follow each other in a file name, or None."""
        words = _words(PurePath(entry.name).stem)
        found: dict[int, range] = {}
        for length in range(min(self._longest, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                place = range(start, start + length)
                number = self._words.get(tuple(words[start : start + length]))
                inside = any(place.start >= longer.start and place.stop <= longer.stop for longer in found.values())
                if number is not None and not inside:
                    found[number] = place
        return next(iter(found)) if len(found) == 1 else None


def _words(name: str) -> list[str]:
    return _WORD.findall(nfc(name).casefold())


def _first_label(entries: Sequence[AnnotationEntry], named: ClassesInPaths, classes: Classes) -> tuple[int, str]:
    """Returns whether lists count labels from 0 or from 1, and a message for the user if that is not obvious.

    Raises:
        ConfigError: The labels seem to count from 1, and nothing else says so.
    """
    numbered = [
        (entry, number)
        for entry in entries
        if normalised(entry.label) not in classes.numbers and (number := whole_number(entry.label)) is not None
    ]
    given = {number for _, number in numbered}
    if not given or min(given) < 0 or max(given) > classes.count:
        return 0, ""  # names, or numbers that are refused one by one
    if 0 in given:
        return 0, f"the labels of the lists count from 0, {classes.origin} counts from 1" if classes.first == 1 else ""
    pairs = [(number, place) for entry, number in numbered if (place := named.named(entry)) is not None]
    from_0 = sum(number == place for number, place in pairs)
    from_1 = sum(number == place + 1 for number, place in pairs)
    if from_1 > from_0:
        return 1, f"labels count from 1, as the paths show: label 1 is class 0{_first_name(classes)}"
    if classes.first == 1 and from_0 == 0:
        return 1, f"labels count from 1, as {classes.origin} does: label 1 is class 0{_first_name(classes)}"
    if classes.count in given and not from_0:
        entry = next(entry for entry, number in numbered if number == classes.count)
        raise ConfigError(
            f"{entry.location}: label {entry.label} of {entry.name}: expected 0 to {classes.count - 1} "
            f"(model.num_classes); the labels go from {min(given)} to {classes.count} and seem to count from 1: "
            "subtract 1 from each, or give the classes with their numbers in data.classes, a line `1 NAME` for each"
        )
    return 0, ""


def _first_name(classes: Classes) -> str:
    return f", {classes.names[0]!r}" if classes.names else ""
