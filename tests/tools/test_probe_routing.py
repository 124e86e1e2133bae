"""Regressions on an answer find where a point is right, with the penalty that other sources prefer."""

from __future__ import annotations

import numpy as np

from probe_routing import fit


def test_the_chances_follow_what_the_features_tell() -> None:
    draw = np.random.default_rng(1)
    features = draw.normal(size=(2_000, 5))
    truth = 1 / (1 + np.exp(-np.stack([2 + features[:, 0], features[:, 0] - features[:, 1], -features[:, 2]], axis=1)))
    chances = fit(features, draw.random(truth.shape) < truth, np.arange(2_000) // 10)(features)
    assert np.abs(chances - truth).mean() < 0.03
    noise = fit(features, draw.random(truth.shape) < 0.7, np.arange(2_000) // 10)(features)
    assert np.abs(noise - 0.7).mean() < 0.03  # features that tell nothing give the base rate
