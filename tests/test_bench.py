"""`bench data`: its files, its loaders read the same clips, and what it says when parts are missing or wrong."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
from torch import Tensor

import small_runs as runs
from conftest import need
from video_files import numbered, numbers_of, write_list, write_video
from videoadapt.bench.data import Settings, add_ratios, bench_data, print_bench_data, require_equal_frames
from videoadapt.bench.files import GOPS, Size, generate, render
from videoadapt.bench.loaders import FFMPEG, LOADERS, OURS_AUTO, OURS_PYAV, PEER_DECORD, PEER_PYAV, Turn, Work, measure
from videoadapt.bench.settings import parse_settings
from videoadapt.config import make_config
from videoadapt.data.manifest import index
from videoadapt.errors import ConfigError, RunError, UserError

SIDE = 64  # pixels
FRAMES, STRIDE = 4, 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Two clips of each of two square videos, whose crops are whole frames."""
    folder = tmp_path_factory.mktemp("bench")
    paths = [write_video(folder / f"{n}.mp4", numbered(90, SIDE, SIDE, start=100 * n)) for n in range(2)]
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
    return Work(index(config), config, [(0, 0), (0, 1), (1, 0), (1, 1)])


def read(name: str, work: Work) -> list[list[int]]:
    """The frame numbers of each clip."""
    clips: list[Tensor] = [clip for clip in LOADERS[name]()(work) if clip is not None]
    return [numbers_of(clip.permute(1, 2, 3, 0).numpy().astype(np.uint8)) for clip in clips]


@pytest.mark.parametrize("name", [OURS_PYAV, PEER_DECORD, PEER_PYAV, "torchcodec, exact"])
def test_all_loaders_read_the_same_clips(name: str, work: Work) -> None:
    if name == PEER_DECORD:
        need("decord", "decord has no wheel here")
    if name.startswith("torchcodec"):
        try:
            importlib.import_module("torchcodec.decoders")
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"torchcodec cannot be used: {str(error).splitlines()[0]}")
    expected, found = read(OURS_AUTO, work), read(name, work)
    if name == PEER_DECORD:
        importlib.import_module("decord").bridge.set_bridge("native")  # pytorchvideo changes it for the whole process
    assert len({tuple(clip) for clip in expected}) == len(work.keys)
    # pytorchvideo cuts by seconds, and may begin at the frame beside.
    tolerance = 1 if name in {PEER_DECORD, PEER_PYAV} else 0
    assert np.abs(np.array(found) - np.array(expected)).max() <= tolerance


def test_a_turn_has_speed_memory_and_digests_of_ours(work: Work) -> None:
    auto, pyav, peer = (measure(name, work) for name in (OURS_AUTO, OURS_PYAV, PEER_PYAV))
    assert auto.digests == pyav.digests
    assert len(set(auto.digests)) == len(work.keys)
    assert peer.digests == []
    assert all(turn.clips_per_cpu_s > 0 and turn.peak_bytes > 10_000_000 for turn in (auto, pyav, peer))


def test_readers_that_disagree_stop_it(work: Work) -> None:
    same, other = (Turn(1.0, 1, [*"abc", last]) for last in "dx")
    require_equal_frames("kind", work, {OURS_AUTO: same, OURS_PYAV: same})
    require_equal_frames("kind", work, {OURS_AUTO: None, OURS_PYAV: same})
    with pytest.raises(RunError, match=r"1 of 4 clips, the first of .*1\.mp4"):
        require_equal_frames("kind", work, {OURS_AUTO: same, OURS_PYAV: other})


def test_ratios() -> None:
    speeds = {OURS_AUTO: 10.0, OURS_PYAV: 20.0, PEER_DECORD: 2.0, PEER_PYAV: 4.0, FFMPEG: 8.0}
    rows = {name: {"clips_per_cpu_s": speed} for name, speed in speeds.items()}
    add_ratios(rows)
    assert [row["times_same_decoder"] for row in rows.values()] == [5.0, 5.0, None, None, None]
    assert [row["times_best_pytorchvideo"] for row in rows.values()] == [2.5, 5.0, 0.5, 1.0, 2.0]
    alone = {OURS_AUTO: {"clips_per_cpu_s": 10.0}}
    add_ratios(alone)
    assert alone[OURS_AUTO]["times_same_decoder"] is alone[OURS_AUTO]["times_best_pytorchvideo"] is None


def test_settings() -> None:
    settings = parse_settings(Settings, "bench data", ["rounds=7", "dir=some where/else"])
    assert (settings.rounds, settings.clips, settings.dir) == (7, 3, Path("some where/else"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("turns=3", "unknown key turns; expected one of dir, rounds, clips"),
        ("rounds=0", "rounds: .*greater than or equal to 1, got 0"),
        ("clips=many", "clips: .*integer.*'many'"),
        ("size=300", "size: 300 is more than short_side 256"),
    ],
)
def test_wrong_settings_name_the_key(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_settings(Settings, "bench data", [word])


def test_generated_files(tmp_path: Path) -> None:
    size = Size(96, 64, 200_000)
    kinds = generate(tmp_path, sizes=(size,), frames=30)
    assert list(kinds) == [f"96x64 GOP {gop}" for gop in GOPS]
    for gop, paths in zip(GOPS, kinds.values(), strict=True):
        assert len({path.read_bytes() for path in paths}) == len(paths)
        for path in paths:
            with av.open(str(path)) as container:
                frames = list(container.decode(video=0))
            assert (len(frames), frames[0].width, frames[0].height) == (30, 96, 64)
            assert [n for n, frame in enumerate(frames) if frame.key_frame] == list(range(0, 30, gop))
    made = {path: path.stat().st_mtime_ns for paths in kinds.values() for path in paths}
    generate(tmp_path, sizes=(size,), frames=30)
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_contents_move_and_depend_on_the_seed_alone() -> None:
    size = Size(96, 64, 1)
    first, again, other = (np.stack(list(render(np.random.default_rng(seed), size, 20))) for seed in (0, 0, 1))
    assert (first == again).all()
    assert np.abs(first[0].astype(int) - other[0]).mean() > 10
    assert np.abs(first[0].astype(int) - first[-1]).mean() > 2 * np.abs(first[0].astype(int) - first[1]).mean()


@pytest.mark.slow
def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good = [write_video(tmp_path / f"{name}.mp4", 40) for name in "ab"]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg
    words = [f"dir={tmp_path / 'out'}", "rounds=2", "clips=2", "num_frames=4", "stride_frames=4", "short_side=64"]
    result = bench_data([*words, "size=64"], [*map(str, good), str(tmp_path / "broken.mp4")])
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == result
    table = result["kinds"]["given"]
    assert table["files"] == 2
    assert [Path(path).name for path in table["unread"]] == ["broken.mp4"]
    assert table["left_out"][FFMPEG] == "ffmpeg is not on the path"
    assert set(table["loaders"]) | set(table["left_out"]) == set(LOADERS)
    for name in (OURS_AUTO, OURS_PYAV, PEER_PYAV):
        row = table["loaders"][name]
        assert len(row["rounds"]) == 2
        assert 0 < row["imported_bytes"] <= row["peak_bytes"]
    print_bench_data(result)
    said = capsys.readouterr().out
    assert "ffmpeg is not on the path" in said
    assert "broken.mp4" in said


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    other = runs.command("bench", "model")
    assert other.returncode == 2
    assert "No such command 'model'" in other.stderr
    missing = runs.command("bench", "data", f"dir={tmp_path}", str(tmp_path / "missing.mp4"))
    assert missing.returncode == 2
    assert "missing.mp4" in missing.stderr
    assert missing.stdout == ""


def test_no_video_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not one of the 1 videos"):
        bench_data([f"dir={tmp_path}"], [str(tmp_path / "missing.mp4")])
