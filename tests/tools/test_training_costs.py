"""The configs: each gives a model, opens with command, cost and result, is in the docs, and costs what they state."""

from __future__ import annotations

import re
import shlex
import sys
from itertools import chain, takewhile
from pathlib import Path

import pytest
import torch

import training_costs
from videoadapt.config.cost import point_cost
from videoadapt.config.load import load_config
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.policy import parse_cascade

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
GUIDE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FIGHTS": "/data/fights", "PHOTOS": "/data/photos", "LISTS": "fixed"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VIT_S", "/weights/vit_s.safetensors")
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS)
def test_the_model_of_every_config_runs_at_all_its_points(path: str) -> None:
    config = load_config(path).model
    with torch.device("meta"):
        model = TimeSformer(config).eval()
        clips = torch.empty(2, 3, config.num_frames, config.size, config.size)
        for point in config.points:
            assert model(clips, point).shape == (2, config.num_classes)


def test_every_config_is_in_the_docs_and_the_docs_name_no_other() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"configs/[\w/]+\.yaml", page.read_text(encoding="utf-8"))}
    assert named == set(CONFIGS)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_opens_with_command_cost_and_result(path: str) -> None:
    header = list(takewhile(lambda line: line.startswith("#"), (ROOT / path).read_text().splitlines()))
    assert [line.split(":")[0] for line in header if re.match("# (Command|Cost|Result):", line)] == [
        "# Command",
        "# Cost",
        "# Result",
    ]
    assert path in "".join(header) or path == "configs/demo.yaml"  # the command names the config


def test_the_cascade_config_sweeps_the_threshold_at_two_points_of_its_model() -> None:
    config = load_config("configs/supervit_deit_s_cascade_in1k.yaml")
    sweep = [parse_cascade(text, config.model, None) for text in config.evaluate.cascade]
    assert {cascade.points for cascade in sweep} == {("8@0.5", "14@0.7")}
    thresholds = [cascade.thresholds for cascade in sweep]
    assert len(set(thresholds)) > 5 and thresholds == sorted(thresholds)


def test_configs_have_different_run_folders() -> None:
    # A cascade config evaluates in the run of its model.
    folders = [load_config(path).run.dir for path in CONFIGS if "cascade" not in path]
    assert len(set(folders)) == len(folders)


def test_the_table_in_the_docs_is_the_output_of_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = next(line for line in GUIDE.splitlines() if line.startswith("python tools/training_costs.py "))
    words = [sorted(map(str, Path().glob(word))) or [word] for word in shlex.split(line)[2:]]
    monkeypatch.setattr(sys, "argv", ["training_costs", *chain(*words)])
    training_costs.main()
    assert capsys.readouterr().out in GUIDE


def test_an_unknown_data_set_needs_plan_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.yaml"
    sizes = "model: {num_classes: 7, points: [14]}\ntrain: {batch: 10, epochs: 2}\n"
    path.write_text(sizes)
    monkeypatch.setattr(sys, "argv", ["training_costs", str(path)])
    with pytest.raises(SystemExit, match=r"a\.yaml: set plan\.clips"):
        training_costs.main()
    path.write_text(sizes + "plan: {clips: 1009}\n")
    monkeypatch.setattr(sys, "argv", ["training_costs", str(path), "--peak-macs-per-s", "1e9", "--utilisation", "0.5"])
    training_costs.main()
    *_, step, epochs, clips, hours = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (step, epochs, clips) == ("1.00", "2", "1,009")
    # 2 epochs of 100 steps of 10 clips; forward and backward pass have the MACs of 3 forward passes.
    macs = 2 * 100 * 10 * 3 * point_cost(load_config(path).model, "14").total
    assert float(hours.replace(",", "")) == pytest.approx(macs / 0.5e9 / 3600, rel=0.001)
