"""Suggests the key that a wrong key was meant to be, or none: a far-fetched suggestion is worse than silence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_THRESHOLD = 0.65  # likeness below which nothing is suggested; two letters swapped in a word of three have 0.67
_SECTION = 0.7  # the same for sections, whose names are longer
_PART = 0.9  # likeness of names of which one is a part of the other: `batch` and `batch_size`
_MIN_START = 4  # letters that may stand for a longer word: `eval`, `optim`
_MAX_SUGGESTIONS = 3
_MAX_LETTERS = 60  # no longer word is compared; time grows with the square of its length
# What a key loses if it is in another section than the wrong one. A key with exactly the name loses little.
_NO_SECTION, _OTHER_SECTION, _SAME_NAME = 0.15, 0.25, 0.15


def suggest_keys(wrong: str, known: Sequence[str]) -> list[str]:
    """Returns the most similar keys, of the same likeness: for `epochs`, `train.epochs` and `assign.epochs`.

    Args:
        wrong: The key as it was written: `trian.epochs`, `model.epochs`, `epochs`, or a section such as `trian`.
        known: All keys, as `section.key`.

    Returns:
        At most three keys, or one section; nothing if none is similar enough.
    """
    section, _, name = wrong.rpartition(".")
    if len(wrong) > _MAX_LETTERS:
        return []
    if not section:
        sections = dict.fromkeys(key.partition(".")[0] for key in known if "." in key)
        likeness, nearest = max(((_section_likeness(name, each), each) for each in sections), default=(0.0, ""))
        if likeness >= _SECTION:
            return [nearest]
    # Rounded, because 1 - 0.15 and 0.85 differ in the last bit.
    scores = {key: round(_key_likeness(section, name, key), 6) for key in known}
    best = max(scores.values(), default=0.0)
    if best < _THRESHOLD:
        return []
    similar = [key for key in known if scores[key] == best]
    depth = min(key.count(".") for key in similar)  # `slurm.time` is not slurm.stages.train.time_minutes
    return [key for key in similar if key.count(".") == depth][:_MAX_SUGGESTIONS]


def _key_likeness(section: str, name: str, key: str) -> float:
    """Returns how much a known key is like a wrong one, from 0 to 1. The name counts more than the section."""
    known_section, _, known_name = key.rpartition(".")
    loss = _SAME_NAME if name == known_name else _OTHER_SECTION if section else _NO_SECTION
    return _name_likeness(name, known_name) - loss * (1.0 - _section_likeness(section, known_section))


def _section_likeness(section: str, known: str) -> float:
    if f".{section}." in f".{known}.":  # `data.annotations` and `train.annotations` mean data.train.annotations
        return 1.0
    ratio = _PART if _is_start(section, known) else _ratio(section, known)
    return ratio if ratio >= _SECTION else 0.0


def _name_likeness(name: str, known: str) -> float:
    ratio = _ratio(name, known)
    words, known_words = set(name.split("_")), set(known.split("_"))
    is_short = name == _initials(known) or known == _initials(name)  # `wd`, `learning_rate`
    if words <= known_words or known_words <= words or is_short or _is_start(name, known):
        return max(ratio, _PART + ratio / 100)  # of several parts, the longest
    return ratio


def _is_start(name: str, known: str) -> bool:
    return len(name) >= _MIN_START and known.startswith(name)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))
