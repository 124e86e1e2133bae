"""The look before the first step: what every rank finds, and what stops the run or is warned of."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import small_runs as runs
from videoadapt import preflight as module
from videoadapt.checkpoint import train_checkpoints
from videoadapt.data.manifest import index
from videoadapt.errors import RunError
from videoadapt.preflight import Findings, checkpoints_bytes, faults, preflight, warnings
from videoadapt.train import train

GOOD = Findings("node1", "H200", cpus=8, workers=8, free_bytes=10**9, clips_per_s=20.0, unread="", manifest="aa")


def test_a_table_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run")
    manifest = index(config)
    capsys.readouterr()
    preflight(config, manifest)
    told = capsys.readouterr()
    assert told.out == ""
    for word in ("rank", "node", "GPU", "CPUs", "workers", "free GB", "clips/s a worker", manifest.hash):
        assert word in told.err


def test_a_node_that_cannot_read_the_videos_stops_the_run(tmp_path: Path) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run")
    manifest = index(config)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(RunError, match=r"preflight: rank 0 on \S+ can read no video \(.*lies elsewhere, or is gone"):
        preflight(config, manifest)


def test_the_room_for_checkpoints_is_what_they_take(tmp_path: Path) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run", train={"epochs": 1})
    train(config)
    files = list(train_checkpoints(config.run.dir).folder.glob("step-*"))
    assert len(files) == config.train.keep_checkpoints
    taken = files[0].stat().st_size * (config.train.keep_checkpoints + 1)
    assert 0.8 < checkpoints_bytes(config) / taken < 1.05


def test_no_room_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run")
    manifest = index(config)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"run\.dir has 0\.0 GB free, the checkpoints need"):
        preflight(config, manifest)


def test_nodes_must_see_one_manifest() -> None:
    assert faults([GOOD, GOOD], 10**8) == []
    (fault,) = faults([GOOD, replace(GOOD, node="node2", manifest="bb")], 10**8)
    assert "aa on node1 (rank 0), bb on node2 (rank 1)" in fault


def test_too_few_cpus_are_warned_of() -> None:
    assert warnings([GOOD]) == []
    (warning,) = warnings([GOOD, replace(GOOD, cpus=2)])
    assert warning.startswith("rank 1: 8 workers share 2 CPUs")
