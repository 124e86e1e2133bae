"""Regressions on an answer find where a point is right, with the penalty that other sources prefer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import small_runs as runs
from probe_routing import fit, main
from videoadapt.config.load import dump_config
from videoadapt.errors import UserError


def test_the_chances_follow_what_the_features_tell() -> None:
    draw = np.random.default_rng(1)
    features = draw.normal(size=(2_000, 5))
    truth = 1 / (1 + np.exp(-np.stack([2 + features[:, 0], features[:, 0] - features[:, 1], -features[:, 2]], axis=1)))
    chances = fit(features, draw.random(truth.shape) < truth, np.arange(2_000) // 10)(features)
    assert np.abs(chances - truth).mean() < 0.03
    noise = fit(features, draw.random(truth.shape) < 0.7, np.arange(2_000) // 10)(features)
    assert np.abs(noise - 0.7).mean() < 0.03  # features that tell nothing give the base rate


def test_few_sources_make_fewer_folds() -> None:
    draw = np.random.default_rng(2)
    features, right = draw.normal(size=(60, 2)), draw.random((60, 3)) < 0.7
    assert np.isfinite(fit(features, right, np.arange(60) // 30)(features)).all()
    with pytest.raises(UserError, match="all labelled clips are of one source"):
        fit(features, right, np.zeros(60, dtype=int))


def test_an_unknown_point_is_refused(tmp_path: Path) -> None:
    config = runs.config(tmp_path / "data", tmp_path / "run")
    config.run.dir.mkdir()
    (config.run.dir / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match="--point 9: this run has 8, 6, 4"):
        main(config.run.dir, "9")
