"""Messages and progress go to stderr, tables to stdout; formats of numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videoadapt.errors import plural
from videoadapt.runtime import console
from videoadapt.runtime.console import (
    Bar,
    duration,
    in_points,
    macs,
    percent,
    percent_interval,
    print_table,
    say,
    signed_points,
)


def test_messages_and_progress_go_to_stderr_and_tables_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    say("a [bold]message[/bold] :id: " + "x" * 200)
    with Bar("train", total=3, unit="clips") as bar:
        bar.step(3, "loss 0.5")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "a [bold]message[/bold] :id: " + "x" * 200  # neither styled nor folded
    assert err.splitlines()[1].startswith("train: 3/3 clips in 0:00")
    assert err.splitlines()[1].endswith("loss 0.5")
    print_table("Costs", ("point", "MACs"), [("14", "196 G"), ("7", "48.1 G")])
    out, err = capfd.readouterr()
    assert err == ""
    assert all(word in out for word in ("Costs", "point", "196 G", "48.1 G"))
    print_table("Checks", ("a rank", "value"), [(0, 1)], to_stderr=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "a rank" in err


def test_only_rank_0_prints_messages() -> None:
    program = "from videoadapt.runtime.console import say; say('a message')"
    for rank in "01":
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stderr == ("a message\n" if rank == "0" else "")


def test_columns_of_numbers_are_aligned_to_the_right(capfd: pytest.CaptureFixture[str]) -> None:
    print_table("T", ("name", "MACs", "top-1 %"), [("a", "196 G", 75.3), ("long name", "48.1 G", "-")])
    first, second = capfd.readouterr().out.splitlines()[4:6]
    cells = [[cell[1:-1] for cell in line.strip("│").split("│")] for line in (first, second)]
    assert cells == [["a        ", " 196 G", "   75.3"], ["long name", "48.1 G", "      -"]]


def test_a_table_does_not_interpret_markup_in_cells(capfd: pytest.CaptureFixture[str]) -> None:
    print_table("T", ("name", "n"), [("[red]x[/red]", 1)])
    print_table("nothing", ("empty",), [])
    out = capfd.readouterr().out
    assert "[red]x[/red]" in out
    assert "nothing" in out


def test_progress_of_a_resumed_run_starts_from_its_old_count(capfd: pytest.CaptureFixture[str]) -> None:
    with Bar("label", total=10, unit="videos", start=6, every_s=0.0) as bar:
        bar.step(2)
        bar.step(2)
    err = capfd.readouterr().err.splitlines()
    assert err[0].startswith("label: 8/10 videos")
    assert err[-1].startswith("label: 10/10 videos in")


def test_the_remaining_time_follows_from_the_speed_of_this_run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Bar("label", total=10, unit="videos", start=6, every_s=30.0) as bar:
        now = 200.0
        bar.step(0, "validating")  # what comes before the work does not count
        now = 220.0
        bar.step(1)  # too early for a line
        now = 240.0
        bar.step(1, "note")  # 20 s for a video, 2 remain
    assert capfd.readouterr().err.splitlines() == [
        "label: 6/10 videos validating",
        "label: 8/10 videos note 0:40 left",
        "label: 8/10 videos in 2:20 note",
    ]


def test_a_bar_prints_its_count_after_an_exception(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), Bar("index", total=10, unit="videos") as bar:
        bar.step(4)
        raise ValueError("x")
    assert "index: 4/10 videos" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (59.7, "1:00"), (3599.6, "1:00:00"), (90061, "25:01:01")]
)
def test_durations_are_printed_as_minutes_and_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (64_500, "64.5 k"),
        (1.29951e8, "130 M"),
        (98.64e9, "98.6 G"),
        (195.83e9, "196 G"),
        (999.4e9, "999 G"),
        (999.7e9, "1 T"),
        (999_999, "1 M"),
        (1.7027e12, "1.7 T"),
        (7.1396e12, "7.14 T"),
        (1.2345e15, "1234 T"),
    ],
)
def test_macs_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert macs(value) == text


@given(st.floats(1, 1e15))
def test_printed_macs_have_no_exponent_and_the_right_value(value: float) -> None:
    number, _, unit = macs(value).partition(" ")
    assert "e" not in number
    printed = float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
    assert abs(printed - value) <= max(0.5, 0.0051 * value)  # whole numbers below 1 k, three digits above


def test_fractions_are_printed_in_per_cent() -> None:
    assert [percent(v) for v in (0.0, 0.7534, 1.0)] == ["0.0", "75.3", "100.0"]
    assert percent_interval(0.7534, 0.71, 0.7921) == "75.3 (71.0 to 79.2)"
    assert signed_points((0.012, -0.003, 0.027)) == "+1.2 (-0.3 to +2.7)"
    assert in_points((0.012, -0.003, 0.027)) == "+1.2 points (-0.3 to +2.7)"


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "class", "1 class"), (2, "class", "2 classes"), (2, "epoch", "2 epochs"), (0, "clip", "0 clips")],
)
def test_numbers_have_the_plural_of_their_nouns(number: int, noun: str, text: str) -> None:
    assert plural(number, noun) == text
