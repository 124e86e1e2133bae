"""`bench train`: what it measures, how it derives its figures, and what it says when parts are missing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import small_runs as runs
from bench_train import PEER, Settings, add_times, bench_train, by_lengths, contestants
from bench_train_ranks import Turn, slots, started
from bench_train_steps import StepTurn
from bench_train_tables import print_bench_train
from videoadapt.config.load import Config
from videoadapt.errors import ConfigError, RunError


def tiny(folder: Path, /, **sections: dict) -> Config:
    return runs.config(folder / "data", folder / "run", **sections)


def own_core(config: Config) -> Turn:  # noqa: ARG001 - what `started` calls
    return lambda: (os.environ["RANK"], sorted(os.sched_getaffinity(0)))


def broken(config: Config) -> Turn:  # noqa: ARG001
    raise ValueError("no such thing here\nand more")


def dying(config: Config) -> Turn:  # noqa: ARG001
    os._exit(3)


def own_number(config: Config) -> Turn:  # noqa: ARG001
    return os.getpid


def test_contestants(tmp_path: Path) -> None:
    names = [each.name for each in contestants(tiny(tmp_path), Settings(batch=4))]
    assert names == [
        *("alone {8}", "alone {4}", "alone {6}"),
        *("sequential {8, 4}", "groups {8, 4}, 2 ranks"),
        *("sequential {8, 6, 4}", "groups {8, 6, 4}, 2 ranks", "groups {8, 6, 4}, 3 ranks"),
        *("no groups {8, 6, 4}, 2 ranks", "no groups {8, 6, 4}, 3 ranks"),
    ]
    more = contestants(tiny(tmp_path), Settings(batch=4, lengths=(8, 4, 6, 7)))
    assert [each.name for each in more if each.kind == "sequential"][-1] == "sequential {8, 7, 6, 4}"
    assert all((each.config.train.batch, each.config.train.accumulate) == (4, 1) for each in more)


def test_a_grid_is_timed_as_a_whole_and_as_it_is_drawn(tmp_path: Path) -> None:
    grid = {"points": ["8", "8@0.5", "4", "4@0.5"], "drop_blocks": [1]}
    config = tiny(tmp_path, model=grid, train={"draw": "sampled"})
    found = {each.name: each for each in contestants(config, Settings(batch=4))}
    assert list(found)[:2] == ["alone {8}", "alone {4}"]
    assert list(found)[-2:] == ["all {8, 8@0.5, 4, 4@0.5}", "sampled {8, 8@0.5, 4, 4@0.5}"]
    assert {name: each.config.train.draw for name, each in found.items()} == {
        name: "sampled" if name.startswith("sampled") else "all" for name in found
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["turns=3"], r"bench train: unknown key turns; did you mean \w+\?"),
        (["rounds=0"], "bench train: rounds: .*greater than or equal to 1, got 0"),
        (["lengths=[8,8]"], "expected different lengths"),
        (["lengths=[9]"], "length 9 with 8-pixel patches needs 72 pixels"),
    ],
)
def test_wrong_settings(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bench_train(tiny(tmp_path), words)


def row(kind: str, points: list[str], ranks: int, macs: int, predicted_s: float | None = 1.0) -> dict[str, Any]:
    name = f"{kind} {','.join(points)} {ranks}"
    about = {"name": name, "kind": kind, "points": points, "ranks": ranks, "macs": macs, "clips": 2, "parameters": 10}
    return about | {"predicted_s": predicted_s}


def turn(*seconds: float, alone_s: float = 1.0) -> list[StepTurn]:
    return [StepTurn(each, alone_s, 0.25, 100) for each in seconds]


def test_figures_that_follow_from_the_times() -> None:
    rows = [
        row("alone", ["14"], 1, 100),
        row("alone", ["7"], 1, 25),
        row("sequential", ["14", "7"], 1, 125),
        row("groups", ["14", "7"], 2, 125, predicted_s=4.0),
        row(PEER, ["14"], 1, 100, predicted_s=None),
    ]
    turns = {
        rows[0]["name"]: [turn(2.0), turn(4.0), turn(2.0)],
        rows[1]["name"]: [turn(1.0)] * 3,
        rows[2]["name"]: [turn(3.0), turn(5.0), turn(2.0)],
        rows[4]["name"]: [turn(4.0), turn(8.0), turn(4.0)],
    }
    add_times(rows, turns, 75.0)
    alone, _, sequential, groups, peer = rows
    assert alone["step_s"] == 2.0
    assert alone["peak_fraction"] == pytest.approx(3 * 100 / 2.0 / 75)
    assert sequential["times_alone"] == 1.25  # the median of 1.5, 1.25 and 1 within their rounds
    assert sequential["flops_bound"] == 1.25
    assert sequential["times_bound"] == 1.0
    assert sequential["prediction_error"] == pytest.approx(1 / 3 - 1)
    assert groups["step_s"] is groups["times_alone"] is groups["prediction_error"] is None
    assert (peer["times_alone"], peer["prediction_error"]) == (2.0, None)

    one, two = by_lengths(rows)
    assert (one["sequential_s"], one["grouped_s"], one["separate_s"]) == (2.0, 2.0, 2.0)
    assert (two["sequential_s"], two["grouped_s"], two["grouped_is_predicted"]) == (3.0, 4.0, True)
    assert (two["separate_s"], two["separate_parameters"], two["separate_peak_bytes"]) == (3.0, 20, 200)

    turns[groups["name"]] = [turn(4.0, 3.0, alone_s=2.0)] * 3
    add_times(rows, turns, 75.0)
    assert groups["step_s"] == 4.0  # of the slowest rank
    assert groups["communication"] == 0.5
    assert groups["waited_s"] == 0.25
    assert groups["peak_fraction"] == pytest.approx(3 * 125 / 4.0 / (2 * 75))
    assert by_lengths(rows)[1]["grouped_is_predicted"] is False


@pytest.mark.skipif(slots("cpu") < 2, reason="needs two cores")
def test_each_rank_has_a_core_of_its_own(tmp_path: Path) -> None:
    with started(2, own_core, tiny(tmp_path)) as ranks:
        ranks.ready()
        (first, cores), (second, others) = ranks.turn()
        assert ranks.turn() == [(first, cores), (second, others)]
    assert (first, second) == ("0", "1")
    assert len(cores) == len(others) == 1
    assert cores != others


@pytest.mark.parametrize(("prepare", "said"), [(broken, "^no such thing here$"), (dying, "its process has died")])
def test_a_rank_that_fails_says_why(tmp_path: Path, prepare: Any, said: str) -> None:
    with started(1, prepare, tiny(tmp_path)) as ranks, pytest.raises(RunError, match=said):
        ranks.ready()


def test_a_rank_that_is_killed_while_it_waits(tmp_path: Path) -> None:
    with started(1, own_number, tiny(tmp_path)) as ranks:
        ranks.ready()
        (number,) = ranks.turn()
        os.kill(number, signal.SIGKILL)
        with pytest.raises(RunError, match="its process has died"):
            ranks.turn()


@pytest.mark.slow
def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rounds=2", "batch=2", "lengths=[8,4,6]", f"dir={tmp_path / 'out'}"]
    result = bench_train(tiny(tmp_path), words)
    assert json.loads((tmp_path / "out" / "train.json").read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    for found in rows.values():
        if found["kind"] == PEER and found["name"] in result["left_out"]:  # transformers is missing
            continue
        measured = found["ranks"] <= result["machine"]["ranks"]
        assert (found["step_s"] is not None) == measured
        if measured:
            assert len(found["rounds_s"]) == 2
            assert 0 < found["peak_fraction"]
            assert found["peak_bytes"] > 0
        if found["kind"] != PEER:
            assert found["predicted_s"] > 0
    assert rows["sequential {8, 6, 4}"]["flops_bound"] == pytest.approx(1.746, abs=0.001)
    assert "2 clips" in result["left_out"]["no groups {8, 6, 4}, 3 ranks"]
    assert [len(each["points"]) for each in result["lengths"]] == [1, 2, 3]
    assert result["lengths"][2]["parameters"] < result["lengths"][2]["separate_parameters"] / 2
    print_bench_train(result)
    said = capsys.readouterr().out
    assert "left out: no groups {8, 6, 4}, 3 ranks" in said
    assert "decoding is not part of a step" in said


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    missing = runs.command("bench", "train", tmp_path / "none.yaml", "rounds=1")
    assert missing.returncode == 2
    assert "none.yaml: cannot read this config" in missing.stderr
    (tmp_path / "config.yaml").write_text("model: {size: 32, points: [2]}\n")
    wrong = runs.command("bench", "train", tmp_path / "config.yaml", "rounds=none", "train.batch=2")
    assert wrong.returncode == 2
    assert "bench train: rounds" in wrong.stderr
