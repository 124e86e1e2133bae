"""`bench attention`: every kernel at every shape, and rules that `attend` follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from videoadapt.config.load import make_config
from videoadapt.errors import UserError
from videoadapt.model.attention import DEFAULT_RULES, KERNELS, Rule, kernel_for, read_rules
from videoadapt.performance.bench.attention import AttentionRow, Shape, bench_attention, rules_of, shapes

MODEL = {
    "width": 24,
    "depth": 1,
    "heads": 3,
    "patch": 4,
    "size": 32,
    "num_frames": 2,
    "num_classes": 3,
    "points": ["8", "4"],
}
ROW = AttentionRow(16, 65, "fp32", training=False, kernel="explicit", seconds=[1.0] * 3, speed=[1.5, 1.2, 1.8])


def test_each_kernel_is_measured_at_each_shape_and_its_rules_can_be_read(tmp_path: Path) -> None:
    config = make_config({"model": MODEL, "run": {"device": "cpu"}})
    result = bench_attention(config, ["rounds=2", "batch=1", f"dir={tmp_path}"])
    assert len(result["rows"]) == len(shapes(config.model, 1)) * 2 * 2 * 2  # precisions, passes, kernels
    for row in result["rows"]:
        assert row["kernel"] != "fused" or row["speed"] == [1, 1, 1]
    assert json.loads((tmp_path / "attention.json").read_text()) == result
    rules = read_rules(tmp_path / "attention.json")
    tokens = {shape.tokens for shape in shapes(config.model, 1)}
    assert {rule.longest for rule in rules} == tokens and len(rules) == len(tokens) * 2 * 2  # noqa: PT018
    assert len((tmp_path / "attention.md").read_text().splitlines()) == 2 + len(result["rows"])


def test_shapes_are_those_within_frames_and_over_time() -> None:
    model = make_config({"model": MODEL}).model
    frames = model.num_frames
    within, over_time = [Shape(3 * frames, 65), Shape(3 * frames, 17)], [Shape(3 * 64, frames), Shape(3 * 16, frames)]
    assert shapes(model, 3) == within + over_time


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [
        ([ROW], "explicit"),
        ([replace(ROW, speed=[1.1, 0.9, 1.2])], "fused"),  # not beyond the interval
        ([ROW, replace(ROW, sequences=400, speed=[0.5, 0.4, 0.6])], "fused"),  # not at every number of sequences
        ([ROW, replace(ROW, kernel="flash", speed=[2.0, 1.9, 2.1])], "flash"),
    ],
)
def test_a_kernel_is_taken_where_it_is_faster_beyond_the_interval(rows: list[AttentionRow], kernel: str) -> None:
    usual = [replace(ROW, kernel="fused", speed=[1.0, 1.0, 1.0])]
    assert rules_of([*usual, *rows], "cpu") == [Rule("cpu", "fp32", training=False, longest=65, kernel=kernel)]


def test_the_first_rule_that_fits_decides() -> None:
    assert kernel_for("cpu", "bf16", 197, training=True) == "explicit"
    assert kernel_for("cpu", "fp32", 8, training=False) == "fused"
    rules = (Rule("cpu", "fp32", False, 8, "explicit"), Rule("cpu", "fp32", False, 65, "flash"))  # noqa: FBT003
    found = [kernel_for("cpu", "fp32", tokens, training=False, rules=rules) for tokens in (8, 9, 65, 66)]
    assert found == ["explicit", "flash", "flash", "fused"]
    assert kernel_for("cpu", "fp32", 8, training=True, rules=rules) == "fused"
    assert kernel_for("cpu", None, 8, training=False, rules=rules) == "fused"  # float64


def test_the_kernels_of_a_cpu_agree() -> None:
    q, k, v = torch.randn(3, 4, 2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(KERNELS["explicit"](q, k, v), KERNELS["fused"](q, k, v), rtol=1e-12, atol=1e-12)


def test_a_file_of_rules_is_used_by_a_new_process_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    path.write_text(json.dumps({"rules": [rule._asdict() | {"precision": "fp32"} for rule in DEFAULT_RULES]}))
    program = "from videoadapt.model.attention import *; print(kernel_for('cpu', 'fp32', 8, training=True))"
    environment = os.environ | {"VIDEOADAPT_ATTENTION": str(path)}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "explicit"
    with pytest.raises(UserError, match="bench attention"):
        read_rules(tmp_path / "missing.json")
    for content, message in (
        ({}, "rules"),
        ({"rules": [{"kernel": "flash"}]}, "damaged"),
        ({"rules": [DEFAULT_RULES[0]._asdict() | {"kernel": "fast"}]}, "unknown kernels 'fast'; expected fused"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            read_rules(path)
