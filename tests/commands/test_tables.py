"""What tables say in words: a fit that went wrong, a fixed point that suffices, speeds that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from videoadapt.commands.tables import print_assign
from videoadapt.evaluation.evaluated import unclear_speeds

GOOD: dict[str, Any] = {
    "clips_fitted": 400,
    "clips_selecting": 100,
    "source": "holdout",
    "loss_first": 0.7,
    "loss_last": 0.4,
    "threshold": 0.8,
    "rule": "proven",
    "confidence": 0.9,
    "clips_needed": 230,
    "auc": (0.8, 0.7, 0.9),
    "loss_at_most": 0.01,
    "difference": (0.0, -0.01, 0.01),
    "fixed": {},
    "accuracy": 0.9,
    "accuracy_costliest": 0.9,
    "macs_saved": 0.4,
    "mix": {"8": 0.5, "4": 0.5},
    "assigner_macs": 1_000_000,
    "assigner_fraction": 0.01,
}
COLLAPSE, NOTHING, STILL = "every clip gets point 4", "the assigner saves nothing", "the loss stands still"


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        ({"mix": {"8": 0.0, "4": 1.0}}, [f"{COLLAPSE}: policy fixed:4 does the same"]),
        ({"rule": "none", "mix": {"8": 1.0, "4": 0.0}}, [f"{NOTHING}: 100 clips"]),
        ({"loss_last": 0.699}, [f"{STILL}: 0.7 in the first epoch, 0.699 in the last"]),
        ({"loss_last": 0.8, "mix": {"8": 0.0, "4": 1.0}}, [COLLAPSE, STILL]),
        ({"loss_first": None}, []),  # one epoch, or not known
    ],
)
def test_a_fit_that_went_wrong_is_said(
    changes: dict[str, Any], sentences: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_assign(GOOD | changes)
    said = capsys.readouterr().err
    assert not [sentence for sentence in sentences if sentence not in said], said
    assert sum(each in said for each in (COLLAPSE, NOTHING, STILL)) == len(sentences)


def test_speeds_whose_medians_contradict_their_ratios_are_named() -> None:
    policies = {
        "fixed:7": {"clips_per_s": 15.5, "speedup": (1.0, 1.0, 1.0)},
        "fixed:4": {"clips_per_s": 40.0, "speedup": (2.6, 2.0, 3.0)},
        "leap:4": {"clips_per_s": 13.3, "speedup": (1.33, 0.9, 1.5)},
    }
    assert unclear_speeds(policies) == ["leap:4"]
