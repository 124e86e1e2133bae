"""`tools/gpu_check.py` goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import gpu_check


def test_only_parts_that_ended_well_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def good(machine: gpu_check.Machine, result: gpu_check.Result) -> None:
        ran.append("good")
        result["device"] = machine.device.type

    def bad(machine: gpu_check.Machine, result: gpu_check.Result) -> None:  # noqa: ARG001
        ran.append("bad")
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "PARTS", {"good": good, "bad": bad})
    out = tmp_path / "check.json"

    def found() -> gpu_check.Result:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu", "--out", str(out), "--only", "good,bad"])
        gpu_check.main()
        return dict(json.loads(out.read_text()))

    first = found()
    assert "no such kernel" in first["bad"]["error"]
    second = found()
    assert ran == ["good", "bad", "bad"]
    assert second["good"] == first["good"]
    out.write_text(json.dumps(second | {"torch": "0.1"}))  # another torch: all parts again
    found()
    assert ran[3:] == ["good", "bad"]
