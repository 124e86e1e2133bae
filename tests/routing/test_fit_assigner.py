"""The clips that choose the threshold share no source with those that the assigner is fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from videoadapt.routing.fit_assigner import _whole_sources


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_whole_sources_are_set_aside(fraction: float) -> None:
    sources = np.random.default_rng(0).integers(0, 40, 400)
    order, kept = _whole_sources(sources, fraction, seed=1)
    assert sorted(order.tolist()) == list(range(400))
    assert not set(sources[order[:kept]]) & set(sources[order[kept:]])
    assert fraction * 400 <= kept < fraction * 400 + 40


def test_clips_that_are_their_own_sources_are_set_aside_in_the_order_of_the_seed() -> None:
    order, kept = _whole_sources(np.arange(50), 0.2, seed=3)
    assert order.tolist() == np.random.default_rng(3).permutation(50).tolist()
    assert kept == 10
