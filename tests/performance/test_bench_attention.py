"""`bench attention`: every kernel at every shape, and rules that `attend` follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from videoadapt.config.load import make_config
from videoadapt.errors import UserError
from videoadapt.model import attention
from videoadapt.model.attention import DEFAULT_RULES, KERNELS, Rule, kernel_for, read_rules
from videoadapt.performance.bench.attention import AttentionRow, Shape, bench_attention, rules_of, shapes

CPU = torch.device("cpu")
MODEL: dict[str, Any] = {
    "width": 24,
    "depth": 1,
    "heads": 3,
    "patch": 4,
    "size": 32,
    "num_frames": 2,
    "num_classes": 3,
    "points": ["8", "4"],
}
USUAL = AttentionRow(16, 65, "fp32", training=False, kernel="fused", built_in="fused", seconds=[1.0], speed=[1.0] * 3)
ROW = replace(USUAL, kernel="explicit", speed=[1.5, 1.2, 1.8])


def test_each_kernel_is_measured_at_each_shape_and_its_rules_can_be_read(tmp_path: Path) -> None:
    config = make_config({"model": MODEL, "run": {"device": "cpu"}})
    result = bench_attention(config, ["rounds=2", "batch=1", f"dir={tmp_path}"])
    assert not result["rules"]  # two rounds give no interval
    assert len(result["rows"]) == len(shapes(config.model, 1, CPU)) * 2 * 2 * 2  # precisions, passes, kernels
    for row in result["rows"]:
        assert row["built_in"] == ("explicit" if row["precision"] == "bf16" else "fused")
        assert row["kernel"] != row["built_in"] or row["speed"] == [1, 1, 1]
    assert json.loads((tmp_path / "attention.json").read_text()) == result
    assert [rule._asdict() for rule in read_rules(tmp_path / "attention.json")] == result["rules"]
    assert len((tmp_path / "attention.md").read_text().splitlines()) == 2 + len(result["rows"])
    assert not result["failed"]


def test_shapes_are_those_within_frames_and_over_time() -> None:
    model = make_config({"model": MODEL | {"distill_token": True}}).model
    frames = model.num_frames
    within, over_time = [Shape(3 * frames, 65), Shape(3 * frames, 18)], [Shape(3 * 64, frames), Shape(3 * 16, frames)]
    assert shapes(model, 3, CPU) == within + over_time


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [
        ([ROW], "explicit"),
        ([replace(ROW, speed=[1.1, 0.9, 1.2])], None),  # not beyond the interval
        ([ROW, replace(ROW, sequences=400, speed=[0.5, 0.4, 0.6])], None),  # not at every number of sequences
        ([ROW, replace(ROW, kernel="flash", speed=[2.0, 1.9, 2.1])], "flash"),
    ],
)
def test_a_kernel_is_taken_where_it_is_faster_beyond_the_interval(rows: list[AttentionRow], kernel: str | None) -> None:
    found = rules_of([USUAL, *rows], "cpu", 8)
    assert found == ([rule(longest=65, kernel=kernel)] if kernel else [])


def test_shorter_sequences_keep_the_built_in_kernel() -> None:
    short = [replace(USUAL, tokens=8), replace(ROW, tokens=8, speed=[0.5, 0.4, 0.6])]
    assert rules_of([USUAL, ROW, *short], "cpu", 8) == [rule(longest=8), rule(kernel="explicit")]


def rule(**changes: Any) -> Rule:
    return Rule("cpu", "fp32", training=False, width=8, longest=65, kernel="fused")._replace(**changes)


def test_the_first_rule_that_fits_decides() -> None:
    rules = (rule(longest=8, kernel="explicit"), rule(kernel="flash"), *DEFAULT_RULES)
    found = [kernel_for(rule(longest=tokens), rules) for tokens in (8, 9, 65, 66)]
    assert found == ["explicit", "flash", "flash", "fused"]
    others = [rule(training=True), rule(width=16), rule(precision=""), rule(precision="bf16", longest=9)]
    assert [kernel_for(each, rules) for each in others] == ["fused", "fused", "fused", "explicit"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_attention_runs_the_kernel_of_the_rules(
    training: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def record(name: str, q: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        called.append(name)
        return q

    kernels = {name: partial(record, name) for name in KERNELS}
    monkeypatch.setattr(attention, "KERNELS", kernels)
    monkeypatch.setattr(attention, "RULES", (rule(kernel="flash"), rule(training=True, kernel="cudnn"), *DEFAULT_RULES))
    q = torch.zeros(4, 2, 9, 8, dtype=dtype, requires_grad=training)
    attention.attend(q, q, q)
    expected = {torch.float32: "cudnn" if training else "flash", torch.bfloat16: "explicit", torch.float64: "fused"}
    assert called == [expected[dtype]]


def test_a_kernel_that_torch_is_told_to_take_compiles_into_one_graph() -> None:
    q, k, v = torch.randn(3, 4, 2, 9, 8)
    torch._dynamo.reset()
    compiled = torch.compile(KERNELS["flash"], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), KERNELS["fused"](q, k, v))


def test_the_kernels_of_a_cpu_agree() -> None:
    q, k, v = torch.randn(3, 4, 2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(KERNELS["explicit"](q, k, v), KERNELS["fused"](q, k, v), rtol=1e-12, atol=1e-12)


def test_a_file_of_rules_is_used_by_a_new_process_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    path.write_text(json.dumps({"rules": [rule(kernel="explicit")._asdict()]}))
    program = "from videoadapt.model.attention import RULES; print(*RULES[0])"
    environment = os.environ | {"VIDEOADAPT_ATTENTION": str(path)}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == ["cpu", "fp32", "False", "8", "65", "explicit"]
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
