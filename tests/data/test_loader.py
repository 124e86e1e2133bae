"""Batches and views do not depend on the number of workers or the first step; failures are counted, not replaced."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from processes import finished
from rank_jobs import as_step
from video_files import numbered, numbers_of, write_list, write_video
from videoadapt.config.load import Config, dump_config, make_config
from videoadapt.data.clips import datasets, workers
from videoadapt.data.clips.augment import augment
from videoadapt.data.clips.datasets import Clip, EvalVideos, Failure, TrainClips, VideoViews
from videoadapt.data.clips.loader import Batch, epoch_rows, steps_ahead, steps_per_epoch, stream, train_batches
from videoadapt.data.index.manifest import Manifest, index
from videoadapt.data.video.readers import open_video
from videoadapt.errors import RunError, UserError

COUNT = 13
SIZE = 32


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen train videos of 20 to 32 frames (the numbers of video i start at 32 i), and a list of them."""
    folder = tmp_path_factory.mktemp("loader")
    for i in range(COUNT):
        write_video(folder / f"v{i}.mp4", numbered(20 + i, SIZE, 2 * SIZE, start=32 * i))
    write_list(folder / "train.txt", [(f"v{i}.mp4", i % 3) for i in range(COUNT)])
    return folder


def config_of(folder: Path, folder_of_run: Path, **sections: dict[str, Any]) -> Config:
    defaults: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder_of_run)},
        "data": {"train": {"annotations": str(folder / "train.txt")}, "workers": 0, "flip": 0.0},
        "model": {"size": SIZE, "points": [2], "num_classes": 3, "num_frames": 4, "stride_frames": 3, "fps": None},
        "train": {"batch": 4, "accumulate": 2},
        "assign": {"frames": 2, "size": 16},
        "evaluate": {},
    }
    return make_config({name: values | sections.get(name, {}) for name, values in defaults.items()})


@pytest.fixture(scope="session")
def config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Shared by all tests that do not write to the run folder or change the videos."""
    return config_of(folder, tmp_path_factory.mktemp("loader_run"))


@pytest.fixture(scope="session")
def manifest(config: Config) -> Manifest:
    return index(config)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> tuple[Path, Config, Manifest]:
    """A copy of the videos that a test may damage, its config and its manifest."""
    copy = tmp_path / "videos"
    shutil.copytree(folder, copy)
    config = config_of(copy, tmp_path / "run")
    return copy, config, index(config)


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process checks its workers more often, so that tests of dying workers wait less."""
    monkeypatch.setattr(workers, "_POLL_S", 0.2)


def with_workers(config: Config, workers: int, timeout_s: float = 300.0) -> Config:
    data = config.data.model_copy(update={"workers": workers, "timeout_s": timeout_s})
    return config.model_copy(update={"data": data})


def micro_batches(
    manifest: Manifest, config: Config, start: int = 0, *, steps: int = 3, positions: Callable[[int], range] = range
) -> list[Batch]:
    """The micro-batches of some steps. An epoch has 3 steps of 2 micro-batches."""
    run = train_batches(manifest, config, start, positions=positions)
    return list(chain.from_iterable(islice(run, steps)))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.clips, b.clips) and torch.equal(a.labels, b.labels) and torch.equal(a.videos, b.videos)
        for a, b in zip(first, second, strict=True)
    )


def test_an_epoch_holds_whole_steps_of_different_videos(config: Config, manifest: Manifest) -> None:
    batches = micro_batches(manifest, config)
    assert steps_per_epoch(manifest, config) == 3
    assert len(batches) == 6  # 3 steps of 2 micro-batches; the 13th video is left out
    for batch in batches:
        assert batch.clips.shape == (2, 3, 4, SIZE, SIZE)
        assert (batch.clips.dtype, batch.labels.dtype, batch.videos.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert batch.labels.tolist() == manifest["label"][batch.videos.numpy()].tolist()
        assert batch.failures == []
    assert len({int(row) for batch in batches for row in batch.videos}) == 12


def test_batches_are_the_same_whatever_the_number_of_workers(config: Config, manifest: Manifest) -> None:
    expected, *others = [micro_batches(manifest, with_workers(config, workers), steps=6) for workers in (0, 1, 2)]
    assert all(same(expected, other) for other in others)


@pytest.mark.parametrize("count", [0, 1])
def test_a_later_start_gives_the_same_steps(config: Config, manifest: Manifest, count: int) -> None:
    config = with_workers(config, count)
    whole = micro_batches(manifest, config, steps=6)
    assert same(micro_batches(manifest, config, 2, steps=4), whole[4:])  # in the middle of an epoch
    assert same(micro_batches(manifest, config, 3, steps=3), whole[6:])  # at its end
    last = steps_per_epoch(manifest, config) * config.train.epochs
    assert len(micro_batches(manifest, config, last - 1, steps=9)) == 2
    assert micro_batches(manifest, config, last) == []


def test_the_batches_of_all_ranks_together_are_the_whole_micro_batch(config: Config, manifest: Manifest) -> None:
    whole = micro_batches(manifest, config)
    halves: list[Callable[[int], range]] = [lambda clips: range(clips // 2), lambda clips: range(clips // 2, clips)]
    ranks = list(zip(*(micro_batches(manifest, config, positions=half) for half in halves), strict=True))
    assert [batch.positions for batch in ranks[1]] == [[2], [3]]  # the second micro-batch, positions in the step
    joined = [
        Batch(
            torch.cat([batch.clips for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            torch.cat([batch.videos for batch in batches]),
            list(chain.from_iterable(batch.positions for batch in batches)),
            failures=[],
        )
        for batches in ranks
    ]
    assert same(joined, whole)


def test_the_order_of_an_epoch_depends_only_on_seed_and_epoch(folder: Path, tmp_path: Path, manifest: Manifest) -> None:
    orders = set()
    for seed, epoch in itertools.product(range(3), range(5)):
        run = {"dir": str(tmp_path), "seed": seed}
        by_accumulate = [
            epoch_rows(
                manifest, config_of(folder, tmp_path, run=run, train={"batch": 4, "accumulate": accumulate}), epoch
            )
            for accumulate in (1, 2, 4)
        ]
        assert [rows.shape for rows in by_accumulate] == [(3, 1, 4), (3, 2, 2), (3, 4, 1)]
        (order,) = {tuple(rows.flat) for rows in by_accumulate}
        assert len(set(order)) == 12
        assert set(order) <= set(range(COUNT))
        orders.add(order)
    assert len(orders) == 15


def test_skipped_batches_are_not_decoded(config: Config, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def watched(path: str, *settings: Any, **limits: Any) -> Any:
        opened.append(path)
        return open_video(path, *settings, **limits)

    monkeypatch.setattr(datasets, "open_video", watched)
    assert len(micro_batches(manifest, config, 2, steps=1)) == 2
    assert len(opened) == 4


def test_epochs_and_seeds_differ_in_order_and_in_clips(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path)
    other = config_of(folder, tmp_path, run={"seed": 1})
    manifest = index(config)

    def order(config: Config, epoch: int) -> list[int]:
        return [int(row) for batch in micro_batches(manifest, config, 3 * epoch) for row in batch.videos]

    assert order(config, 0) == order(config, 0)
    assert order(config, 0) != order(config, 1)
    assert order(config, 0) != order(other, 0)
    clips = TrainClips(manifest, config)
    contents = {clips[epoch, 12].frames.numpy().tobytes() for epoch in range(8)}  # type: ignore[union-attr]
    assert len(contents) > 4


def test_clips_hold_the_frames_of_their_start_and_stride(tmp_path: Path) -> None:
    # Square, so that crops show the whole frame and its number.
    write_video(tmp_path / "a.mp4", numbered(40, 64, 64))
    config = config_of(tmp_path, tmp_path, data={"train": {"annotations": write_list(tmp_path / "l", [("a.mp4", 2)])}})
    manifest = index(config)
    clips = [TrainClips(manifest, config)[epoch, 0] for epoch in range(10)]
    for clip in clips:
        assert isinstance(clip, Clip)
        assert (clip.video, clip.label, clip.frames.dtype) == (0, 2, torch.uint8)
        first, *_, last = numbers = numbers_of(clip.frames.permute(1, 2, 3, 0).numpy())
        assert last - first == 11  # 4 frames of a stride of 3 are spread over 12 frames, both ends included
        assert np.ptp(np.diff(numbers)) <= 1
    found = EvalVideos(manifest, config, temporal_views=2, spatial_crops=1)[0]
    assert isinstance(found, VideoViews)
    assert found.starts_s == pytest.approx([0, (40 - 12) / 2 / 30])
    assert [numbers_of(view[0].permute(1, 2, 3, 0).numpy())[0] for view in found.views] == [0, 14]
    assert [numbers_of(small.permute(1, 2, 3, 0).numpy()) for small in found.thumbnails] == [[0, 11], [14, 25]]


def test_a_failed_video_is_counted_and_never_replaced(copied: tuple[Path, Config, Manifest]) -> None:
    copy, config, manifest = copied
    before = micro_batches(manifest, config)
    for row in before[0].videos.tolist():  # a whole batch, after the index was made
        (copy / f"v{row}.mp4").write_bytes(b"torn")
    (copy / f"v{before[1].videos[0]}.mp4").unlink()
    for count in (0, 2):
        after = micro_batches(manifest, with_workers(config, count))
        assert [len(batch.labels) for batch in after] == [0, 1, 2, 2, 2, 2]
        assert [failure.video for failure in after[0].failures] == before[0].videos.tolist()
        (gone,) = after[1].failures
        cause = "not found; it was moved or deleted after it was indexed; run `videoadapt index`"
        assert gone == Failure(int(before[1].videos[0]), str(copy / f"v{gone.video}.mp4"), cause)
        assert torch.equal(after[1].clips[0], before[1].clips[1])
        assert same(after[2:], before[2:])


def test_only_readable_train_videos_are_trained_on(folder: Path, tmp_path: Path) -> None:
    rows = [(f"v{i}.mp4", 0) for i in range(9)]
    write_list(tmp_path / "train.txt", [("gone.mp4", 0), *rows[:6]])
    write_list(tmp_path / "val.txt", rows[6:])
    data = {split: {"annotations": str(tmp_path / f"{split}.txt")} for split in ("train", "val")}
    config = config_of(
        folder, tmp_path, data={**data, "root": str(folder), "workers": 0}, train={"batch": 3, "accumulate": 1}
    )
    manifest = index(config)
    seen = {int(row) for batch in micro_batches(manifest, config, steps=18) for row in batch.videos}
    assert seen == set(range(1, 7))
    larger = config_of(folder, tmp_path, train={"batch": 7, "accumulate": 1})
    with pytest.raises(UserError, match="7 clips a step, but only 6 train videos"):
        steps_per_epoch(manifest, larger)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_keeps_the_order_of_its_rows_including_failures(folder: Path, tmp_path: Path, workers: int) -> None:
    write_list(tmp_path / "train.txt", [("gone.mp4", 0), *((f"v{i}.mp4", 0) for i in range(5))])
    data = {"train": {"annotations": str(tmp_path / "train.txt")}, "root": str(folder)}
    config = config_of(folder, tmp_path, data=data)
    dataset = EvalVideos(index(config), with_workers(config, workers), temporal_views=2, spatial_crops=3)
    rows = [5, 0, 2, 2]
    videos = list(stream(dataset, rows))
    assert [video.video for video in videos] == rows
    assert [type(video) for video in videos] == [VideoViews, Failure, VideoViews, VideoViews]
    first = videos[0]
    assert isinstance(first, VideoViews)
    assert first.views.shape == (2, 3, 3, 4, SIZE, SIZE)
    assert first.thumbnails.shape == (2, 3, 2, 16, 16)
    assert list(stream(dataset, [])) == []


def test_a_single_clip_is_in_the_centre_or_starts_at_frame_0(folder: Path, tmp_path: Path, manifest: Manifest) -> None:
    """TimeSformer's public code starts the only clip at frame 0: delta * 0 / 1."""
    for place, start_s in (("start", 0.0), ("centre", (23 - 12) / 2 / 30)):
        config = config_of(folder, tmp_path, evaluate={"single_clip": place})
        found = EvalVideos(manifest, config, temporal_views=1, spatial_crops=1)[3]  # 23 frames, a clip spans 12
        assert isinstance(found, VideoViews)
        assert found.starts_s == pytest.approx([start_s])
        several = EvalVideos(manifest, config, temporal_views=2, spatial_crops=1)[3]
        assert isinstance(several, VideoViews)
        assert several.starts_s == pytest.approx([0.0, (23 - 12) / 2 / 30])


def test_views_and_thumbnails_are_the_same_alone_and_together(config: Config, manifest: Manifest) -> None:
    both = EvalVideos(manifest, config, temporal_views=2, spatial_crops=2)[3]
    views = EvalVideos(manifest, config, temporal_views=2, spatial_crops=2, thumbnails=False)[3]
    thumbnails = EvalVideos(manifest, config, temporal_views=2, spatial_crops=2, views=False)[3]
    assert isinstance(both, VideoViews)
    assert isinstance(views, VideoViews)
    assert isinstance(thumbnails, VideoViews)
    assert torch.equal(views.views, both.views)
    assert torch.equal(thumbnails.thumbnails, both.thumbnails)
    assert views.thumbnails.shape == (2, 3, 0, 16, 16)
    assert thumbnails.views.shape == (2, 0, 3, 2, SIZE, SIZE)


def test_a_video_is_decoded_once_for_all_views(
    config: Config, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[list[int]] = []

    def watched(*settings: Any, **limits: Any) -> Any:
        reader = open_video(*settings, **limits)
        read = reader.frames

        def frames(wanted: Any) -> np.ndarray:
            decoded.append(wanted.tolist())
            return read(wanted)

        monkeypatch.setattr(reader, "frames", frames)
        return reader

    monkeypatch.setattr(datasets, "open_video", watched)
    assert EvalVideos(manifest, config, temporal_views=3, spatial_crops=3)[0].video == 0
    assert len(decoded) == 1
    assert decoded[0] == sorted(set(decoded[0]))
    assert EvalVideos(manifest, config, temporal_views=3, spatial_crops=3, views=False)[0].video == 0
    assert len(decoded[1]) == 6  # two frames of each of three clips


def test_an_image_is_a_clip_of_equal_frames(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(numbered(1, 40, 60, start=77)[0]).save(tmp_path / "a.png")
    write_list(tmp_path / "train.txt", [("a.png", 1)])
    config = config_of(tmp_path, tmp_path / "run")
    views = EvalVideos(index(config), config, temporal_views=1, spatial_crops=1)[0]
    assert isinstance(views, VideoViews)
    assert (views.views == views.views[:, :, :, :1]).all()


def test_a_whole_step_of_failed_videos_is_an_empty_step(copied: tuple[Path, Config, Manifest]) -> None:
    copy, config, manifest = copied
    for row in epoch_rows(manifest, config, 0)[1].flat:
        (copy / f"v{row}.mp4").unlink()
    first, *middle, last = islice(train_batches(manifest, with_workers(config, 2)), 3)
    assert [len(batch.labels) for batch in chain(first, last)] == [2, 2, 2, 2]
    for batch in chain.from_iterable(middle):
        assert (len(batch.clips), len(batch.labels), len(batch.videos)) == (0, 0, 0)
        assert len(batch.failures) == 2


@pytest.mark.parametrize("count", [0, 2])
def test_a_run_stops_if_most_videos_fail(copied: tuple[Path, Config, Manifest], count: int) -> None:
    copy, config, manifest = copied
    for row in epoch_rows(manifest, config, 0)[1:].flat:  # two thirds
        (copy / f"v{row}.mp4").unlink()
    with pytest.raises(
        RunError,
        match=r"8 of the last 12 training clips \(67%\) cannot be read; the latest is .*v\d+\.mp4: not found",
    ):
        micro_batches(manifest, with_workers(config, count))


class Late(EvalVideos):
    """A file system that does not respond for row 2."""

    def __getitem__(self, number: int) -> VideoViews | Failure:
        if number == 2:
            time.sleep(2)
        return super().__getitem__(number)


class Killed(EvalVideos):
    """A worker that is killed at row 2, as when memory runs out, while another one reads."""

    def __getitem__(self, number: int) -> VideoViews | Failure:
        time.sleep(0.3)
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        return super().__getitem__(number)


@pytest.mark.usefixtures("quick_polls")
def test_the_error_of_a_timeout_names_the_file(config: Config, manifest: Manifest) -> None:
    dataset = Late(manifest, with_workers(config, 1, timeout_s=1.0), temporal_views=1, spatial_crops=1)
    videos = stream(dataset, [0, 2, 1])
    assert isinstance(next(videos), VideoViews)
    with pytest.raises(RunError, match=r"data\.timeout_s=1; being read: \S+v2\.mp4 for [12]\.\d s\. Check the file"):
        next(videos)


@pytest.mark.usefixtures("quick_polls", "rank_server")
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_the_error_of_a_killed_worker_names_its_file_first(config: Config, manifest: Manifest, method: str) -> None:
    dataset = Killed(manifest, with_workers(config, 2), temporal_views=1, spatial_crops=1)
    file = r"\S+v2\.mp4 for \d+\.\d s \(its worker died of SIGKILL\)"
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        with pytest.raises(RunError, match=rf"exited unexpectedly; being read: {file}"):
            list(stream(dataset, [0, 2, 1, 3, 4, 5]))
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("quick_polls")
def test_a_dead_worker_does_not_interrupt_the_main_process(config: Config, manifest: Manifest) -> None:
    dataset = Killed(manifest, with_workers(config, 1), temporal_views=1, spatial_crops=1)
    videos = stream(dataset, [0, 2])
    next(videos)
    time.sleep(0.6)  # the worker dies in this time
    with pytest.raises(RunError, match="exited unexpectedly"):
        next(videos)


def lost() -> None:
    """Fails as a clip does in the main process when its worker is dying: the worker serves the clip's memory."""
    raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


class Lost:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return lost, ()


class Dying(EvalVideos):
    """A worker that is killed half a second after it has sent its item."""

    def __getitem__(self, number: int) -> Any:
        if number != 2:
            return super().__getitem__(number)
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -KILL {os.getpid()}"])
        return Lost()


@pytest.mark.usefixtures("quick_polls")
def test_a_worker_that_dies_slowly_is_reported_too(config: Config, manifest: Manifest) -> None:
    dataset = Dying(manifest, with_workers(config, 1), temporal_views=1, spatial_crops=1)
    with pytest.raises(RunError, match="exited unexpectedly"):
        list(stream(dataset, [0, 2, 1, 3]))


def test_no_worker_outlives_its_loader(config: Config, manifest: Manifest) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    run = train_batches(manifest, with_workers(config, 2))
    next(run)
    assert signal.getsignal(signal.SIGCHLD) == handler  # DataLoader's own would raise anywhere in the main process
    assert len(multiprocessing.active_children()) == 2
    run.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


FAILING = """
import os, subprocess, sys
from multiprocessing import active_children
from videoadapt.config.load import load_config
from videoadapt.data.clips.datasets import EvalVideos
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import load_or_index

config = load_config(sys.argv[1], ["data.workers=2"])
videos = stream(EvalVideos(load_or_index(config), config, temporal_views=1, spatial_crops=1), [0, 1, 2, 3, 4] * 9)
next(videos)
workers = active_children()
# SIGTERM from another process, as from a cluster. Only one worker gets it, so that for the other one the SIGTERM of the
# main process is the first.
subprocess.run(["kill", str(workers[0].pid)], check=True)
for _ in range(40):
    next(videos)
assert active_children() == workers
raise SystemExit("failed")
"""


def test_workers_of_a_job_ignore_its_signals_and_end_with_its_main_process(
    config: Config, manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config))
    command = [sys.executable, "-c", FAILING, str(tmp_path / "config.yaml")]
    # It returns when all processes that hold its output have ended: also the workers.
    done = finished(command, timeout_s=60, env=os.environ | as_step(0, 1))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "failed")


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu(config: Config, manifest: Manifest) -> None:
    device = torch.device("cuda")
    run = islice(train_batches(manifest, with_workers(config, 2), device=device), 6)
    for step, expected in zip(run, islice(train_batches(manifest, config), 6), strict=True):
        moved = [Batch(b.clips.cpu(), b.labels.cpu(), b.videos, b.positions, b.failures) for b in step]
        assert all(b.clips.device.type == "cuda" for b in step)
        assert same(moved, expected)


def test_segments_spread_a_clip_over_the_whole_video(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, tmp_path, data={"sampling": "segments"}, assign={"frames": 4})
    manifest = index(config)
    views = EvalVideos(manifest, config, temporal_views=2, spatial_crops=0, views=True)[0]  # of 20 frames
    assert isinstance(views, VideoViews)
    seen = [numbers_of(clip.permute(1, 2, 3, 0).numpy()) for clip in views.thumbnails]  # (C, A, s, s) -> (A, s, s, C)
    assert seen == [[1, 6, 11, 16], [3, 8, 13, 18]]
    assert views.starts_s == pytest.approx([1.25 / 30, 3.75 / 30])
    read: list[list[int]] = []

    def augmented(frames: np.ndarray, *rest: Any, **named: Any) -> Any:
        read.append(numbers_of(frames))
        return augment(frames, *rest, **named)

    monkeypatch.setattr(datasets, "augment", augmented)
    for epoch in range(8):
        assert isinstance(TrainClips(manifest, config)[epoch, 0], Clip)
    assert [[number // 5 for number in numbers] for numbers in read] == [[0, 1, 2, 3]] * 8
    assert len({tuple(numbers) for numbers in read}) > 4


def test_a_rank_that_reads_no_clip_of_a_step_reads_ahead_all_the_same() -> None:
    """More ranks may share the decoding than a step has clips."""
    assert steps_ahead(0) == steps_ahead(1) > 1
