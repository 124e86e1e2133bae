"""`tools/bench_train.py`: its cases, the figures it derives from times, and its processes when a rank fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bench_train as tool
import small_runs as runs
from bench_train import PEER, Settings, bench_train, cases
from bench_train_results import Row, by_lengths, print_bench_train, with_times
from bench_train_steps import StepTime
from rank_processes import Turn, slots, started
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, dump_config
from videoadapt.errors import ConfigError, RunError


def tiny(folder: Path, /, **sections: dict) -> Config:
    return runs.config(folder / "data", folder / "run", **sections)


# Functions for the ranks: `started` pickles them by name.
def rank_core_and_pid(config: Config) -> Turn:  # noqa: ARG001
    return lambda: (os.environ["RANK"], sorted(os.sched_getaffinity(0)), os.getpid())


def fail(config: Config) -> Turn:  # noqa: ARG001
    raise ValueError("no such layer\nand more lines")


def test_cases_of_three_lengths(tmp_path: Path) -> None:
    names = [case.name for case in cases(tiny(tmp_path), Settings(batch=4))]
    assert names == [
        *("alone {8}", "alone {4}", "alone {6}"),
        *("sequential {8, 4}", "groups {8, 4}, 2 ranks"),
        *("sequential {8, 6, 4}", "groups {8, 6, 4}, 2 ranks", "groups {8, 6, 4}, 3 ranks"),
        *("no groups {8, 6, 4}, 2 ranks", "no groups {8, 6, 4}, 2 ranks, 8 last"),
        *("no groups {8, 6, 4}, 3 ranks", "no groups {8, 6, 4}, 3 ranks, 8 last"),
    ]
    more = cases(tiny(tmp_path), Settings(batch=4, lengths=(8, 4, 6, 7)))
    assert [case.name for case in more if case.kind == "sequential"][-1] == "sequential {8, 7, 6, 4}"
    assert all((case.config.train.batch, case.config.train.accumulate) == (4, 1) for case in more)


def test_a_grid_is_a_case_with_all_points_and_one_with_sampled_points(tmp_path: Path) -> None:
    grid = {"points": ["8", "8@0.5", "4", "4@0.5"], "drop_blocks": [1]}
    config = tiny(tmp_path, model=grid, train={"draw": "sampled"})
    found = {case.name: case for case in cases(config, Settings(batch=4))}
    assert list(found)[:2] == ["alone {8}", "alone {4}"]
    assert list(found)[-2:] == ["all {8, 8@0.5, 4, 4@0.5}", "sampled {8, 8@0.5, 4, 4@0.5}"]
    draws = {name: case.config.train.draw for name, case in found.items()}
    assert draws == {name: "sampled" if name.startswith("sampled") else "all" for name in found}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["turns=3"], r"bench_train: unknown key turns; the keys are .*rounds"),
        (["rounds=0"], "bench_train: rounds: .*greater than or equal to 1, got '0'"),
        (["lengths=[8,8]"], "bench_train: lengths: expected different lengths"),
        (["lengths=[9]"], "length 9 with 8-pixel patches needs 72 pixels"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_train(tiny(tmp_path), words)


def row(kind: str, points: list[str], ranks: int, macs: int, predicted_s: float | None = 1.0) -> Row:
    return Row(f"{kind} {','.join(points)} {ranks}", kind, points, ranks, "", macs, 2, 10, predicted_s)


def test_the_macs_of_a_step_leave_out_backward_passes_of_frozen_blocks(tmp_path: Path) -> None:
    config, frozen = tiny(tmp_path), tiny(tmp_path, train={"freeze": 1, "init": "weights.pt"})
    whole, part = (tool._row(tool.Case("alone", each, 1), None).macs for each in (config, frozen))
    forward = sum(point_macs(config.model).values()) * config.train.batch
    assert whole == pytest.approx(3 * forward)
    assert forward < part < whole


def turn(*seconds: float, silent_s: float = 1.0) -> list[StepTime]:
    """One round: the times of a step by rank."""
    return [StepTime(each, silent_s, 0.25, 100) for each in seconds]


def test_figures_that_follow_from_the_times() -> None:
    rows = [
        row("alone", ["14"], 1, 100),
        row("alone", ["7"], 1, 25),
        row("sequential", ["14", "7"], 1, 125),
        row("groups", ["14", "7"], 2, 125, predicted_s=4.0),
        row(PEER, ["14"], 1, 100, predicted_s=None),
    ]
    turns = {
        rows[0].name: [turn(2.0), turn(4.0), turn(2.0)],
        rows[1].name: [turn(1.0)] * 3,
        rows[2].name: [turn(3.0), turn(5.0), turn(2.0)],
        rows[4].name: [turn(4.0), turn(8.0), turn(4.0)],
    }
    timed = with_times(rows, turns, 75.0)
    alone, _, sequential, groups, peer = timed
    assert alone.step_s == 2.0
    assert alone.peak_fraction == pytest.approx(100 / 2.0 / 75)
    assert sequential.times_alone == 1.25  # the median of 1.5, 1.25 and 1 within their rounds
    assert sequential.flops_bound == 1.25
    assert sequential.times_bound == 1.0
    assert sequential.prediction_error == pytest.approx(1 / 3 - 1)
    assert groups.step_s is groups.times_alone is groups.prediction_error is None
    assert (peer.times_alone, peer.prediction_error) == (2.0, None)

    one, two = by_lengths(timed)
    assert (one.sequential_s, one.grouped_s, one.separate_s) == (2.0, 2.0, 2.0)
    assert (two.sequential_s, two.grouped_s, two.grouped_is_predicted) == (3.0, 4.0, True)
    assert (two.separate_s, two.separate_parameters, two.separate_peak_bytes) == (3.0, 20, 200)

    turns[groups.name] = [turn(4.0, 3.0, silent_s=2.0)] * 3
    timed = with_times(rows, turns, 75.0)
    groups = timed[3]
    assert groups.step_s == 4.0  # of the slowest rank
    assert groups.communication == 0.5
    assert groups.waited_s == 0.25
    assert groups.peak_fraction == pytest.approx(125 / 4.0 / (2 * 75))
    assert by_lengths(timed)[1].grouped_is_predicted is False


@pytest.mark.usefixtures("rank_server")
def test_ranks_keep_their_cores_and_a_killed_rank_is_an_error(tmp_path: Path) -> None:
    with started(2, rank_core_and_pid, tiny(tmp_path)) as processes:
        processes.ready()
        results = processes.turn()
        assert processes.turn() == results
        (first, cores, _), (second, others, pid) = results
        assert (first, second) == ("0", "1")
        assert len(cores) == len(others) == 1
        assert (cores != others) == (slots("cpu") > 1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RunError, match="its process has died"):
            processes.turn()


@pytest.mark.usefixtures("rank_server")
def test_the_cause_of_a_failed_rank_is_in_the_error(tmp_path: Path) -> None:
    with started(1, fail, tiny(tmp_path)) as processes, pytest.raises(RunError, match="^no such layer$"):
        processes.ready()


def run_tool(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, tool.__file__, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_tool_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny(tmp_path, model={"points": ["8", "4"]})))
    done = run_tool(path, "rounds=2", "batch=1", f"dir={tmp_path / 'out'}", "--json", "run.seed=2")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((tmp_path / "out" / "train.json").read_text())
    assert json.loads(done.stdout) == result
    assert result["config"]["run"]["seed"] == 2
    rows = {row.name: row for row in (Row(**row) for row in result["rows"])}
    for found in rows.values():
        missing = found.name in result["left_out"]  # transformers may not be installed
        assert (found.step_s is not None) == (found.ranks <= result["ranks"] and not missing)
        if found.step_s is not None and found.rounds_s is not None and found.clips_per_s is not None:
            assert len(found.rounds_s) == 2
            assert min(found.rounds_s) <= found.step_s <= max(found.rounds_s)
            assert found.clips_per_s * found.step_s == pytest.approx(1)
            assert found.kind == PEER or found.prediction_error is not None
    macs = point_macs(tiny(tmp_path).model)
    assert rows["sequential {8, 4}"].flops_bound == pytest.approx((macs["8"] + macs["4"]) / macs["8"], rel=1e-3)
    assert "groups {8, 4}, 2 ranks" in rows
    assert "1 clip" in result["left_out"]["no groups {8, 4}, 2 ranks"]
    assert [len(each["points"]) for each in result["lengths"]] == [1, 2]
    assert result["lengths"][1]["parameters"] < 0.6 * result["lengths"][1]["separate_parameters"]
    print_bench_train(result)
    output = capsys.readouterr().out
    assert "left out: no groups {8, 4}, 2 ranks" in output


def test_wrong_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("model: {size: 32, points: [2]}\n")
    for words, message in (
        (["none.yaml", "rounds=1"], "none.yaml: no such config"),
        (["config.yaml", "rounds=none", "train.batch=2"], "error: bench_train: rounds"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench_train.py", str(tmp_path / words[0]), *words[1:]])
        with pytest.raises(SystemExit) as error:
            tool.main()
        assert error.value.code == 2
        assert message in capsys.readouterr().err
