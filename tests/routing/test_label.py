"""`label`: what it says of a model that is no better than guessing."""

from __future__ import annotations

import pandas as pd
import pytest

from videoadapt.routing.label import guessing_note

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
