"""The look before the first step: what every rank finds, and what stops the run or is warned of."""

from __future__ import annotations

import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import small_runs as runs
from videoadapt.data.index.manifest import index
from videoadapt.errors import RunError
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.training import preflight as module
from videoadapt.training.preflight import NodeReport, checkpoints_bytes, faults, preflight, warnings
from videoadapt.training.train import train

GOOD = NodeReport(
    "node1", "H200", cpus=8, workers=8, free_bytes=10**9, step_clips=32, clips_per_s=20.0, unread="", manifest="aa"
)


def test_a_table_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run")
    manifest = index(config)
    capsys.readouterr()
    preflight(config, manifest)
    told = capsys.readouterr()
    assert told.out == ""
    for word in (
        "rank",
        "node",
        "GPU",
        "CPUs",
        "workers",
        "free GB",
        "clips/s a worker",
        "decoding s/step",
        manifest.hash,
    ):
        assert word in told.err
    assert re.search(
        r"decoding the clips of a step takes \d+\.\d\d s on the slowest rank; where computing it takes less", told.err
    )


def test_decoding_of_a_step_takes_what_all_workers_need_that_have_a_cpu() -> None:
    assert GOOD.decoding_s == pytest.approx(32 / (20 * 8))
    assert replace(GOOD, cpus=2).decoding_s == pytest.approx(32 / (20 * 2))
    assert replace(GOOD, workers=0).decoding_s == pytest.approx(32 / 20)  # the rank itself reads
    assert replace(GOOD, clips_per_s=0.0).decoding_s == math.inf


def test_what_is_loaded_once_does_not_count_as_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowAtFirst(module.TrainClips):
        warm = False

        def __getitem__(self, key: tuple[int, int]) -> Any:
            if not self.warm:
                self.warm = True
                time.sleep(3.0)
            return super().__getitem__(key)

    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run")
    monkeypatch.setattr(module, "TrainClips", SlowAtFirst)
    clips_per_s, unread = module._decode(config, index(config))
    assert clips_per_s > 4 / 3
    assert unread == ""


@pytest.mark.parametrize(
    ("groups", "decode", "clips"),
    [
        (None, "shared", [2, 2, 2, 2]),  # one group: a clip is trained by one rank
        (None, "own", [2, 2, 2, 2]),
        ({8: 2, 6: 1, 4: 1}, "shared", [2, 2, 2, 2]),
        ({8: 2, 6: 1, 4: 1}, "own", [4, 4, 8, 8]),  # each group reads the whole step
    ],
)
def test_a_rank_reads_its_share_of_each_step(
    groups: dict[int, int] | None, decode: str, clips: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = runs.config(tmp_path, tmp_path, parallel={"groups": groups, "decode": decode})
    monkeypatch.setattr(module, "world_size", lambda: 4)
    found = []
    for number in range(4):
        monkeypatch.setattr(module, "rank", lambda number=number: number)
        found.append(module._step_clips(config))
    assert found == clips


def test_a_node_that_cannot_read_the_videos_stops_the_run(tmp_path: Path) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run")
    manifest = index(config)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(
        RunError, match=r"preflight: rank 0 on \S+ can read no video \(.*not found; it was moved or deleted"
    ):
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
