"""`parallel.overlap`: the passes are timed without a trace, and orders stay where nothing is gained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs as runs
from videoadapt.data.index.manifest import SCHEMA, Manifest
from videoadapt.training.groups import make_plan
from videoadapt.training.overlap import measured_orders, with_best_order
from videoadapt.training.state import State
from videoadapt.training.step import RankRole


def start(folder: Path, /, **sections: dict[str, Any]) -> tuple[RankRole, State]:
    config = runs.config(folder, folder / "run", **sections)
    state = State.start(config, Manifest(SCHEMA.empty_table(), tuple(map(str, range(config.model.num_classes)))))
    return RankRole.from_plan(config, state.model, make_plan(config, 1, {})), state


def test_the_measurement_leaves_no_trace(tmp_path: Path) -> None:
    role, state = start(tmp_path, model={"embed": "stem", "distill_token": True})
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    usual, best = measured_orders(role, state, 1e9)
    assert 0 < best.step_s <= usual.step_s
    assert not usual.costliest_last
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert not state.optimizer.state


@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_the_order_stays_on_a_cpu(tmp_path: Path, overlap: str) -> None:
    role, state = start(tmp_path, parallel={"overlap": overlap})
    assert with_best_order(role, state, 1.0) is role
