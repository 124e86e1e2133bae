"""`tools/gpu_check.py` goes on where it stopped, and does not end well if a part failed or found a wrong result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import gpu_check
from videoadapt.model import block


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu", "--out", str(path), "--only", "parity,attention"])
    return path


def test_only_parts_that_ended_well_are_not_run_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def good(machine: gpu_check.Machine, result: gpu_check.Result) -> None:
        ran.append("good")
        result["device"] = machine.device.type

    def bad(machine: gpu_check.Machine, result: gpu_check.Result) -> None:  # noqa: ARG001
        ran.append("bad")
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "PARTS", {"parity": good, "attention": bad})

    def found() -> gpu_check.Result:
        with pytest.raises(SystemExit, match="failed or wrong: attention"):
            gpu_check.main()
        return dict(json.loads(out.read_text()))

    first = found()
    assert "no such kernel" in first["attention"]["error"]
    second = found()
    assert ran == ["good", "bad", "bad"]
    assert second["parity"] == first["parity"]
    out.write_text(json.dumps(second | {"torch": "0.1"}))  # another torch: all parts again
    found()
    out.write_text('{"torch": ')  # a file that was not written to its end: all parts again
    found()
    assert ran[3:] == ["good", "bad"] * 2


def test_real_parts_end_well_and_a_wrong_result_does_not(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "BOUNDS", dict.fromkeys(gpu_check.BOUNDS, 1e-12))
    with pytest.raises(SystemExit, match="failed or wrong: parity"):
        gpu_check.main()
    assert not json.loads(out.read_text())["parity"]["right"]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu", "--out", str(out), "--only", "parity,attention"])
    gpu_check.main()
    found = json.loads(out.read_text())
    assert found["parity"]["right"]
    assert found["attention"]["temporal ours"]["both_ms"] > 0


def test_missing_gradients_and_failed_ranks_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, ours = (gpu_check.nn.Linear(2, 2) for _ in range(2))
    exact(gpu_check.torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="only one of the models has gradients of bias, weight"):
        gpu_check._gradient_error(exact, ours)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no NCCL")

    monkeypatch.setattr(gpu_check.torch.multiprocessing, "spawn", fail)
    result: gpu_check.Result = {}
    gpu_check.ranks(gpu_check.Machine(gpu_check.torch.device("cpu")), result)
    assert result["error"].count("no NCCL") == 2
    assert not gpu_check.ended_well(result)


def test_what_a_contestant_replaces_is_restored_after_an_error() -> None:
    usual = block.has_kernel
    model = gpu_check.Machine(gpu_check.torch.device("cpu")).config().model
    contestants = gpu_check._contestants(model, {})
    for name, *_ in contestants:
        if name == "ours without kernels":
            assert block.has_kernel is not usual
            contestants.close()
    assert block.has_kernel is usual
