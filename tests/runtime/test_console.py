"""Files written whole or not at all, curves without the steps that were lost, and what goes to which stream."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from videoadapt.runtime.console import Bar, duration, print_table, say
from videoadapt.runtime.files import replacing, write_csv, write_json, write_parquet
from videoadapt.training.metrics import Metrics


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # else the renaming would not be atomic
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_replaced_file_can_be_read_by_others(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the new")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to finish
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_temporary_file_is_hidden_from_patterns(tmp_path: Path) -> None:
    with replacing(tmp_path / "step-1.safetensors") as temporary:
        assert list(tmp_path.glob("step-*")) == []
        assert temporary.exists()


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = f"""
        import os, signal
        from pathlib import Path
        from videoadapt.runtime.files import replacing
        with replacing(Path({str(path)!r})) as temporary:
            temporary.write_text("half of the new")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=60)
    assert found.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_json_is_written_whole_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None, 0.1], "b": "ü"})
    assert json.loads(path.read_text()) == {"a": [1, None, 0.1], "b": "ü"}
    before = path.read_text()
    for value in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, value)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["a.json"]


def test_tables_are_written_whole(tmp_path: Path) -> None:
    frame = pd.DataFrame({"video": ["a", "b"], "macs": [1, 2]})
    write_parquet(tmp_path / "a.parquet", frame)
    write_csv(tmp_path / "a.csv", frame)
    assert pd.read_parquet(tmp_path / "a.parquet").equals(frame)
    assert pd.read_csv(tmp_path / "a.csv").equals(frame)
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.parquet"]


# Training curves.


def record(folder: Path, start: int, stop: int, run: int = 0) -> None:
    metrics = Metrics(folder, start)
    for step in range(start + 1, stop + 1):
        metrics.write(step, {"loss": step / 10, "run": run})
    metrics.close()


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_curves_are_one_object_a_line(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    assert lines(tmp_path) == [{"step": s, "loss": s / 10, "run": 0} for s in (1, 2, 3)]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_steps_after_the_checkpoint_are_dropped_and_written_again(tmp_path: Path) -> None:
    record(tmp_path, 0, 7, run=1)
    record(tmp_path, 4, 6, run=2)
    assert [(line["step"], line["run"]) for line in lines(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


def test_a_run_from_the_beginning_drops_all(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    Metrics(tmp_path, 0).close()
    assert lines(tmp_path) == []


def test_a_run_that_was_complete_loses_nothing(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Metrics(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"loss": 1}', "[2]", "2", "", "\0\0\0", '{"step": null}'])
def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path, torn: str) -> None:
    record(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    record(tmp_path, 2, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_step_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {"loss": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    metrics.close()


# Streams.


def test_messages_and_progress_go_to_stderr_and_tables_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    say("a [bold]message[/bold] " + "x" * 200)
    with Bar("train", total=3, unit="clips") as bar:
        bar.step(3, "loss 0.5")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "a [bold]message[/bold] " + "x" * 200  # neither styled nor folded
    assert err.splitlines()[1].startswith("train: 3/3 clips in 0:00")
    assert err.splitlines()[1].endswith("loss 0.5")
    print_table("Costs", ("point", "MACs"), [("14", "196 G"), ("7", "48.1 G")])
    out, err = capfd.readouterr()
    assert err == ""
    assert all(word in out for word in ("Costs", "point", "196 G", "48.1 G"))


def test_a_table_prints_its_cells_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    print_table("T", ("name", "n"), [("[red]x[/red]", 1)])
    print_table("nothing", ("empty",), [])
    out = capfd.readouterr().out
    assert "[red]x[/red]" in out
    assert "nothing" in out


def test_progress_in_a_log_file_counts_from_where_it_started(capfd: pytest.CaptureFixture[str]) -> None:
    with Bar("label", total=10, unit="videos", start=6, every_s=0.0) as bar:
        bar.step(2)
        bar.step(2)
    err = capfd.readouterr().err.splitlines()
    assert err[0].startswith("label: 8/10 videos")
    assert err[-1].startswith("label: 10/10 videos in")


def test_a_bar_tells_how_far_it_came_when_the_work_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), Bar("index", total=10, unit="videos") as bar:
        bar.step(4)
        raise ValueError("x")
    assert "index: 4/10 videos" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (59.7, "1:00"), (3599.6, "1:00:00"), (90061, "25:01:01")]
)
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text
