"""The numbers of an evaluation depend on the videos and the model alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import small_runs as runs
from processes import finished, torchrun
from video_files import numbered, write_list, write_video
from videoadapt.commands.speed_table import print_speed
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, dump_config
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.index.manifest import index, load_or_index
from videoadapt.errors import UserError
from videoadapt.evaluation.compare import compare
from videoadapt.evaluation.evaluate import _say_replaced, evaluate
from videoadapt.evaluation.speed import STAGES
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.routing.router import Routed, Router
from videoadapt.routing.scores import VIDEOS_PER_SHARD
from videoadapt.training.state import State

BROKEN = "broken.mp4"
POINTS = 3
BEST, P_BEST = ([f"{name}_{number}" for number in range(1, 6)] for name in ("best", "p"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated set with 70 validation videos, one of them broken: three shards of scores."""
    folder = runs.make_data(tmp_path_factory.mktemp("evaluate") / "data")
    made = (folder / "val.csv").read_text().splitlines()
    for number in range(69):
        path, label = made[number % len(made)].split()
        link = folder / f"val{number}.mp4"
        link.symlink_to(folder / path)
        made.append(f"{link.name} {label}")
    (folder / BROKEN).write_bytes(b"no video")
    (folder / "val.csv").write_text("\n".join([*made[12:40], f"{BROKEN} 3", *made[40:]]) + "\n")
    return folder


def untrained(data: Path, run: Path, **sections: dict) -> Config:
    """A config whose run has a model with its initial weights."""
    config = runs.config(data, run, data={"holdout": 0.0}, label={"source": "train"}, **sections)
    state = State.start(config, load_or_index(config))
    train_checkpoints(run).save(0, *state.saved())
    return config


def command(config: Config, *overrides: str) -> list[str]:
    """The words of `videoadapt evaluate`."""
    path = config.run.dir / "own.yaml"
    path.write_text(dump_config(config))
    return ["evaluate", str(path), *overrides, "--json"]


def logits(config: Config) -> np.ndarray:
    shards = sorted(config.run.dir.glob("scores/evaluate-*/part-*.npz"))
    return np.concatenate([np.load(shard)["logits"] for shard in shards])


def table(config: Config, name: str) -> pd.DataFrame:
    return pd.read_parquet(config.run.dir / "evaluate" / f"{name}.parquet")


def timeless(summary: dict) -> dict:
    """A summary without times, memory and machine, which differ from run to run."""
    without = {"seconds", "stages", "peak_memory_bytes", "machine"}
    kept = {key: value for key, value in summary.items() if key not in without}
    policies = {name: row | {"clips_per_s": None} for name, row in kept["policies"].items()}
    return kept | {"policies": policies}


VIEWS = {"temporal_views": 2, "spatial_crops": 3, "speed_clips": 0}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict]:
    config = untrained(data, tmp_path_factory.mktemp("alone"), evaluate=VIEWS)
    return config, evaluate(config).to_json()


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, ["evaluate.batch=64", "data.workers=1"]),  # a batch is larger than what a rank has left of a shard
        (1, ["evaluate.batch=5", "data.workers=2"]),  # a batch ends inside a video's views
    ],
)
def test_ranks_batches_and_workers_change_no_number(
    data: Path, tmp_path: Path, alone: tuple[Config, dict], ranks: int, settings: list[str]
) -> None:
    config = untrained(data, tmp_path, evaluate=VIEWS)
    words = command(config, *settings)
    done = runs.command(*words) if ranks == 1 else finished(torchrun(ranks, "-m", "videoadapt", *words))
    assert done.returncode == 0, done.stderr
    expected, summary = alone
    np.testing.assert_allclose(logits(config), logits(expected), atol=1e-5)
    ours, theirs = table(config, "videos"), table(expected, "videos")
    pd.testing.assert_frame_equal(ours.drop(columns=P_BEST), theirs.drop(columns=P_BEST))
    np.testing.assert_allclose(ours[P_BEST], theirs[P_BEST], atol=1e-5)
    assert timeless(json.loads(done.stdout)) == timeless(summary)  # printed once, by the first rank


def test_every_listed_video_counts_and_both_accuracies_are_reported(alone: tuple[Config, dict]) -> None:
    config, summary = alone
    assert (summary["listed"], summary["scored"], len(summary["failed"])) == (70, 69, 1)
    assert (summary["temporal_views"], summary["spatial_crops"]) == (2, 3)
    videos = table(config, "videos").set_index(["policy", "video"])
    for name, row in summary["policies"].items():
        right = videos.loc[name, "right"]
        assert not right[BROKEN]
        assert row["top1"] == row["top1_failed_wrong"] == pytest.approx(right.mean())
        assert row["top1_readable"] == pytest.approx(right.drop(BROKEN).mean())


def test_other_views_of_the_evaluation_before_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    now: Any = SimpleNamespace(policies={}, temporal_views=10, spatial_crops=3)
    _say_replaced({"policies": {}, "temporal_views": 10, "spatial_crops": 3}, now)
    assert not capsys.readouterr().err
    _say_replaced({"policies": {}, "temporal_views": 1, "spatial_crops": 3}, now)
    assert "other views (evaluate.temporal_views=1)" in capsys.readouterr().err


def test_a_video_is_the_mean_of_its_views(alone: tuple[Config, dict]) -> None:
    config, _ = alone
    views = table(config, "views")
    assert len(views) == 69 * 2 * 3 * POINTS
    point = views[views["point"] == "6"]
    mean = point.groupby("video")["p_true"].mean()
    videos = table(config, "videos")
    here = videos[(videos["policy"] == "fixed:6") & ~videos["failed"]]
    truths = {
        row["video"]: row[p]
        for _, row in here.iterrows()
        for best, p in zip(BEST, P_BEST, strict=True)
        if row[best] == row["truth"]
    }
    assert len(truths) > 5  # noqa: PLR2004
    np.testing.assert_allclose(list(truths.values()), mean[list(truths)], atol=1e-9)


def test_logits_of_all_views_can_be_averaged(alone: tuple[Config, dict], tmp_path: Path) -> None:
    """TimeSformer's public code adds the logits of all views of a video."""
    config = of_run(alone[0], tmp_path / "run", average="logits")
    sums: dict[int, np.ndarray] = {}
    for shard in sorted((tmp_path / "run").glob("scores/evaluate-*/part-*.npz")):
        with np.load(shard) as stored:
            arrays = dict(stored)
        # The views of an untrained model hardly differ.
        arrays["logits"] = np.random.default_rng(0).normal(0, 3, arrays["logits"].shape).astype(np.float32)
        np.savez(shard.open("wb"), **arrays)
        for row, views in zip(arrays["rows"].tolist(), arrays["logits"], strict=True):  # (crops, points, classes)
            sums[row] = sums.get(row, 0) + views[:, 0].astype(np.float64).sum(0)
    found = evaluate(config).to_json()  # reads no video, since all logits are stored
    assert (found["views"], alone[1]["views"]) == ("2 clips x 3 crops, logits averaged", "2 clips x 3 crops")
    manifest = load_or_index(config)
    names, classes = manifest["video"], np.array(manifest.classes)
    videos = table(config, "videos")
    videos = videos[videos["policy"] == "fixed:8"].set_index("video")
    for row, total in sums.items():
        expected = np.exp(total / 6) / np.exp(total / 6).sum()  # 2 clips x 3 crops
        assert videos.loc[names[row], BEST].tolist() == classes[np.argsort(-total)[:5]].tolist()
        np.testing.assert_allclose(videos.loc[names[row], P_BEST].tolist(), np.sort(expected)[::-1][:5], atol=1e-9)
    assert len(sums) == 69  # noqa: PLR2004


def test_the_class_table_follows_from_the_videos(alone: tuple[Config, dict]) -> None:
    config, summary = alone
    classes = pd.read_csv(config.run.dir / "evaluate" / "classes.csv")
    for name, row in summary["policies"].items():
        here = classes[classes["policy"] == name]
        assert here["videos"].sum() == 70
        assert here["top1"].mean() == pytest.approx(row["mean_class"])
        assert here["top1"].is_monotonic_increasing
        assert ((here["top1_low"] <= here["top1"] + 1e-9) & (here["top1"] <= here["top1_high"] + 1e-9)).all()


def test_every_table_has_the_names_of_classes(alone: tuple[Config, dict]) -> None:
    config, _ = alone
    folder, manifest = config.run.dir / "evaluate", load_or_index(alone[0])
    truth = dict(zip(manifest["video"], np.array(manifest.classes)[manifest["label"]], strict=True))
    for name in ("views", "clips", "videos"):
        found = table(config, name)
        assert (found["truth"] == found["video"].map(truth)).all()
    videos, confusion = table(config, "videos"), pd.read_csv(folder / "confusion.csv")
    read = videos[(videos["policy"] == "fixed:8") & ~videos["failed"]]
    shown = confusion[confusion["policy"] == "fixed:8"].set_index(["truth", "prediction"])
    assert shown["videos"].to_dict() == read.groupby(["truth", "prediction"]).size().to_dict()
    assert shown["fraction"].groupby("truth").sum().to_numpy() == pytest.approx(1)
    with np.load(folder / "logits.npz") as stored:
        assert stored["logits"].shape == (69 * 2 * 3, POINTS, 12) == (len(stored["video"]), POINTS, 12)
        assert np.array_equal(stored["logits"], logits(config).reshape(-1, POINTS, 12))
        assert stored["points"].tolist() == ["8", "6", "4"] and stored["classes"].tolist() == list(manifest.classes)
        assert [truth[video] for video in stored["video"]] == stored["truth"].tolist()
        assert stored["crop"].tolist() == [0, 1, 2] * 138 and stored["clip"][:6].tolist() == [0, 0, 0, 1, 1, 1]
        assert Path(str(stored["path"][0])).name == stored["video"][0]


def of_run(config: Config, run: Path, **evaluate_keys: object) -> Config:
    """The config of a copy of an evaluated run, with other keys in `evaluate`."""
    shutil.copytree(config.run.dir, run)
    changed = {"run": {"dir": run}, "evaluate": evaluate_keys}
    return config.model_copy(update={s: getattr(config, s).model_copy(update=keys) for s, keys in changed.items()})


def test_nan_logits_are_no_answer_and_a_cascade_goes_on(alone: tuple[Config, dict], tmp_path: Path) -> None:
    """Finite weights can overflow in bf16. `argmax` of NaN is 0, a class like any other."""
    config = of_run(alone[0], tmp_path / "run", cascade=("6,8:0",))
    shards = sorted((tmp_path / "run").glob("scores/evaluate-*/part-*.npz"))
    with np.load(shards[0]) as stored:
        arrays = dict(stored)
    arrays["logits"][:, :, 1] = np.nan  # point 6
    np.savez(shards[0].open("wb"), **arrays)
    nan_videos = len(set(arrays["rows"].tolist()))
    policies = evaluate(config).to_json()["policies"]
    assert {name: row["nan_videos"] for name, row in policies.items()} == {
        "fixed:8": 0, "fixed:6": nan_videos, "fixed:4": 0, "cascade:6,8:0": 0, "oracle": 0}  # fmt: skip
    videos = table(config, "videos").set_index(["policy", "video"])
    names = load_or_index(config)["video"][np.unique(arrays["rows"])]
    missing = videos.loc[[("fixed:6", name) for name in names]]
    assert missing["prediction"].isna().all() and not missing["right"].any() and not missing["failed"].any()
    clips = table(config, "clips").set_index(["policy", "video"])
    assert set(clips.loc[[("cascade:6,8:0", name) for name in names], "point"]) == {"8"}
    assert "NaN" not in (tmp_path / "run" / "evaluate" / "evaluate.json").read_text()


def test_the_speed_is_measured_in_bounded_time_and_once(
    alone: tuple[Config, dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = of_run(alone[0], tmp_path / "run", speed_clips=4, speed_repeats=2)
    first = evaluate(config).to_json()
    assert (first["speed"]["clips"], first["speed"]["rounds"]) == (4, 2)
    assert all(row["clips_per_s"] > 0 for row in first["policies"].values())
    for row in first["speed"]["policies"].values():
        assert row["stages_s"].keys() == row["stages_cpu_s"].keys() == set(STAGES)
        for stage in ("decode", "preprocess", "route", "model"):
            assert row["stages_cpu_s"][stage] > 0, stage
        model_s = 1 / row["clips_per_s"]
        assert 0 < row["stages_s"]["model"] < 3 * model_s and row["stages_s"]["decode"] > 0
        low, high = row["routed_efficiency"][1:]
        assert low <= row["routed_efficiency"][0] <= high
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["end_to_end_clips_per_s"] > 0
    again = evaluate(config).to_json()
    assert again["speed"] == first["speed"]
    assert "speed: kept from" in capsys.readouterr().err

    def evaluated(**keys: object) -> dict:
        changed = config.evaluate.model_copy(update=keys)
        return evaluate(config.model_copy(update={"evaluate": changed})).to_json()

    assert evaluated(batch=3)["speed"]["measured"]["batch"] == 3  # noqa: PLR2004 - another batch, measured again
    single = evaluated(speed_clips=1)["speed"]  # one video: no speed from files, whose clock begins with the first
    assert single["clips"] == 2 and single["policies"]["oracle"]["end_to_end_clips_per_s"] is None  # noqa: PLR2004
    none = evaluated(speed_seconds=1e-6)  # not even one clip
    assert (none["speed"]["clips_per_s"], none["policies"]["fixed:8"]["clips_per_s"]) == ({}, None)
    print_speed(none["speed"])
    assert "clips/s: not measured; evaluate.speed_seconds=1e-06 allows no more: one clip" in capsys.readouterr().err
    assert evaluated(speed_seconds=0)["speed"] is None


def test_too_little_time_for_all_clips_measures_fewer(
    alone: tuple[Config, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that counts passes: each takes a second per clip and point."""
    now, run = [0.0], Router.run

    def counted(router: Router, items: Sequence[ClipViews]) -> Routed:
        now[0] += sum(len(item.views) for item in items)
        return run(router, items)

    monkeypatch.setattr(Router, "run", counted)
    monkeypatch.setattr("videoadapt.evaluation.speed_passes.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("videoadapt.evaluation.speed.end_to_end", lambda *_, **_settings: [[2.0], [2.0], [2.0], [4.0]])
    config = of_run(alone[0], tmp_path / "run", speed_clips=64, speed_seconds=50)
    speed = evaluate(config).to_json()["speed"]
    # One video, of two clips, takes 12 s at each point twice, and 8 s in a round of 4 policies. A round may take a
    # quarter of the other 38 s. Two rounds end in the 21 s that are theirs, and the first one warms up. Then the clips
    # run one by one.
    assert (speed["clips"], speed["clips_wanted"], speed["rounds"], speed["seconds"]) == (2, 64, 1, 36)
    assert speed["clips_per_s"] == dict.fromkeys(["fixed:8", "fixed:6", "fixed:4", "oracle"], 1)
    for name, row in speed["policies"].items():
        assert row["speedup"] == [1, 1, 1] and row["routed_efficiency"] == [1 / row["macs_ratio"]] * 3
        assert row["end_to_end_efficiency"][0] == pytest.approx((1 + (name == "oracle")) / row["macs_ratio"])
        assert (row["p50_ms"], row["p95_ms"]) == (1000, 1000)
    macs = point_macs(config.model)
    assert speed["policies"]["fixed:4"]["macs_ratio"] == pytest.approx(macs["8"] / macs["4"])


def test_only_videos_that_could_not_be_read_are_tried_again(numbered_videos: Path, tmp_path: Path) -> None:
    data = numbered_videos
    config = untrained(data, tmp_path / "run", evaluate={"speed_clips": 0})
    away, back = data / "away", data / "v35.mp4"
    back.rename(away)
    cause = "not found; it was moved or deleted after it was indexed; run `videoadapt index`"
    assert evaluate(config).to_json()["failed"] == [{"path": str(back), "cause": cause}]
    shards = sorted(config.run.dir.glob("scores/evaluate-*/part-*.npz"))
    assert len(shards) == 2 and VIDEOS_PER_SHARD == 32  # noqa: PLR2004
    before = [shard.stat().st_mtime_ns for shard in shards]
    away.rename(back)
    again = evaluate(config).to_json()
    assert (again["failed"], again["scored"]) == ([], 40)
    after = [shard.stat().st_mtime_ns for shard in shards]
    assert after[0] == before[0] and after[1] != before[1]
    fresh = untrained(data, tmp_path / "fresh", evaluate={"speed_clips": 0})
    assert timeless(evaluate(fresh).to_json()) == timeless(again)
    np.testing.assert_allclose(logits(config), logits(fresh), atol=1e-5)


@pytest.fixture
def numbered_videos(tmp_path: Path) -> Path:
    """Forty validation videos in a folder that the test may change."""
    data = tmp_path / "data"
    rows = [(str(write_video(data / f"v{i}.mp4", numbered(8, 64, 96, start=8 * i)).name), i % 3) for i in range(40)]
    write_list(data / "train.csv", rows[:10])
    write_list(data / "val.csv", rows)
    (data / "classes.txt").write_text("".join(f"c{i}\n" for i in range(12)))
    return data


def test_other_files_under_the_same_names_are_scored_again(numbered_videos: Path, tmp_path: Path) -> None:
    """Resized copies, for example: the population is the same, the pixels are not."""
    config = untrained(numbered_videos, tmp_path / "run", evaluate={"speed_clips": 0})
    first, before = evaluate(config).to_json(), logits(config)
    for i in range(39):
        (numbered_videos / f"v{i}.mp4").write_bytes((numbered_videos / f"v{i + 1}.mp4").read_bytes())
    index(config)
    second = evaluate(config).to_json()
    assert first["manifest"] == second["manifest"]
    assert first["files"] != second["files"]
    newest = max(config.run.dir.glob("scores/evaluate-*"), key=lambda folder: folder.stat().st_mtime_ns)
    after = np.concatenate([np.load(shard)["logits"] for shard in sorted(newest.glob("part-*.npz"))])
    np.testing.assert_allclose(after[:39], before[1:], atol=1e-5)
    assert np.abs(after[:39] - before[:39]).max() > 1e-4


def test_damage_that_verification_finds_is_not_hidden_by_earlier_scores(tmp_path: Path) -> None:
    data = tmp_path / "data"
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), np.uint8)
    path = write_video(data / "v0.mp4", noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(600) + whole[len(whole) // 2 + 600 :])
    write_list(data / "val.csv", [("v0.mp4", 0), (write_video(data / "v1.mp4", noise[:30]).name, 1)])
    write_list(data / "train.csv", [("v1.mp4", 1)])
    (data / "classes.txt").write_text("".join(f"c{i}\n" for i in range(12)))
    quick = untrained(data, tmp_path / "run", evaluate={"speed_clips": 0, "temporal_views": 8})
    evaluate(quick)
    full = quick.model_copy(update={"index": quick.index.model_copy(update={"verify": "full"})})
    found = evaluate(full).to_json()
    assert [failure["path"] for failure in found["failed"]] == [str(path)]
    assert "damaged" in found["failed"][0]["cause"]


def test_an_incomplete_shard_is_scored_again(
    numbered_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = untrained(numbered_videos, tmp_path / "run", evaluate={"speed_clips": 0})
    whole, before = evaluate(config).to_json(), logits(config)
    shard = sorted(config.run.dir.glob("scores/evaluate-*/part-*.npz"))[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    assert timeless(evaluate(config).to_json()) == timeless(whole)
    assert "incomplete" in capsys.readouterr().err
    assert np.array_equal(logits(config), before)


def test_a_summary_never_stands_beside_tables_of_another_evaluation(
    numbered_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = untrained(numbered_videos, tmp_path / "run", evaluate={"speed_clips": 0})
    evaluate(config)

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("videoadapt.evaluation.result_tables.write_csv", full_disk)
    with pytest.raises(OSError, match="No space"):
        evaluate(config)
    with pytest.raises(UserError, match="run `videoadapt evaluate` first"):
        compare(str(config.run.dir), str(config.run.dir))


def memory_mib(process: int) -> float:
    """Memory of a process and its workers, without the files that they map.

    USS and PSS would jump once: when a worker first writes into pages that it shares with its parent since the fork.
    """
    workers = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    rows = [row for pid in (process, *workers) for row in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(row.split()[1]) for row in rows if row.startswith(("RssAnon:", "RssShmem:"))) / 1024


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc of Linux")
def test_2000_videos_with_flat_memory_and_killed_at_a_random_moment(tmp_path: Path) -> None:
    data, count = tmp_path / "data", 2_000
    sources = [write_video(data / f"source{i}.mp4", numbered(6, 32, 48, start=6 * i)) for i in range(20)]
    for number in range(count):
        os.link(sources[number % 20], data / f"v{number}.mp4")
    write_list(data / "val.csv", [(f"v{i}.mp4", i % 12) for i in range(count)])
    write_list(data / "train.csv", [(f"source{i}.mp4", i % 12) for i in range(20)])
    (data / "classes.txt").write_text("".join(f"c{i}\n" for i in range(12)))
    model = {"width": 16, "depth": 1, "patch": 8, "size": 32, "num_frames": 2, "points": ["4", "2"]}
    config = untrained(data, tmp_path / "run", model=model, evaluate={"speed_clips": 0, "batch": 64})

    process = subprocess.Popen(
        [sys.executable, "-m", "videoadapt", *command(config, "data.workers=2")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    shards = config.run.dir / "scores"
    used: dict[int, float] = {}
    stop_at = random.Random(time.time_ns()).randrange(1_200, 1_600)
    while (done := len(list(shards.glob("*/part-*.npz"))) * VIDEOS_PER_SHARD) < stop_at:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        if done:
            used[done] = memory_mib(process.pid)
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    early, late = (np.median([mib for done, mib in used.items() if low <= done < high]) for low, high in (
        (0, stop_at // 3), (2 * stop_at // 3, stop_at)))  # fmt: skip
    assert late < early + 15, f"memory grew from {early:.0f} to {late:.0f} MiB by {stop_at} videos: {used}"  # noqa: PLR2004

    kept = len(list(shards.glob("*/part-*.npz")))
    resumed = runs.command(*command(config, "data.workers=2"))
    assert f"{count}/{count} videos" in resumed.stderr
    for shard in sorted(shards.glob("*/part-*.npz"))[: kept // 2]:
        shard.unlink()  # half of what the killed process wrote, scored again by the resumed code
    whole = runs.command(*command(config, "data.workers=1", "evaluate.batch=50"))
    assert timeless(json.loads(resumed.stdout)) == timeless(json.loads(whole.stdout))
    assert json.loads(whole.stdout)["scored"] == count
