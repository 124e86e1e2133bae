"""`bench points`: the arithmetic of speeds, and a run with every point and batch size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from videoadapt.config.load import make_config
from videoadapt.errors import ConfigError
from videoadapt.evaluation.intervals import median_interval
from videoadapt.performance.bench.points import at_best_batches, bench_points, markdown, speeds

MODEL = {
    **{"width": 16, "depth": 2, "heads": 2, "patch": 4, "size": 16, "num_frames": 1, "temporal": False},
    **{"points": ["4", "4@0.5", "2"], "drop_blocks": [1]},
}


def test_speeds_are_relative_to_the_costliest_point_of_the_same_round() -> None:
    rounds = [{"14": 8.0 * noise, "14@0.5": 4.0 * noise, "7": 2.0 * noise} for noise in (1.0, 3.0, 2.0)]
    macs = {"14": 400, "14@0.5": 200, "7": 50}
    rows = {row.point: row for row in speeds(rounds, macs, dict.fromkeys(macs, 4))}
    assert rows["14"].speed == rows["14"].kept == [1, 1, 1]
    assert rows["14@0.5"].speed == [2, 2, 2]
    assert rows["14@0.5"].kept == [1, 1, 1]
    assert (rows["7"].promised, rows["7"].kept) == (8, [0.5, 0.5, 0.5])
    assert rows["7"].seconds == [4, 2, 6]
    assert rows["7"].clips_per_s == 1


def test_each_point_is_compared_at_its_own_best_batch() -> None:
    one = {2: [{"14": 4.0, "7": 1.0}] * 3, 8: [{"14": 20.0, "7": 2.0}] * 3}  # 0.5 and 0.4 clips/s; 2 and 4
    costliest, cheap = at_best_batches(one, {"14": 400, "7": 40})
    assert (costliest.batch, costliest.clips_per_s, costliest.kept) == (2, 0.5, [1, 1, 1])
    assert (cheap.batch, cheap.clips_per_s, cheap.speed) == (8, 4, [8, 8, 8])
    assert cheap.kept == pytest.approx([0.8, 0.8, 0.8])


def test_the_table_marks_points_that_miss_the_target() -> None:
    rounds = [{"14": 8.0, "7": 2.0}]
    rows = speeds(rounds, {"14": 400, "7": 50}, {"14": 4, "7": 4})
    table = markdown(rows, len(rounds)).splitlines()
    assert "| ms (range) | speed (range) |" in table[0]
    assert "| ms (95 %) | speed (95 %) |" in markdown(rows, 6)
    assert table[2].endswith("| 1.00 (1.00 to 1.00) | met |")
    assert table[3].endswith("| 4.00 (4.00 to 4.00) | 8.00 | 0.50 (0.50 to 0.50) | missed |")


def test_every_point_is_measured_at_every_batch(tmp_path: Path) -> None:
    config = make_config({"model": MODEL, "assign": {"frames": 1}, "run": {"device": "cpu"}})
    result = bench_points(config, ["rounds=2", "batches=[1,3]", f"dir={tmp_path}"])
    assert [(row["point"], row["batch"]) for row in result["rows"]] == [
        (p, b) for b in (1, 3) for p in config.model.points
    ]
    for row in result["rows"]:
        median, low, high = row["seconds"]
        assert 0 < low <= median <= high
        assert row["clips_per_s"] == pytest.approx(row["batch"] / median)
        assert row["kept"] == pytest.approx([speed * row["macs"] / result["rows"][0]["macs"] for speed in row["speed"]])
    assert json.loads((tmp_path / "points.json").read_text()) == result
    assert [row["point"] for row in result["best"]] == list(config.model.points)
    assert len((tmp_path / "points.md").read_text().splitlines()) == (2 + 6) + 3 + (2 + 3)
    with pytest.raises(ConfigError, match="bench points: unknown key batch; did you mean batches"):
        bench_points(config, ["batch=3"])


def test_the_interval_of_a_median_covers_it_95_times_in_100() -> None:
    draws = np.random.default_rng(0).exponential(size=(4000, 15))
    found = [median_interval(row.tolist()) for row in draws]
    covered = np.mean([low <= np.log(2) <= high for _, low, high in found])
    assert 0.95 <= covered <= 0.98
    assert median_interval([3.0, 1.0, 2.0]) == (2, 1, 3)
    assert median_interval(list(map(float, range(15)))) == (7, 3, 11)
