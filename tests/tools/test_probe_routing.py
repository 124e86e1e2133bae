"""Regressions on an answer find where a point is right, and a price moves clips to cheaper points."""

from __future__ import annotations

import numpy as np

from probe_routing import choose, fit

COSTS = np.array([10.0, 4.0, 1.0])


def test_the_chances_follow_what_the_features_tell() -> None:
    draw = np.random.default_rng(1)
    features = draw.normal(size=(2_000, 5))
    truth = 1 / (1 + np.exp(-np.stack([2 + features[:, 0], features[:, 0] - features[:, 1], -features[:, 2]], axis=1)))
    chances = fit(features, draw.random(truth.shape) < truth, np.arange(2_000) // 10)(features)
    assert np.abs(chances - truth).mean() < 0.03
    noise = fit(features, draw.random(truth.shape) < 0.7, np.arange(2_000) // 10)(features)
    assert np.abs(noise - 0.7).mean() < 0.03  # features that tell nothing give the base rate


def test_a_clip_pays_for_both_points_and_a_price_saves_macs() -> None:
    chances = np.array([[0.9, 0.8, 0.2], [0.9, 0.9, 0.9], [0.5, 0.4, 0.45]])
    choice, macs = choose(chances, COSTS, 2, 0.0)
    assert choice.tolist() == [0, 0, 0] and macs.tolist() == [11, 11, 11]
    choice, macs = choose(chances, COSTS, 2, 0.2)
    assert choice.tolist() == [1, 2, 2] and macs.tolist() == [5, 1, 1]
    choice, macs = choose(chances, COSTS, 1, 10.0)
    assert choice.tolist() == [1, 1, 1] and macs.tolist() == [4, 4, 4]
