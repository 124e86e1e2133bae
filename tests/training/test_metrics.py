"""The summary of a run, with old names of its keys, and the metrics of each step."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from videoadapt.errors import UserError
from videoadapt.training.metrics import Metrics, PointMetrics, TrainSummary

SUMMARY = TrainSummary(
    steps=10,
    epochs=2,
    clips=40,
    skipped=1,
    manifest="aa",
    checkpoint="runs/a/checkpoints/step-00000010.safetensors",
    seconds=12.5,
    clips_per_s=6.4,
    wait_fraction=0.25,
    peak_memory_bytes=10**9,
    points={"8": PointMetrics(1.5, 0.5), "4": PointMetrics(None, None)},
)


@pytest.mark.parametrize("key", ["wait_fraction", "wait_share"])
def test_a_summary_is_read_as_it_was_written(tmp_path: Path, key: str) -> None:
    values = asdict(SUMMARY)
    values[key] = values.pop("wait_fraction")
    (tmp_path / "train.json").write_text(json.dumps(values))
    assert TrainSummary.read(tmp_path / "train.json") == SUMMARY


@pytest.mark.parametrize("content", ["", '{"steps": 1', "[]", '{"steps": 1}', '{"points": 3}', '{"points": {"8": 1}}'])
def test_a_damaged_summary_is_an_error_with_its_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match=r"train\.json: damaged.*; delete it, and run `train` again"):
        TrainSummary.read(tmp_path / "train.json")


# Training curves.


def record(folder: Path, start: int, stop: int, run: int = 0) -> None:
    metrics = Metrics(folder, start)
    for step in range(start + 1, stop + 1):
        metrics.write(step, {"loss": step / 10, "run": run})
    metrics.close()


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_one_json_object_in_a_line(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    assert lines(tmp_path) == [{"step": s, "loss": s / 10, "run": 0} for s in (1, 2, 3)]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_steps_after_the_checkpoint_are_replaced_on_resume(tmp_path: Path) -> None:
    record(tmp_path, 0, 7, run=1)
    record(tmp_path, 4, 6, run=2)
    assert [(line["step"], line["run"]) for line in lines(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


def test_a_run_from_step_0_removes_all_lines(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    Metrics(tmp_path, 0).close()
    assert lines(tmp_path) == []


def test_opening_at_the_last_step_changes_no_byte(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Metrics(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"loss": 1}', "[2]", "2", "", "\0\0\0", '{"step": null}'])
def test_a_line_cut_off_by_a_crash_is_removed(tmp_path: Path, torn: str) -> None:
    record(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    record(tmp_path, 2, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b'{"step": 2, "loss": "x"}', b"[" * 100_000])
def test_damaged_lines_are_removed_with_a_message(
    tmp_path: Path, damage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, third, b""]))
    record(tmp_path, 3, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 4]
    assert "metrics.jsonl: removed 1 damaged line, the first is line 2" in capfd.readouterr().err


def test_a_step_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {"loss": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    metrics.close()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(tmp_path, 0)
    full = Path("/dev/full").open("a")
    monkeypatch.setattr(metrics, "_file", full)
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        metrics.write(1, {"loss": 0.5})
    with suppress(OSError):
        full.close()


def test_clips_of_steps_that_are_trained_again_are_not_listed_twice(tmp_path: Path) -> None:
    """`skipped.jsonl` counts steps from 0: three steps are done, and the fourth was killed before its checkpoint."""
    lines = [json.dumps({"step": step, "path": "a.mp4", "cause": "gone"}) + "\n" for step in (0, 2, 3)]
    (tmp_path / "skipped.jsonl").write_text("".join(lines))
    Metrics(tmp_path, 3).close()
    assert (tmp_path / "skipped.jsonl").read_text() == "".join(lines[:2])
