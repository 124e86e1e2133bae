"""`bench data`: its videos, that all loaders read the same clips, its figures, and its errors."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from torch import Tensor

import small_runs as runs
from conftest import need
from video_files import numbered, numbers_of, write_list, write_video
from videoadapt.config.load import make_config, parse_settings
from videoadapt.data.clips.datasets import Clip, Failure, TrainClips
from videoadapt.data.index.manifest import Manifest, index
from videoadapt.errors import ConfigError
from videoadapt.performance.bench import data, loaders
from videoadapt.performance.bench.data import (
    LoaderRow,
    Settings,
    _own_process,
    bench_data,
    broken,
    peers,
    print_bench_data,
    with_ratios,
)
from videoadapt.performance.bench.files import ENCODINGS, Size, generate, render
from videoadapt.performance.bench.loaders import (
    FFMPEG,
    LOADERS,
    OURS_AUTO,
    OURS_PYAV,
    PEER_DECORD,
    PEER_PYAV,
    Work,
    measure,
    readers_of_auto,
    unfit_files,
)
from videoadapt.performance.bench.memory import ProcessMemory, peak, process_memory, worker_memory

SIDE = 64  # pixels
FRAMES, STRIDE = 4, 8


def make_work(folder: Path, paths: list[Path], keys: list[tuple[int, int]]) -> Work:
    config = make_config(
        {
            "run": {"dir": folder},
            "data": {
                "train": {"annotations": write_list(folder / "list.txt", [(path.name, 0) for path in paths])},
                "short_side": [SIDE, SIDE],
                "flip": 0.0,
            },
            "model": {
                "size": SIDE,
                "num_frames": FRAMES,
                "stride_frames": STRIDE,
                "num_classes": 1,
                "points": ["1"],
            },
        }
    )
    return Work(index(config), config, keys)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Two clips of each of two square videos. A crop is a whole frame, so that no loader crops at random."""
    folder = tmp_path_factory.mktemp("bench")
    paths = [write_video(folder / f"{n}.mp4", numbered(90, SIDE, SIDE, start=100 * n)) for n in range(2)]
    return make_work(folder, paths, [(0, 0), (0, 1), (1, 0), (1, 1)])


def read(name: str, work: Work) -> list[list[int]]:
    """The frame numbers of each clip, which are encoded in the pixels."""
    clips: list[Tensor] = [clip for clip in LOADERS[name]()(work) if clip is not None]
    return [numbers_of(clip.permute(1, 2, 3, 0).numpy().astype(np.uint8)) for clip in clips]


@pytest.mark.parametrize("name", [OURS_PYAV, PEER_DECORD, PEER_PYAV, "torchcodec, exact"])
def test_all_loaders_read_the_same_clips(name: str, work: Work) -> None:
    if name == PEER_DECORD:
        need("decord", "decord has no wheel for this platform")
    if name.startswith("torchcodec"):
        try:
            importlib.import_module("torchcodec.decoders")
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"torchcodec cannot be used: {str(error).splitlines()[0]}")
    expected, found = read(OURS_AUTO, work), read(name, work)
    if name == PEER_DECORD:
        importlib.import_module("decord").bridge.set_bridge(
            "native"
        )  # undo: pytorchvideo changes it in the whole process
    assert len({tuple(clip) for clip in expected}) == len(work.keys)
    # pytorchvideo cuts by seconds, and may start one frame earlier or later.
    tolerance = 1 if name in {PEER_DECORD, PEER_PYAV} else 0
    assert np.abs(np.array(found) - np.array(expected)).max() <= tolerance


def test_clips_start_where_the_training_loader_starts_them_also_with_wrong_durations(work: Work) -> None:
    table = work.manifest.table
    table["duration_s"] *= 2
    longer = Work(Manifest(table, work.manifest.classes), work.config, work.keys)
    assert [start_s for _, start_s in longer.clips()] == [start_s for _, start_s in work.clips()]


@pytest.mark.parametrize("name", [OURS_AUTO, OURS_PYAV, PEER_PYAV])
def test_a_turn_measures_cpu_time_and_peak_memory(name: str, work: Work) -> None:
    measure(name, work)  # imports
    begin = time.process_time()
    turn = measure(name, work)
    used_s = time.process_time() - begin
    assert 0.5 * used_s < len(work.keys) / turn.clips_per_cpu_s < 1.1 * used_s
    resident = psutil.Process().memory_info().rss
    assert 0.9 * resident < turn.peak_bytes < psutil.virtual_memory().total  # the kernel counts pages in batches


def test_files_with_different_frames_from_our_readers_are_named(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unfit_files(work) == {}

    class Wrong(TrainClips):
        def __getitem__(self, key: tuple[int, int]) -> Clip | Failure:
            clip = super().__getitem__(key)
            assert isinstance(clip, Clip)
            wrong = self.config.data.reader == "pyav" and key == (1, 1)
            return replace(clip, frames=255 - clip.frames) if wrong else clip

    monkeypatch.setattr(loaders, "TrainClips", Wrong)
    path = work.manifest.row(1).path
    assert list(unfit_files(work)) == [path]
    marked = broken(work.manifest, {path: "why"})
    assert [(row.path == path, row.status, row.cause) for row in marked] == [(False, "ok", ""), (True, "broken", "why")]


def test_the_peer_has_the_decoder_that_auto_chose(tmp_path: Path) -> None:
    assert peers(["decord"]) == {OURS_AUTO: PEER_DECORD, OURS_PYAV: PEER_PYAV}
    assert peers(["pyav"]) == {OURS_AUTO: PEER_PYAV, OURS_PYAV: PEER_PYAV}
    assert peers(["decord", "pyav"]) == peers(["image"]) == {OURS_PYAV: PEER_PYAV}
    rotated = write_video(tmp_path / "a.mp4", 40, rotation=90)
    assert readers_of_auto(make_work(tmp_path, [rotated], [(0, 0)])) == ["pyav"]


def with_speeds(speeds: dict[str, float]) -> dict[str, LoaderRow]:
    return {name: LoaderRow(speed, [speed], 2, 1, None, None) for name, speed in speeds.items()}


def test_ratios() -> None:
    rows = with_speeds({OURS_AUTO: 10.0, OURS_PYAV: 20.0, PEER_DECORD: 2.0, PEER_PYAV: 4.0, FFMPEG: 8.0})
    by_decord = with_ratios(rows, peers(["decord"]))
    assert [row.times_same_decoder for row in by_decord.values()] == [5.0, 5.0, None, None, None]
    assert [row.times_best_pytorchvideo for row in by_decord.values()] == [2.5, 5.0, 0.5, 1.0, 2.0]
    assert with_ratios(rows, peers(["pyav"]))[OURS_AUTO].times_same_decoder == 2.5
    alone = with_ratios(with_speeds({OURS_AUTO: 10.0}), peers(["decord"]))[OURS_AUTO]
    assert alone.times_same_decoder is alone.times_best_pytorchvideo is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts shared pages in proportion")
def test_memory_of_a_worker(work: Work) -> None:
    found = worker_memory(work, "pyav", clips=4)
    assert found is not None
    own = process_memory(os.getpid())
    # A forked worker shares its parent's libraries. It has less for itself than the parent maps in all.
    assert 5_000 < found.uss < found.pss < found.rss < 2 * own.rss + 100_000  # KiB
    assert peak([ProcessMemory(3, 2, 1), ProcessMemory(1, 4, 0)]) == ProcessMemory(3, 4, 1)
    with pytest.raises(psutil.NoSuchProcess):
        process_memory(2**22 + 1)  # above the largest process id


def test_output_of_libraries_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with _own_process() as process:
        process.schedule(os.write, args=[2, b"[BytesIO]"]).result()
        process.schedule(os.write, args=[1, b"[BytesIO]"]).result()
    assert "BytesIO" not in "".join(capfd.readouterr())


def test_settings_are_parsed() -> None:
    settings = parse_settings(Settings, "bench data", ["rounds=7", "dir=some where/else"])
    assert (settings.rounds, settings.clips, settings.dir) == (7, None, Path("some where/else"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("turns=3", r"bench data: unknown key turns; the keys are .*rounds"),
        ("rounds=0", "rounds: .*greater than or equal to 1, got '0'"),
        ("clips=many", "clips: .*integer.*'many'"),
        ("size=300", "size: expected at most short_side \\(256\\), got 300"),
    ],
)
def test_wrong_settings_name_the_key(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings(Settings, "bench data", [word])


def test_generated_files(tmp_path: Path) -> None:
    size = Size(96, 64, 200_000)
    kinds = generate(tmp_path, sizes=(size,), frames=30)
    assert list(kinds) == ["96x64 H.264, GOP 12", "96x64 H.264, GOP 250", "96x64 HEVC, GOP 12", "96x64 VP9, GOP 12"]
    for encoding, paths in zip(ENCODINGS, kinds.values(), strict=True):
        assert len({path.read_bytes() for path in paths}) == len(paths)
        for path in paths:
            with av.open(str(path)) as container:
                frames = list(container.decode(video=0))
            assert (len(frames), frames[0].width, frames[0].height) == (30, 96, 64)
            assert [n for n, frame in enumerate(frames) if frame.key_frame] == list(range(0, 30, encoding.gop))
    written = {path: path.stat().st_mtime_ns for paths in kinds.values() for path in paths}
    generate(tmp_path, sizes=(size,), frames=30)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_contents_move_and_depend_only_on_the_seed() -> None:
    size = Size(96, 64, 1)
    first, again, other = (np.stack(list(render(np.random.default_rng(seed), size, 20))) for seed in (0, 0, 1))
    assert (first == again).all()
    assert np.abs(first[0].astype(int) - other[0]).mean() > 10
    assert np.abs(first[0].astype(int) - first[-1]).mean() > 2 * np.abs(first[0].astype(int) - first[1]).mean()


@pytest.mark.slow
def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good = [write_video(tmp_path / f"{name}.mp4", 40) for name in "ab"]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    torn = write_video(tmp_path / "torn.mp4", 40)
    content = bytearray(torn.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    torn.write_bytes(content)
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg
    some = {name: LOADERS[name] for name in (OURS_AUTO, OURS_PYAV, PEER_PYAV, FFMPEG)}  # each is a process with torch
    monkeypatch.setattr(data, "LOADERS", some)
    words = [f"dir={tmp_path / 'out'}", "rounds=2", "num_frames=4", "stride_frames=10", "short_side=64"]
    result = bench_data([*words, "size=64"], [*map(str, good), str(torn), str(tmp_path / "broken.mp4")])
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == result
    table = result["kinds"]["given"]
    assert (table["files"], table["files_read"], table["clips"]) == (4, 2, 3)
    assert sorted(Path(path).name for path in table["unread"]) == ["broken.mp4", "torn.mp4"]
    assert table["left_out"][FFMPEG] == "ffmpeg is not on the path"
    assert set(table["loaders"]) | set(table["left_out"]) == set(some)
    speeds = {name: row["clips_per_cpu_s"] for name, row in table["loaders"].items()}
    for name, row in table["loaders"].items():
        assert len(row["rounds"]) == 2
        assert min(row["rounds"]) <= row["clips_per_cpu_s"] <= max(row["rounds"])
        assert row["imported_bytes"] <= row["peak_bytes"]
        best = max(speeds[peer] for peer in (PEER_DECORD, PEER_PYAV) if peer in speeds)
        assert row["times_best_pytorchvideo"] == pytest.approx(speeds[name] / best)
    assert table["loaders"][OURS_PYAV]["times_same_decoder"] == pytest.approx(speeds[OURS_PYAV] / speeds[PEER_PYAV])
    if sys.platform == "linux":
        for name in (OURS_AUTO, OURS_PYAV):
            assert table["loaders"][name]["worker_uss_bytes"] < table["loaders"][name]["worker_pss_bytes"]
    print_bench_data(result)
    output = capsys.readouterr().out
    assert "given: 3 clips a round, of 2 of 4 files" in output
    assert "ffmpeg is not on the path" in output
    assert "broken.mp4" in output


def test_a_missing_video_is_an_error_of_the_command(tmp_path: Path) -> None:
    missing = runs.command("bench", "data", f"dir={tmp_path}", str(tmp_path / "missing.mp4"))
    assert missing.returncode == 2
    assert "none of the 1 videos can be used" in missing.stderr
    assert "missing.mp4" in missing.stderr
    assert missing.stdout == ""
