"""The preflight: what each rank reports about its node, and which faults stop the run or cause a warning."""

from __future__ import annotations

import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import small_runs as runs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest, index
from videoadapt.errors import RunError
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.training import preflight as module
from videoadapt.training.groups import GroupPlan, make_plan
from videoadapt.training.preflight import (
    NodeReport,
    checkpoints_bytes,
    clips_decoded_per_step,
    decoding_notes,
    missing_bytes,
    pixels_after_resizing,
    preflight,
    try_decoding,
    warnings,
)
from videoadapt.training.train import train

GOOD = NodeReport(
    "node1", "H200", cpus=8, workers=8, free_bytes=10**9, step_clips=32, clips_per_s=20.0, error="", macs_per_s=3e14,
)  # fmt: skip


def indexed(folder: Path) -> tuple[Config, Manifest, GroupPlan]:
    config = runs.config(runs.make_data(folder / "data"), folder / "run")
    return config, index(config), make_plan(config, 1, {})


def table_rows(text: str) -> list[dict[str, str]]:
    """The rows of a printed table, by column."""
    lines = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if line[:1] in "│┃" and line]
    columns, *rows = ([cell.strip() for cell in line] for line in lines)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_the_table_has_a_row_for_each_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = NodeReport("node2", "none", 2, 4, 2_500_000_000, 48, clips_per_s=10.0, error="")
    monkeypatch.setattr(module, "report_of_this_node", lambda *_: GOOD)
    monkeypatch.setattr(module, "all_gather", lambda own: [own, other])
    config, manifest, plan = indexed(tmp_path)
    capsys.readouterr()
    preflight(config, manifest, plan)
    printed = capsys.readouterr()
    assert printed.out == ""  # stdout is for results
    by_rank = [
        ("0", "node1", "H200", "300.00", "8", "8", "1.0", "20.0", "0.20", ""),
        ("1", "node2", "none", "nan", "2", "4", "2.5", "10.0", "2.40", ""),
    ]
    assert [tuple(row.values()) for row in table_rows(printed.err)] == by_rank
    assert table_rows(printed.err)[1]["decoding s/step"] == "2.40"  # 48 clips by the 2 workers that have a CPU
    assert "takes 2.40 s on the slowest rank" in " ".join(printed.err.split())
    assert "rank 1: 4 workers share 2 CPUs" in " ".join(printed.err.split())


def test_a_report_describes_this_node(tmp_path: Path) -> None:
    config, manifest, plan = indexed(tmp_path)
    report = module.report_of_this_node(config, manifest, plan)
    assert (report.gpu, report.workers, report.step_clips, report.error) == ("none", 0, config.train.batch, "")
    assert report.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5)
    assert 1 < report.clips_per_s < 10_000


def test_the_time_for_a_step_counts_the_workers_that_have_a_cpu() -> None:
    assert GOOD.decoding_s == pytest.approx(32 / (20 * 8))
    assert replace(GOOD, cpus=2).decoding_s == pytest.approx(32 / (20 * 2))
    assert replace(GOOD, workers=0).decoding_s == pytest.approx(32 / 20)  # the rank itself reads
    assert replace(GOOD, clips_per_s=0.0).decoding_s == math.inf


def test_loading_libraries_does_not_count_as_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowAtFirst(module.TrainClips):
        warm = False

        def __getitem__(self, key: tuple[int, int]) -> Any:
            if not self.warm:
                self.warm = True
                time.sleep(3.0)
            return super().__getitem__(key)

    config, manifest, _ = indexed(tmp_path)
    monkeypatch.setattr(module, "TrainClips", SlowAtFirst)
    clips_per_s, error = try_decoding(config, manifest)
    assert clips_per_s > 4 / 3  # with the 3 s, it would be less
    assert error == ""


@pytest.mark.parametrize(
    ("groups", "decode", "clips"),
    [
        (None, "shared", [2, 2, 2, 2]),  # one group: a clip is trained by one rank
        (None, "own", [2, 2, 2, 2]),
        ({8: 2, 6: 1, 4: 1}, "shared", [2, 2, 2, 2]),
        ({8: 2, 6: 1, 4: 1}, "own", [4, 4, 8, 8]),  # each group reads the whole step
    ],
)
def test_a_rank_decodes_its_part_of_each_step(
    groups: dict[int, int] | None, decode: str, clips: list[int], tmp_path: Path
) -> None:
    config = runs.config(tmp_path, tmp_path, parallel={"groups": groups, "decode": decode})
    plan = make_plan(config, 4, {})
    assert [clips_decoded_per_step(config, plan, rank) for rank in range(4)] == clips


def test_a_node_that_cannot_read_the_videos_stops_the_run(tmp_path: Path) -> None:
    config, manifest, plan = indexed(tmp_path)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(
        RunError, match=r"preflight: rank 0 on \S+ can read no video \(.*not found; it was moved or deleted"
    ):
        preflight(config, manifest, plan)


def test_the_estimated_size_of_checkpoints_is_their_size(tmp_path: Path) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run", train={"epochs": 1, "validate_every": 1})
    train(config)
    files = list(train_checkpoints(config.run.dir).folder.glob("step-*"))
    assert len(files) == config.train.keep_checkpoints
    taken = files[0].stat().st_size * (config.train.keep_checkpoints + 2)  # the best one, and one being written
    assert 0.8 < checkpoints_bytes(config) / taken < 1.05


def test_the_checkpoints_of_an_interrupted_run_have_their_space_already(tmp_path: Path) -> None:
    config = runs.config(tmp_path, tmp_path / "run")
    assert missing_bytes(config) == checkpoints_bytes(config)
    path = train_checkpoints(config.run.dir).path_of(4)
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(1000))
    assert missing_bytes(config) == checkpoints_bytes(config) - 1000


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, manifest, plan = indexed(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"run\.dir has 0\.0 GB free, the checkpoints need"):
        preflight(config, manifest, plan)


def test_too_few_cpus_cause_a_warning() -> None:
    assert warnings([GOOD]) == []
    (warning,) = warnings([GOOD, replace(GOOD, cpus=2)])
    assert warning.startswith("rank 1: 8 workers share 2 CPUs")


def test_a_gpu_without_bf16_causes_a_warning_where_it_is_used() -> None:
    old = replace(GOOD, gpu="V100", has_bf16=False)
    assert warnings([GOOD, old], "fp32") == []
    (warning,) = warnings([GOOD, old], "bf16")
    assert warning.startswith("rank 1: V100 does not compute in bf16 itself")


def test_what_decoding_needs_and_would_gain_is_said(tmp_path: Path) -> None:
    config, manifest, _ = indexed(tmp_path)
    report = replace(GOOD, pyav_clips_per_s=32.0)
    cores, *gains = decoding_notes([report, report], manifest, config)
    assert cores.endswith("a GPU that trains N clips/s needs N / 20.0 cores")
    assert any("PyAV decodes 1.6 times as many" in gain for gain in gains)
    (only,) = decoding_notes([replace(GOOD, pyav_clips_per_s=21.0)], manifest, large := with_size(config, 10_000))
    assert only == cores
    assert pixels_after_resizing(manifest, large) == 1.0
    videos = manifest.split("train").readable
    short = set(np.minimum(videos["width"], videos["height"]).tolist())
    assert len(short) == 1
    half = with_size(config, short.pop() // 2)
    assert pixels_after_resizing(manifest, half) == pytest.approx(0.25, rel=0.1)


def with_size(config: Config, size: int) -> Config:
    model, data = config.model.model_copy(update={"size": size}), config.data.model_copy(update={"short_side": None})
    return config.model_copy(update={"model": model, "data": data})
