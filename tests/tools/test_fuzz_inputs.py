"""tools/fuzz_inputs.py: a few damaged files of each kind, and what counts as a failure."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import pytest

import fuzz_inputs
from videoadapt.config.load import dump_config, parse_settings
from videoadapt.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the config, the table and the (empty) videos of a run that did not start."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    names = [f"class {number}" for number in range(12)]
    (data / "classes.txt").write_text("\n".join(names))
    rows = [f"class {n},abcdefghij{n},{n},{n + 1},train" for n in range(6)]
    (data / "train.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]))
    (data / "val.csv").write_text((data / "train.csv").read_text().replace("train", "val"))
    for number in range(6):
        (data / "videos" / f"{number}.mp4").touch()
    (tmp_path / "config.yaml").write_text(dump_config(fuzz_inputs.config_of(tmp_path)))
    return tmp_path


@pytest.mark.parametrize("kind", ["configs", "lists", "JSON"])
def test_damaged_files_are_read_or_refused_in_one_line(folder: Path, kind: str) -> None:
    found = fuzz_inputs.written_by_people(folder, fuzz_inputs.config_of(folder))[kind]
    tally = fuzz_inputs.run_kind(found, folder, 40, 7, commands=False)
    assert not tally.failures
    assert sum(tally.outcomes.values()) == 40
    assert tally.outcomes["refused"] > 5


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "accepted"), (UserError("a: b"), "refused"), (UserError(""), "failed"), (KeyError("x"), "failed")],
)
def test_every_error_but_those_for_users_is_a_failure(error: Exception | None, outcome: str) -> None:
    def read(_: str) -> None:
        if error is not None:
            raise error

    assert fuzz_inputs.in_process(fuzz_inputs.Kind({}, read, lambda _: []), "a")[0] == outcome


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (0, "", "accepted"),
        (2, "error: a.yaml: no\n", "refused"),
        (1, "error: disk full\n", "exit 1"),
        (2, "error: a\nerror: b\n", "failed"),
        (2, "error: " + "x" * 1000, "failed"),
        (1, "Traceback (most recent call last):\nerror: x", "failed"),
        (-9, "", "failed"),
        (2, "", "failed"),
    ],
)
def test_a_command_must_end_with_one_short_line(code: int, text: str, outcome: str) -> None:
    assert fuzz_inputs.judge(code, text)[0] == outcome


def test_an_unknown_kind_is_refused_before_a_run_is_made() -> None:
    with pytest.raises(UserError, match="kinds"):
        parse_settings(fuzz_inputs.Settings, "fuzz_inputs", ["kinds=[typo]"])
    assert parse_settings(fuzz_inputs.Settings, "fuzz_inputs", ["kinds=[state files]"]).kinds == ["state files"]


def test_what_a_command_leaves_running_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()

    def leave_one(words: list[str]) -> None:  # noqa: ARG001
        if os.fork() == 0:
            signal.pause()
        sys.exit(0)

    monkeypatch.setattr(fuzz_inputs, "main", leave_one)
    assert fuzz_inputs.by_command([], tmp_path / "out.txt")[0] == "accepted"
    os.close(writing)
    assert select.select([reading], [], [], 30)[0]  # at its end: no process holds the other side
    os.close(reading)
