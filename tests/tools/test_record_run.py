"""A recorded run has the figures of its evaluation, and folds are pooled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from record_run import curve_of, pooled_policies, pooled_sources, record, show
from simulated_runs import simulate


def test_folds_are_pooled_video_by_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"fold{seed}.json" for seed in (1, 2)]
    for seed, file in enumerate(files, start=1):
        simulate(tmp_path / str(seed), videos=120, seed=seed)
        record(tmp_path / str(seed), file)
    folds = [json.loads(file.read_text()) for file in files]
    evaluated = [json.loads((tmp_path / str(seed) / "evaluate/evaluate.json").read_text()) for seed in (1, 2)]
    assert len(set(pooled_sources(folds).tolist())) == 240
    pooled = {each.name: each for each in pooled_policies(folds)}
    assert list(pooled) == list(evaluated[0]["policies"])
    for name, policy in pooled.items():
        rows = [each["policies"][name] for each in evaluated]
        assert policy.right.mean() == pytest.approx(np.mean([row["top1"] for row in rows]))
        assert policy.macs == pytest.approx(np.mean([row["macs_per_video"] for row in rows]))
    fixed = [policy for name, policy in pooled.items() if name.startswith("fixed:")]
    saved = [float(row[2]) for row in curve_of(folds, fixed, pooled_sources(folds))]
    assert saved == sorted(saved, reverse=True)
    show(files)
    assert "240 videos" in capsys.readouterr().out


@pytest.mark.parametrize(("counted", "videos"), [("wrong", 60), ("exclude", 55)])
def test_failed_videos_count_as_in_the_evaluation(tmp_path: Path, counted: str, videos: int) -> None:
    simulate(tmp_path / "run", videos=60, failed=5)
    file = tmp_path / "run" / "evaluate" / "evaluate.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"failed_count_as": counted}))
    record(tmp_path / "run", tmp_path / "recorded.json")
    found = json.loads((tmp_path / "recorded.json").read_text())
    assert len(found["sources"]) == videos
    assert {len(policy["right"]) for policy in found["policies"].values()} == {videos}
