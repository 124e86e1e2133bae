"""The summary of a run: what is written is read again, also from runs made before a key was renamed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from videoadapt.training.metrics import PointMetrics, TrainSummary

SUMMARY = TrainSummary(
    steps=10,
    epochs=2,
    clips=40,
    skipped=1,
    manifest="aa",
    checkpoint="runs/a/checkpoints/step-00000010.safetensors",
    seconds=12.5,
    clips_per_s=6.4,
    wait_fraction=0.25,
    peak_memory_bytes=10**9,
    points={"8": PointMetrics(1.5, 0.5), "4": PointMetrics(None, None)},
)


@pytest.mark.parametrize("key", ["wait_fraction", "wait_share"])
def test_a_summary_is_read_as_it_was_written(tmp_path: Path, key: str) -> None:
    values = asdict(SUMMARY)
    values[key] = values.pop("wait_fraction")
    (tmp_path / "train.json").write_text(json.dumps(values))
    assert TrainSummary.read(tmp_path / "train.json") == SUMMARY
