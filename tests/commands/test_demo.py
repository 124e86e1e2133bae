"""The demo from end to end, on fewer videos and one epoch: what it leaves behind, and that it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from videoadapt.commands.demo import demo, demo_config, print_demo
from videoadapt.commands.tables import print_assign, print_evaluate, print_label
from videoadapt.errors import UserError

SMALL = {"train": 160, "val": 24}
POLICIES = ["fixed:8", "fixed:6", "fixed:4", "assigned", "random", "oracle"]


def test_demo_leaves_a_summary_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"run.dir={tmp_path}", "train.epochs=1", "assign.epochs=1", "data.workers=1", "evaluate.speed_clips=8"]
    result = demo(overrides, SMALL)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == result
    assert list(summary["policies"]) == POLICIES
    for row in summary["policies"].values():
        assert {"top1", "top1_low", "top1_high", "macs_per_clip", "clips_per_s"} <= row.keys()
    assert summary["seconds"] >= sum(summary["stages"].values()) - 1
    assert [level["videos"] for level in summary["levels"].values()] == [12, 6, 6]
    assert (tmp_path / "accuracy_cost.png").read_bytes().startswith(b"\x89PNG")

    print_demo(result, tmp_path)
    print_evaluate(json.loads((tmp_path / "evaluate" / "evaluate.json").read_text()))
    print_label(json.loads((tmp_path / "labels" / "label.json").read_text()))
    print_assign(json.loads((tmp_path / "assigner" / "assign.json").read_text()))
    shown = capsys.readouterr()
    assert "mean length" in shown.out
    assert "random routing with the same mix" in shown.err

    again = demo(overrides, SMALL)
    assert {k: v["top1"] for k, v in again["policies"].items()} == {k: v["top1"] for k, v in result["policies"].items()}
    with pytest.raises(UserError, match="another run.dir"):
        demo([*overrides, "run.seed=5"], SMALL)


def test_the_data_lies_in_the_run_folder(tmp_path: Path) -> None:
    config = demo_config([f"run.dir={tmp_path}"])
    assert config.data.root == tmp_path / "data"
    assert config.data.val.annotations == tmp_path / "data" / "val.csv"
