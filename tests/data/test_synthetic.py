"""The demo's data: files that are reproducible, and a class that no single frame shows."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest

from videoadapt.data.synthetic import (
    CLASSES,
    FRAMES,
    LEVELS,
    ORIENTATIONS,
    PAIRS,
    SIDE,
    draw_video,
    generate,
    plan_videos,
    write_video,
)
from videoadapt.data.video.readers import open_video

SIZES = {"train": 8, "val": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate(folder, SIZES, seed=5, workers=1)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.cache  # drawing takes most of the time of these tests
def video(seed: int, pair: tuple[int, int], level: int = 0) -> np.ndarray:
    return draw_video(np.random.default_rng(seed), LEVELS[level], pair)


# Content of a video


def test_classes_are_the_ordered_pairs_of_different_orientations() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == len(PAIRS) == 12
    assert all(a != b for a, b in PAIRS)
    assert {(b, a) for a, b in PAIRS} == set(PAIRS)


@pytest.mark.parametrize("level", range(len(LEVELS)))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_frame_shows_one_orientation_only(level: int, seed: int) -> None:
    """Each frame of a video of (a, b) equals the frame of (a, a) or of (b, b), which do not depend on the other."""
    for a, b in PAIRS:
        made, first, second = (video(seed, pair, level) for pair in ((a, b), (a, a), (b, b)))
        from_first = [np.array_equal(made[t], first[t]) for t in range(FRAMES)]
        from_second = [np.array_equal(made[t], second[t]) for t in range(FRAMES)]
        assert from_first == sorted(from_first, reverse=True)  # one change
        assert from_second == [not flag for flag in from_first]
        assert from_first[:2] == [True, True]
        assert from_second[-1]


def test_the_first_frame_depends_only_on_the_first_orientation_and_the_last_frame_on_the_second() -> None:
    for first in range(len(ORIENTATIONS)):
        starts = [video(3, pair)[0] for pair in PAIRS if pair[0] == first]
        ends = [video(3, pair)[-1] for pair in PAIRS if pair[1] == first]
        assert all(np.array_equal(frame, starts[0]) for frame in starts)
        assert all(np.array_equal(frame, ends[0]) for frame in ends)


def test_the_moment_of_the_change_varies_and_does_not_depend_on_the_class() -> None:
    moments = set()
    for seed in range(20):
        found = {
            sum(np.array_equal(f, g) for f, g in zip(video(seed, (a, b)), video(seed, (a, a)), strict=True))
            for a, b in [(0, 1), (2, 3), (3, 0)]
        }
        assert len(found) == 1
        moments |= found
    assert moments == set(range(2, FRAMES))


def test_stripes_have_the_named_orientation() -> None:
    """Compares mean squared differences of neighbours: small along the stripes, large across."""
    horizontal, vertical = video(1, (0, 0)).astype(float).mean(-1), video(1, (2, 2)).astype(float).mean(-1)
    along, down = (lambda x: np.square(np.diff(x, axis=2)).mean()), (lambda x: np.square(np.diff(x, axis=1)).mean())
    assert ORIENTATIONS[0] == "horizontal"
    assert ORIENTATIONS[2] == "vertical"
    assert down(horizontal) > along(horizontal)
    assert along(vertical) > down(vertical)


def test_levels_get_finer_and_fainter_and_their_fractions_add_up() -> None:
    assert sum(level.fraction for level in LEVELS) == pytest.approx(1)
    assert [level.contrast for level in LEVELS] == sorted((level.contrast for level in LEVELS), reverse=True)
    for easier, harder in zip(LEVELS, LEVELS[1:], strict=False):
        assert harder.periods[1] < easier.periods[0]
        assert harder.periods[0] > 2  # pixels: finer stripes could not be drawn


def test_frames_are_uint8_of_the_stated_size_and_depend_on_the_seed() -> None:
    made = video(0, (0, 1))
    assert made.shape == (FRAMES, SIDE, SIDE, 3)
    assert made.dtype == np.uint8
    assert np.array_equal(made, draw_video(np.random.default_rng(0), LEVELS[0], (0, 1)))  # not cached
    assert not np.array_equal(made, video(1, (0, 1)))


# The plan


@pytest.mark.parametrize("count", [1, 7, 12, 48, 100, 601])
def test_classes_and_levels_have_fixed_fractions(count: int) -> None:
    plan = plan_videos("train", count, seed=0)
    classes = np.bincount(plan["label"], minlength=len(PAIRS))
    assert classes.max() - classes.min() <= 1
    for level in LEVELS:
        assert abs((plan["level"] == level.name).sum() - level.fraction * count) <= 1
    assert plan["path"].is_unique
    assert plan["seed"].is_unique


def test_the_class_is_independent_of_order_and_level() -> None:
    plan = plan_videos("train", 4800, seed=0)
    table = pd.crosstab(plan["label"], plan["level"], normalize="index")
    for level in LEVELS:
        assert table[level.name].to_numpy() == pytest.approx(level.fraction, abs=0.08)
    halves = [np.bincount(part, minlength=12) for part in np.split(plan["label"].to_numpy(), 2)]
    assert abs(halves[0] - halves[1]).max() < 100  # of 400


def test_splits_and_seeds_have_different_videos() -> None:
    plans = [plan_videos(split, 200, seed) for split in ("train", "val") for seed in (0, 1)]
    seeds = [seed for plan in plans for seed in plan["seed"]]
    assert len(set(seeds)) == len(seeds)
    assert plan_videos("train", 200, 0).equals(plans[0])


# The files


def test_the_lists_have_every_video_with_its_class_and_level(data: Path) -> None:
    assert (data / "classes.txt").read_text().splitlines() == list(CLASSES)
    levels = pd.read_csv(data / "levels.csv")
    for split, count in SIZES.items():
        listed = [line.split() for line in (data / f"{split}.csv").read_text().splitlines()]
        assert len(listed) == count
        assert {path for path, _ in listed} == {f"{split}/{path.name}" for path in (data / split).iterdir()}
        assert [int(label) for _, label in listed] == plan_videos(split, count, 5)["label"].tolist()
    assert len(levels) == sum(SIZES.values())
    assert set(levels["level"]) <= {level.name for level in LEVELS}


def test_files_are_h264_with_exactly_the_stated_frames(data: Path) -> None:
    for path in data.rglob("*.mp4"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert (stream.width, stream.height) == (SIDE, SIDE)
            assert sum(1 for _ in container.decode(video=0)) == FRAMES


@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_readers_return_the_frames_that_were_drawn(data: Path, reader: Any) -> None:
    plan = plan_videos("train", SIZES["train"], 5)
    levels = {level.name: level for level in LEVELS}
    for row in plan.itertuples():
        drawn = draw_video(np.random.default_rng(int(row.seed)), levels[row.level], PAIRS[row.label])
        opened = open_video(data / row.path, reader=reader)
        assert opened.num_frames == FRAMES
        read = opened.frames(np.arange(FRAMES))
        assert read.shape == drawn.shape
        grey = [frames.astype(float).mean(-1) for frames in (read, drawn)]
        assert abs(grey[0] - grey[1]).mean() < 4  # of 255: compression and subsampled colours


def test_files_do_not_depend_on_the_number_of_processes(data: Path, tmp_path: Path) -> None:
    generate(tmp_path, SIZES, seed=5, workers=2)
    assert contents(tmp_path) == contents(data)


def test_another_seed_makes_other_files(data: Path, tmp_path: Path) -> None:
    generate(tmp_path, {"val": 4}, seed=6, workers=1)
    for path in (tmp_path / "val").iterdir():
        assert path.read_bytes() != (data / "val" / path.name).read_bytes()


def test_existing_files_are_kept_and_missing_files_are_made_again(data: Path) -> None:
    before = contents(data)
    lost, empty = data / "train" / "00003.mp4", data / "val" / "00000.mp4"
    lost.unlink()
    empty.write_bytes(b"")  # as after a power failure
    kept = {path: path.stat().st_mtime_ns for path in data.rglob("*.mp4") if path != empty}
    generate(data, SIZES, seed=5, workers=1)
    assert contents(data) == before
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items())


def test_an_interrupted_call_leaves_no_file(tmp_path: Path) -> None:
    frames = video(0, (0, 1)).astype(object)  # a dtype that cannot be encoded
    with pytest.raises(Exception):  # noqa: B017 - PyAV decides on the type
        write_video(tmp_path / "a.mp4", frames, qp=6)
    assert os.listdir(tmp_path) == []
