"""The fit of the assigner: the clips that choose the threshold, and a fit that diverges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from videoadapt.config.load import Config
from videoadapt.config.sections import AssignConfig, ModelConfig, RunConfig
from videoadapt.errors import RunError
from videoadapt.routing.assigner import assigner_checkpoints
from videoadapt.routing.fit_assigner import LabelledClips, _fit, _whole_sources
from videoadapt.runtime.inputs import Inputs


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


def test_a_fit_that_diverges_stops_and_saves_nothing(tmp_path: Path) -> None:
    small = AssignConfig(family="convolutions", frames=1, size=8, stages=1, epochs=1, batch=4, lr=1e6, weight_decay=1)
    config = Config(run=RunConfig(dir=tmp_path, device="cpu"), model=ModelConfig(points=("14", "7")), assign=small)
    rng, numbers = np.random.default_rng(0), np.arange(64)
    clips = LabelledClips(
        rng.integers(0, 256, (64, 3, 1, 8, 8), dtype=np.uint8),
        numbers,
        numbers % 2,
        np.ones((64, 2), dtype=bool),
        Inputs(None, None, {}),
        torch.empty(0),
        pd.DataFrame({"video": numbers, "clip": 0}),
        numbers,
        "files",
    )
    with pytest.raises(RunError, match=r"epoch 1 .* NaN or infinite.*assign.lr"):
        _fit(clips, config, assigner_checkpoints(tmp_path))
    assert not list(tmp_path.rglob("step-*"))
