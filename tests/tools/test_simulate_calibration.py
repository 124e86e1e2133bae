"""Calibrations on a recorded table keep their promise, and find what the table allows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import simulate_calibration
from videoadapt.errors import UserError

TABLE = Path(__file__).parents[2] / "docs" / "results" / "calibration_table.parquet"
OF_THE_TABLE = ["model.points=[8,8@0.5,4,4@0.5]", "model.drop_blocks=[1]"]


def test_promises_are_kept_and_savings_found_on_a_recorded_table() -> None:
    """As in docs/calibrate.md, where each row has 1,000 calibrations."""
    settings = simulate_calibration.Settings(eps=(0.02,), draws=200)
    needed, more = simulate_calibration.simulate(TABLE, settings, OF_THE_TABLE)
    assert more.videos == simulate_calibration.MORE * needed.videos
    for row in (needed, more):
        assert row.broken <= settings.delta + 2 * math.sqrt(settings.delta * (1 - settings.delta) / settings.draws)
        assert row.best_fixed < row.possible
    assert needed.untested > settings.delta  # so that a choice without tests would be found out
    assert more.found == 1.0
    assert more.saved > 0.9 * more.possible


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UserError, match=r"'draw=3': expected eps=0\.01,0\.02"):
        simulate_calibration.Settings.parse(["draw=3"])
    with pytest.raises(UserError, match="'eps=one': expected a number"):
        simulate_calibration.Settings.parse(["eps=one"])
    for words in ([], ["record", "run"]):
        with pytest.raises(UserError, match=r"expected TABLE \[KEY=VALUE"):
            simulate_calibration.main(words)
