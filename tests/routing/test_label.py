"""`label`: what it says of a model that is no better than guessing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from videoadapt.routing.label import class_mix_note, guessing_note

TRUTH = pd.Series(["fight"] * 28 + ["none"] * 26)


@pytest.mark.parametrize(("right", "noted"), [(28, True), (33, True), (35, False), (54, False)])
def test_a_model_that_is_no_better_than_guessing_is_named(right: int, noted: bool) -> None:
    """54 clips, 28 of the largest class: significantly more are 35 and more, by the table of the binomial test."""
    answers = TRUTH.where(TRUTH.index < right, "?")
    note = guessing_note(TRUTH, answers)
    assert (note is not None) == noted
    if note:
        assert note.endswith("of 54 clips, which is not significantly more than always answering with fight (51.9 %)")


def test_one_class_alone_is_always_guessed() -> None:
    assert guessing_note(pd.Series(["a", "a"]), pd.Series(["a", "a"]))


def test_another_mix_of_classes_is_named_and_chance_is_not() -> None:
    classes = ("glass", "metal", "unused")

    def note(ours: np.ndarray, a_source: int = 1) -> str | None:
        val = np.repeat([0, 1], [700, 230])
        return class_mix_note((ours, val), (np.arange(len(ours)) // a_source, np.arange(930) // a_source), classes)

    ours = np.repeat([0, 1], [270, 40])
    assert "glass is 87.1 % of them, and 75.3 % of val" in (note(ours) or "")
    assert note(ours, a_source=10) is None  # 31 sources beside 93
    assert note(np.repeat([0, 1], [27, 5])) is None
    assert note(np.array([], dtype=np.int64)) is None
