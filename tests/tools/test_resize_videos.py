"""`tools/resize_videos.py`: the content of copies, files that it must not touch, and cleaning up after failures."""

from __future__ import annotations

import csv
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from video_files import numbered, numbers_of, write_video
from videoadapt.data.video.probe import probe
from videoadapt.data.video.readers import open_video
from videoadapt.errors import UserError, VideoError

TOOL = Path(__file__).parents[2] / "tools" / "resize_videos.py"
sys.path.insert(0, str(TOOL.parent))  # the worker processes of the tool import it from there
tool: Any = importlib.import_module(TOOL.stem)

SMALL = tool.Encoding(short_side=48, preset="ultrafast")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, words)], capture_output=True, text=True, check=False)


def run_here(*words: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves the imports."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            typer.run(tool.main)
    return subprocess.CompletedProcess([], int(ended.value.code or 0), out.getvalue(), errors.getvalue())


def resize(source: Path, target: Path, encoding: Any = SMALL) -> Path:
    tool.resize(source.name, root=source.parent, target=target, encoding=encoding)
    return tool.result_path(source.name, target)


def all_numbers(path: Path) -> list[int]:
    video = open_video(path, "pyav")
    return numbers_of(video.frames(range(len(video))))


def times_s(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [float(frame.time or 0) for frame in container.decode(video=0)]


@given(st.integers(2, 4000), st.integers(2, 4000), st.integers(16, 512))
def test_sizes_are_even_and_never_larger(height: int, width: int, short_side: int) -> None:
    new = tool.resized((height, width), short_side)
    assert all(side % 2 == 0 and 2 <= side <= old + 1 for side, old in zip(new, (height, width), strict=True))
    if min(height, width) >= short_side:
        assert abs(min(new) - short_side) <= 1
    assert abs(new[0] * width - new[1] * height) <= height + width + 2  # the proportions, up to rounding


def test_a_copy_has_all_frames_in_order_a_smaller_size_and_many_keyframes(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mkv", 40, gop=250)
    result = resize(source, tmp_path / "out")
    info = probe(result)
    assert (info.height, info.width, info.codec) == (48, 72, "h264")
    assert info.fps == pytest.approx(probe(source).fps)
    assert all_numbers(result) == list(range(40))
    with av.open(str(result)) as container:
        keys = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert max(np.diff(keys)) <= 12
    assert len(keys) < 10


def test_a_smaller_video_keeps_its_size(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", 5)
    info = probe(resize(source, tmp_path / "out", tool.Encoding(short_side=256)))
    assert (info.height, info.width) == (64, 96)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, rotation: int) -> None:
    source = write_video(tmp_path / "a.mp4", numbered(3), rotation=rotation)
    result = resize(source, tmp_path / "out", tool.Encoding(short_side=64))
    shown, made = open_video(source).frames([2])[0], open_video(result).frames([2])[0]
    assert probe(result).rotation == 0
    assert made.shape == shown.shape
    assert np.abs(made.astype(int) - shown).mean() < 4


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif"])
def test_uneven_times_stay(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"uneven{suffix}"
    milliseconds = [50, 80, 120, 400, 430, 1000, 1030]
    if suffix == ".gif":
        first, *others = map(Image.fromarray, numbered(7))
        first.save(source, save_all=True, append_images=others, duration=[30, 40, 280, 30, 570, 30, 30])
    else:
        write_video(source, 7, times_ms=milliseconds)
    result = resize(source, tmp_path / "out")
    info = probe(source)
    assert probe(result).variable_rate
    assert probe(result).fps == pytest.approx(info.fps)
    expected_ms = np.cumsum([30, 40, 280, 30, 570, 30]) if suffix == ".gif" else np.array(milliseconds[1:]) - 50
    assert np.array(times_s(result))[1:] * 1000 == pytest.approx(expected_ms, abs=1)
    assert all_numbers(result) == list(range(7))


def test_frames_stay_in_order_without_presentation_times(tmp_path: Path) -> None:
    source = write_video(tmp_path / "b_frames.avi", 20)  # avi has decoding times only
    assert all_numbers(resize(source, tmp_path / "out")) == list(range(20))


@pytest.mark.parametrize("rotation", [0, 90])
@pytest.mark.parametrize(("pixels", "matrix"), [("yuv420p", 1), ("yuv420p", 6), ("yuvj420p", 6), ("yuv444p", 2)])
def test_colours_stay(tmp_path: Path, pixels: str, matrix: int, rotation: int) -> None:
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    row = np.stack(np.broadcast_arrays(ramp, ramp[::-1], np.uint8(90)), -1)
    source = tmp_path / "a.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 96, pixels
        stream.codec_context.colorspace = matrix  # 1: HD (BT.709), 6: SD (BT.601), 2: unspecified
        stream.set_display_rotation(rotation)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.stack([row] * 64), "rgb24")
            container.mux(stream.encode(frame.reformat(format=pixels, dst_colorspace=matrix)))
        container.mux(stream.encode())
    result = resize(source, tmp_path / "out", tool.Encoding(short_side=64, crf=5))
    difference = open_video(result).frames([1]).astype(int) - open_video(source).frames([1])
    assert np.abs(difference).mean() < 3


def test_a_copy_is_made_again_only_after_a_change(tmp_path: Path) -> None:
    source, target = write_video(tmp_path / "in" / "sub" / "a.mp4", 5), tmp_path / "out"

    def status(encoding: Any = SMALL) -> str:
        outcome = tool.resize("sub/a.mp4", root=tmp_path / "in", target=target, encoding=encoding)
        return outcome.status

    assert [status(), status()] == ["done", "skipped"]
    write_video(source, 7)
    assert [status(), status()] == ["done", "skipped"]
    assert probe(target / "sub/a.mp4").frames == 7
    other = tool.Encoding(short_side=32)
    assert [status(other), status(other)] == ["done", "skipped"]


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in" / "a.mp4", 5)
    foreign = write_video(tmp_path / "out" / "a.mp4", 3)
    before = foreign.read_bytes()
    with pytest.raises(VideoError, match="not made by this tool"):
        resize(source, foreign.parent)
    foreign.write_bytes(b"not even a video")
    with pytest.raises(VideoError, match="not made by this tool"):
        resize(source, foreign.parent)
    assert foreign.read_bytes() == b"not even a video" != before


def test_a_damaged_video_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", 60)
    torn = bytearray(source.read_bytes())
    middle = len(torn) // 3
    torn[middle : middle + 400] = bytes(400)
    source.write_bytes(torn)
    with pytest.raises(VideoError, match=r"a\.mp4: .*damaged"):
        resize(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_copy_that_lacks_frames_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_video(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(tool, "encode", lambda source, path, *_: write_video(path.with_suffix(".mp4"), 4).rename(path))
    with pytest.raises(VideoError, match="4 frames came out of 5"):
        resize(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_videos_with_the_same_copy_both_fail(tmp_path: Path) -> None:
    todo, clashing = tool.split_clashing(["a.avi", "a.mp4", "b.mkv"], tmp_path)
    assert todo == ["b.mkv"]
    assert set(clashing) == {"a.avi", "a.mp4"}


def test_an_encoder_that_is_not_there_is_refused_at_once() -> None:
    tool.require_encoder(SMALL)
    with pytest.raises(UserError, match="^--codec libx999: FFmpeg has no such encoder"):
        tool.require_encoder(tool.Encoding(codec="libx999"))
    with pytest.raises(UserError, match="^--preset quick: libx264 does not accept it"):
        tool.require_encoder(tool.Encoding(preset="quick", crf=30))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no scheduling policies")
def test_an_encoder_leaves_the_scheduling_as_it_was(tmp_path: Path) -> None:
    """SVT-AV1, run as root, makes real-time threads of its own and of its caller, which all later processes inherit."""

    def policies() -> set[int]:
        return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}

    before = policies()
    encoding = tool.Encoding(short_side=64, codec="libsvtav1", preset="12")
    tool.require_encoder(encoding)
    assert policies() == before
    resize(write_video(tmp_path / "a.mp4", codec="libsvtav1"), tmp_path / "out", encoding)
    assert policies() == before


def test_a_link_to_its_own_folder_repeats_no_video(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "a.mp4", 2)
    write_video(tmp_path / "elsewhere" / "b.mp4", 2)
    (tmp_path / "in" / "loop").symlink_to(".")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    assert tool.find_videos(tmp_path / "in") == (tmp_path / "in", ["a.mp4", "more/b.mp4"])


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch: no such file or folder"):
        tool.find_videos(tmp_path / "nosuch")


def test_all_failures_are_in_a_file_and_ten_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {f"{n:02d}.avi": f"torn, {n}" for n in range(25)}
    tool.write_failures(tmp_path / tool.FAILED, Path("in"), outcomes)
    tool.print_summary(Path("in"), tmp_path, outcomes)
    stderr = capsys.readouterr().err
    assert stderr.count("torn") == 10
    assert f"25 videos in all; {tmp_path / 'failed.csv'} names each" in stderr.replace("\n", "")
    with (tmp_path / "failed.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "cause"], *([f"in/{name}", cause] for name, cause in outcomes.items())]
    tool.write_failures(tmp_path / tool.FAILED, Path("in"), {})
    assert not (tmp_path / "failed.csv").exists()


def test_a_foreign_list_in_the_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / tool.FAILED
    tool.require_own_list(path)
    tool.write_failures(path, Path("in"), {"caf\udce9.avi": "torn"})  # a name that is no UTF-8
    tool.require_own_list(path)
    path.write_text("student,mark\n")
    with pytest.raises(UserError, match="failed.csv: is no list of failures of this script"):
        tool.require_own_list(path)


def test_imports_do_not_count_as_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    cold = [9.0]  # CPU seconds of the first read
    monkeypatch.setattr(tool, "_clip_cpu_s", lambda path: cold.pop() if cold else {"a": 0.5, "b": 0.25}[path.name])
    assert tool.reading_speeds([(Path("a"), Path("b"))] * 2) == (2.0, 4.0)


def test_a_manifest_names_the_readable_videos(tmp_path: Path) -> None:
    import small_runs as runs
    from videoadapt.data.index.manifest import index

    for name in ("in/x/a.mp4", "in/y/b.mp4"):
        write_video(tmp_path / name, 3)
    (tmp_path / "in" / "y" / "broken.mp4").write_bytes(b"no video")
    data, folder = tmp_path / "list.txt", tmp_path / "run"
    data.write_text("in/x/a.mp4 0\nin/y/b.mp4 1\nin/y/broken.mp4 1\nin/missing.mp4 0\n")
    sections = {"train": {"annotations": str(data)}, "val": {}, "root": str(tmp_path), "classes": None}
    index(runs.config(tmp_path, folder, data=sections))
    assert tool.find_videos(folder / "manifest.parquet") == (tmp_path / "in", ["x/a.mp4", "y/b.mp4"])


def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "a.mkv", 20)
    write_video(tmp_path / "in" / "sub" / "b.mp4", 20)
    (tmp_path / "in" / "empty.mp4").touch()
    words = (tmp_path / "in", tmp_path / "out", "--short-side", 48, "--workers", 2)
    done = run(*words)
    assert done.returncode == 1, done.stderr
    assert f"failed: {tmp_path / 'in' / 'empty.mp4'}: the file is empty" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == [
        "a.mp4",
        "b.mp4",
        "failed.csv",
    ]
    assert "renamed: 1 copies end in .mp4" in done.stderr
    assert "clips / CPU-s, of 2 files" in done.stdout
    (tmp_path / "in" / "empty.mp4").unlink()
    again = run_here(*words)
    assert again.returncode == 0, again.stderr
    assert [line.split()[-2] for line in again.stdout.splitlines() if "done before" in line] == ["2"]


def test_a_target_inside_the_source_is_rejected(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "a.mkv", 2)
    done = run_here(tmp_path / "in", tmp_path / "in" / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_video_that_takes_too_long_fails_alone(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "long.mp4", numbered(1000, 128, 192))
    write_video(tmp_path / "in" / "short.mp4", 2)
    slow = tool.Encoding(short_side=128, preset="placebo")
    _, outcomes = tool.resize_all(tmp_path / "in", tmp_path / "out", slow, workers=1, timeout_s=0.7)
    assert isinstance(outcomes["short.mp4"], tool.Outcome), outcomes
    assert "longer than 0.7 s" in outcomes["long.mp4"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["short.mp4"]


def test_an_interruption_leaves_no_unfinished_copy(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "long.mp4", 1000)
    target = tmp_path / "out"
    words = [sys.executable, str(TOOL), str(tmp_path / "in"), str(target), "--preset", "placebo"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not list(target.glob(".*.part")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "the same command resumes" in stderr
    assert list(target.iterdir()) == []
