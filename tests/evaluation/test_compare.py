"""Two evaluated runs are compared pair by pair on the videos of both, with counts that can be checked by hand."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small_runs as runs
from videoadapt.commands.tables import print_compare
from videoadapt.errors import UserError
from videoadapt.evaluation.compare import compare
from videoadapt.evaluation.intervals import mcnemar

A_ONLY, B_ONLY, BOTH, NONE = 15, 5, 60, 20
TRUTH, OTHER = "juggling", "archery"


def evaluated(folder: Path, right: dict[str, bool | None], **summary: object) -> str:
    """The files of an evaluation. `right` says whether the policy `fixed:14` is right on a video; None: it failed."""
    rows = [
        ("fixed:14", video, TRUTH, None if ok is None else TRUTH if ok else OTHER, bool(ok), ok is None)
        for video, ok in right.items()
    ]
    table = pd.DataFrame(rows, columns=["policy", "video", "truth", "prediction", "right", "failed"])
    (folder / "evaluate").mkdir(parents=True)
    table.to_parquet(folder / "evaluate" / "videos.parquet")
    values = {"manifest": "abc", "files": "def", "failed_count_as": "wrong", "policies": {"fixed:14": {}}} | summary
    (folder / "evaluate" / "evaluate.json").write_text(json.dumps(values))
    return str(folder)


@pytest.fixture
def right() -> tuple[dict[str, bool | None], dict[str, bool | None]]:
    kinds = [(True, False)] * A_ONLY + [(False, True)] * B_ONLY + [(True, True)] * BOTH + [(False, False)] * NONE
    return {f"v{i}": a for i, (a, _) in enumerate(kinds)}, {f"v{i}": b for i, (_, b) in enumerate(kinds)}


def test_counts_difference_and_p_value(tmp_path: Path, right: tuple[dict, dict]) -> None:
    result = compare(evaluated(tmp_path / "a", right[0]), evaluated(tmp_path / "b", right[1], files="xyz"))
    assert (result["manifests"], result["files"]) == (["abc", "abc"], ["def", "xyz"])
    [row] = result["policies"]
    assert result["common"] == row["videos"] == 100
    assert row["right_in_one_only"] == [A_ONLY, B_ONLY]
    assert row["top1"] == pytest.approx([0.75, 0.65])
    difference, low, high = row["difference"]
    assert difference == pytest.approx(0.10)
    assert low < 0.10 < high
    assert row["p_value"] == pytest.approx(0.041389, abs=1e-6)  # R: binom.test(5, 20)$p.value


def test_a_config_stands_for_its_run(tmp_path: Path, right: tuple[dict, dict]) -> None:
    a, b = evaluated(tmp_path / "a" / "run", right[0]), evaluated(tmp_path / "b", right[1])
    config = tmp_path / "a" / "config.yaml"  # as `new` leaves it: a config, and its run folder below
    config.write_text(f"run:\n  dir: {a}\n")
    expected = compare(a, b)["policies"]
    for text in (tmp_path / "a", config):
        assert compare(str(text), b)["policies"] == expected
        assert compare(f"{text}:fixed:14", b)["policies"] == expected
    shutil.rmtree(Path(a) / "evaluate")
    with pytest.raises(UserError, match=r"a/run/evaluate/evaluate.json: .*run `videoadapt evaluate` first"):
        compare(str(tmp_path / "a"), b)


def test_other_views_are_named(tmp_path: Path, right: tuple[dict, dict], capsys: pytest.CaptureFixture[str]) -> None:
    text = "1 clip x 3 crops, from frame 0, crops rounded up, not antialiased, logits averaged"
    a, b = (
        evaluated(tmp_path / "a", right[0], views="1 clip x 3 crops"),
        evaluated(tmp_path / "b", right[0], views=text),
    )
    assert compare(a, b)["views"] == ["1 clip x 3 crops", text]
    print_compare(compare(a, b))
    assert f"THE VIEWS DIFFER: 1 clip x 3 crops in A, {text} in B" in " ".join(capsys.readouterr().err.split())
    print_compare(compare(a, evaluated(tmp_path / "c", right[0])))  # an older evaluation does not say
    assert "THE VIEWS DIFFER" not in capsys.readouterr().err


def test_a_run_against_itself_does_not_differ(tmp_path: Path, right: tuple[dict, dict]) -> None:
    folder = evaluated(tmp_path / "a", right[0])
    [row] = compare(folder, f"{folder}:fixed:14")["policies"]
    assert row["difference"][0] == 0
    assert row["p_value"] == 1
    assert row["right_in_one_only"] == [0, 0]


def test_the_order_of_videos_changes_nothing(tmp_path: Path, right: tuple[dict, dict]) -> None:
    items = list(right[1].items())
    random.Random(0).shuffle(items)
    shuffled = dict(items)
    assert list(shuffled) != list(right[1])
    folder = evaluated(tmp_path / "a", right[0])
    plain, mixed = (compare(folder, evaluated(tmp_path / n, r)) for n, r in (("b", right[1]), ("c", shuffled)))
    assert plain["policies"] == mixed["policies"]


def test_runs_on_other_videos_are_compared_on_those_that_both_list(tmp_path: Path, right: tuple[dict, dict]) -> None:
    fewer = {video: ok for video, ok in right[1].items() if video != "v0"}
    result = compare(evaluated(tmp_path / "a", right[0]), evaluated(tmp_path / "b", fewer, manifest="def"))
    assert (result["common"], result["listed"], result["manifests"]) == (99, [100, 99], ["abc", "def"])
    assert result["policies"][0]["right_in_one_only"] == [A_ONLY - 1, B_ONLY]


def test_failed_videos_count_as_in_the_runs(tmp_path: Path, right: tuple[dict, dict]) -> None:
    failed = right[0] | {"v0": None}
    b = evaluated(tmp_path / "b", right[1])
    [wrong] = compare(evaluated(tmp_path / "a", failed), b)["policies"]
    [without] = compare(evaluated(tmp_path / "c", failed, failed_count_as="exclude"), b)["policies"]
    assert (wrong["videos"], wrong["right_in_one_only"]) == (100, [A_ONLY - 1, B_ONLY])
    assert (without["videos"], without["right_in_one_only"]) == (99, [A_ONLY - 1, B_ONLY])


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, right: tuple[dict, dict]) -> None:
    a = evaluated(tmp_path / "a", right[0])
    with pytest.raises(UserError, match="run `videoadapt evaluate` first"):
        compare(a, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no video in common"):
        compare(a, evaluated(tmp_path / "b", {"other": True}))
    with pytest.raises(UserError, match="has no policy fixed:7; it has fixed:14"):
        compare(a, f"{a}:fixed:7")
    with pytest.raises(UserError, match="FOLDER:POLICY"):
        table = pd.read_parquet(Path(a) / "evaluate" / "videos.parquet")
        other = Path(evaluated(tmp_path / "c", right[0], policies={"fixed:10": {}, "oracle": {}}))
        pd.concat([table.assign(policy=p) for p in ("fixed:10", "oracle")]).to_parquet(
            other / "evaluate/videos.parquet"
        )
        compare(a, str(other))
    unread = dict.fromkeys(right[0])
    with pytest.raises(UserError, match="no video was read by both"):
        compare(a, evaluated(tmp_path / "e", unread, failed_count_as="exclude"))
    renamed = Path(evaluated(tmp_path / "d", right[0])) / "evaluate" / "videos.parquet"
    pd.read_parquet(renamed).assign(truth=OTHER).to_parquet(renamed)
    with pytest.raises(UserError, match="its class is juggling in one run and archery in the other"):
        compare(a, str(tmp_path / "d"))
    pd.read_parquet(renamed).assign(truth=1).to_parquet(renamed)  # as an older version wrote it
    with pytest.raises(UserError, match="with numbers of classes and not their names; run `evaluate` again"):
        compare(a, str(tmp_path / "d"))


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_twice_the_smaller_binomial_tail(a: int, b: int) -> None:
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail / 2 ** (a + b)), abs=1e-12)


def test_mcnemar_of_many_videos_takes_milliseconds() -> None:
    start = time.perf_counter()
    assert mcnemar(20_000, 19_000) == pytest.approx(4.216841447373e-07, rel=1e-9)  # by exact fractions
    assert mcnemar(0, 39_000) == 0.0
    assert time.perf_counter() - start < 0.5  # some milliseconds; exact fractions took 0.6 s


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_symmetric_and_falls_with_the_imbalance(a: int, b: int) -> None:
    assert mcnemar(a, b) == mcnemar(b, a)
    assert 0 < mcnemar(a, b) <= 1
    if a > b:
        assert mcnemar(a + 1, b) < mcnemar(a, b) or mcnemar(a, b) == 1


def test_mcnemar_keeps_its_level() -> None:
    """At most 5 % of pairs of equally good runs get a p-value below 0.05, and not far fewer."""
    chance = {a: math.comb(40, a) / 2**40 for a in range(41)}
    assert 0.02 < sum(p for a, p in chance.items() if mcnemar(a, 40 - a) < 0.05) <= 0.05


def test_the_verb_needs_no_config(tmp_path: Path, right: tuple[dict, dict]) -> None:
    a, b = evaluated(tmp_path / "a", right[0]), evaluated(tmp_path / "b", right[1])
    done = runs.command("evaluate", "--compare", a, b)
    assert done.returncode == 0, done.stderr
    assert "+10.0" in done.stdout
    assert "0.041" in done.stdout
    assert json.loads(runs.command("evaluate", "--compare", a, b, "--json").stdout)["common"] == 100
    assert "CONFIG" in runs.command("evaluate").stderr
