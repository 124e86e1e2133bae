"""Looking at many files at once: files that crash or hang a process, and going on where an earlier call stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from video_files import numbered, write_video
from videoadapt.data.index import probe_pool
from videoadapt.data.index.probe_pool import ProbeResult, probe_files, run_on_files
from videoadapt.data.video.probe import VideoInfo, probe
from videoadapt.data.video.verify import verify
from videoadapt.errors import VideoError
from videoadapt.runtime.signals import JOB_SIGNALS, StopRequest

INFO = VideoInfo(1, 1.0, 64, 64, 1.0, "h264", "mov", 0, "pyav", 1, "abc")


# What the processes run must be importable there: they know nothing of fixtures and patches.
def by_name(path: str) -> VideoInfo:
    """Stands for `probe`: what becomes of a file is its name."""
    match path.rstrip("0123456789"):
        case "crash":
            os._exit(11)
        case "hang":
            time.sleep(600)
        case "bug":
            raise KeyError("a bug of a library")
        case "broken":
            raise VideoError(f"{path}: no video")
        case "torch":
            return replace(INFO, codec="imported" if "torch" in sys.modules else "not imported")
    return INFO


def look(paths: list[str], workers: int = 2, timeout_s: float = 60.0) -> dict[str, VideoInfo | str]:
    return dict(run_on_files(paths, by_name, workers=workers, timeout_s=timeout_s))


def test_a_file_that_crashes_its_process_fails_alone() -> None:
    found = look([*(f"good{i}" for i in range(20)), "crash1", "crash2", *(f"good{i}" for i in range(20, 40))])
    assert {path for path, finding in found.items() if finding == "the process that read it crashed"} == {
        "crash1",
        "crash2",
    }
    assert sum(finding == INFO for finding in found.values()) == 40


def test_a_file_that_takes_too_long_fails_alone() -> None:
    start = time.monotonic()
    found = look(["hang1", *(f"good{i}" for i in range(20)), "hang2"], timeout_s=1.0)
    assert time.monotonic() - start < 15
    assert found.pop("hang1") == found.pop("hang2") == "reading it took longer than 1 s"
    assert set(found.values()) == {INFO}
    assert len(found) == 20


def test_whatever_else_a_file_brings_out_is_its_cause() -> None:
    assert look(["bug", "broken", "good"]) == {
        "bug": "reading it raised KeyError: 'a bug of a library'",
        "broken": "no video",
        "good": INFO,
    }


def test_the_processes_do_not_import_torch() -> None:
    assert look(["torch"])["torch"] == replace(INFO, codec="not imported")


def test_no_file_needs_no_process() -> None:
    assert look([]) == {}


class Counting(list[str]):
    """Paths that count how many of them were asked for."""

    taken = 0

    def __iter__(self) -> Iterator[str]:
        for path in super().__iter__():
            self.taken += 1
            yield path


def test_few_files_are_under_way_at_once_and_closing_stops_at_once() -> None:
    paths = Counting(["good", *(f"hang{i}" for i in range(100_000))])
    with closing(run_on_files(paths, by_name, workers=2, timeout_s=600.0)) as findings:
        assert next(findings) == ("good", INFO)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert paths.taken < 100


@pytest.fixture(scope="module")
def six_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("six") / "six.mp4", 6)


@pytest.fixture
def paths(tmp_path: Path, six_frames: Path) -> list[str]:
    """Five videos, the names of some hard for a careless program, one broken file and one that is not there."""
    names = [f"{name}.mp4" for name in ("a", "b b", "ünï-日本", "d\u2028e", '"f"', "broken", "gone")]
    for name in names[:5]:
        shutil.copy(six_frames, tmp_path / name)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    return [str(tmp_path / name) for name in names]


def found(paths: list[str], cache: Path, *, full: bool = False) -> dict[str, ProbeResult]:
    return probe_files(paths, full=full, cache=cache, workers=2, timeout_s=60.0)


def entries(cache: Path) -> list[str]:
    """The names of the files in a cache, in the order in which they were looked at."""
    lines = filter(None, cache.read_text().splitlines())
    return [json.loads(line)["stamp"].rpartition("/")[2] for line in lines]


def test_what_was_found_is_kept_and_failures_are_not(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "run" / "probed.jsonl"
    first = found(paths, cache)
    assert [first[path] for path in paths[:5]] == [probe(path) for path in paths[:5]]
    assert "cannot be read" in str(first[paths[5]])
    assert first[paths[6]] is None
    assert sorted(entries(cache)) == sorted(Path(path).name for path in paths[:5])
    written = cache.read_bytes()
    assert found(paths, cache) == first
    assert cache.read_bytes() == written


def test_an_interrupted_call_goes_on_where_it_stopped(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "probed.jsonl"
    first = found(paths, cache)
    lines = cache.read_text().split("\n")
    cache.write_text("\n".join(lines[:4]) + "\n" + lines[4][:40])  # three were found, the fourth line is torn
    kept = [json.loads(line)["stamp"].rpartition("/")[2] for line in lines[1:4]]
    changed = next(path for path in paths if Path(path).name == kept[0])
    write_video(Path(changed), 7)
    shutil.copy(paths[1], paths[6])
    second = found(paths, cache)
    assert second == first | {changed: probe(changed), paths[6]: probe(paths[6])}
    looked_at = [line for line in cache.read_text().split("\n")[5:] if line]
    assert len(looked_at) == 4  # the two after the interruption, the changed one, the one that was missing
    assert found(paths, cache) == second


def test_a_full_finding_serves_a_quick_call_but_not_the_other_way_round(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "probed.jsonl"
    quick = found(paths[:5], cache)
    full = found(paths[:5], cache, full=True)
    assert len(entries(cache)) == 10
    assert full == {path: verify(path) for path in paths[:5]}
    assert full != quick
    assert found(paths[:5], cache, full=True) == found(paths[:5], cache) == full
    assert len(entries(cache)) == 10


def test_an_image_that_is_written_over_in_its_folder_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(numbered(1, start=number)[0]).save(folder / f"{number}.bmp")
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    cache, path = tmp_path / "cache" / "probed.jsonl", str(folder)
    first = found([path], cache)
    assert found([path], cache) == first
    assert len(entries(cache)) == 1
    folder_time = folder.stat().st_mtime_ns
    Image.fromarray(numbered(1, start=9)[0]).save(folder / "1.bmp")  # as large as before
    assert folder.stat().st_mtime_ns == folder_time
    second = found([path], cache)
    assert second == {path: probe(folder)}
    assert second != first


def test_findings_of_another_version_are_not_used(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "probed.jsonl"
    first = found(paths[:2], cache)
    monkeypatch.setattr(probe_pool, "PROBE_VERSION", probe_pool.PROBE_VERSION + 1)
    assert found(paths[:2], cache) == first
    assert len(entries(cache)) == 4
    monkeypatch.setattr(probe_pool, "version", lambda _: "0.1")
    assert found(paths[:2], cache) == first
    assert len(entries(cache)) == 6


def test_a_file_that_may_not_be_read_is_broken_not_missing(tmp_path: Path, six_frames: Path) -> None:
    (tmp_path / "folder").mkdir()
    names = ["x" * 300 + ".mp4", "nul\0.mp4", "folder", str(six_frames) + "/inside.mp4"]
    paths = [str(tmp_path / name) for name in names]
    findings = found(paths, tmp_path / "cache" / "probed.jsonl")
    assert "too long" in str(findings[paths[0]])
    assert "null" in str(findings[paths[1]])
    assert "folder without images" in str(findings[paths[2]])
    assert findings[paths[3]] is None


def test_a_job_that_is_told_to_stop_keeps_what_it_found_and_goes_on_later(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "probed.jsonl"
    with StopRequest(JOB_SIGNALS) as job:
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe_pool.Bar, "step", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
            found(paths[:5], cache)
        assert job.received == signal.SIGUSR2  # the job knows that it has to come back
    assert len(entries(cache)) == 1
    assert found(paths[:5], cache) == {path: probe(path) for path in paths[:5]}
    assert len(entries(cache)) == 5


def test_a_job_that_was_told_to_stop_before_stops_before_a_file_is_opened(paths: list[str], tmp_path: Path) -> None:
    with StopRequest(JOB_SIGNALS), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        found(paths, tmp_path / "probed.jsonl")
    assert not (tmp_path / "probed.jsonl").exists()


def hang(_: str) -> VideoInfo:
    """Stands for `probe`."""
    time.sleep(600)
    return INFO


def test_ctrl_c_does_not_wait_for_a_file(paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_pool, "probe", hang)
    start = time.monotonic()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        found(paths, tmp_path / "probed.jsonl")
    assert time.monotonic() - start < 15


def warned(path: str) -> str:
    """Stands for `probe`: gets the signal of a job near its time limit, as all of its processes do."""
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getppid(), signal.SIGUSR2)  # where processes are forked from
    return path


def test_the_processes_live_on_when_a_job_is_warned() -> None:
    paths = [f"file{i}" for i in range(8)]
    assert dict(run_on_files(paths, warned, workers=2, timeout_s=60.0)) == {path: path for path in paths}
