"""Probing many files in processes: files that crash or hang a process, the cache, and signals."""

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
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from video_files import numbered, write_video
from videoadapt.data.index import probe_pool
from videoadapt.data.index.probe_pool import NotProbed, ProbeResult, probe_files, run_on_files
from videoadapt.data.video.limits import DEFAULT_LIMITS, Limits
from videoadapt.data.video.probe import VideoInfo, probe
from videoadapt.data.video.verify import verify
from videoadapt.errors import RunError, VideoError
from videoadapt.runtime.signals import JOB_SIGNALS, StopRequest

INFO = VideoInfo(1, 1.0, 64, 64, 1.0, "h264", "mov", 0, "pyav", 1, "abc")


# Functions that the processes call must be importable there. Fixtures and patches do not reach them.
def by_name(path: str) -> VideoInfo:
    """Replaces `probe`: the name of a file decides what happens."""
    match path.rstrip("0123456789"):
        case "crash":
            os._exit(11)
        case "hang":
            time.sleep(600)
        case "bug":
            raise KeyError("a bug of a library")
        case "memory":
            raise MemoryError
        case "broken":
            raise VideoError(f"{path}: no video")
        case "torch":
            return replace(INFO, codec="imported" if "torch" in sys.modules else "not imported")
    return INFO


def run(paths: list[str], workers: int = 2, timeout_s: float = 60.0) -> dict[str, VideoInfo | str]:
    return dict(run_on_files(paths, by_name, workers=workers, timeout_s=timeout_s))


def test_a_file_that_crashes_its_process_fails_alone() -> None:
    results = run([*(f"good{i}" for i in range(20)), "crash1", "crash2", *(f"good{i}" for i in range(20, 40))])
    assert {path for path, result in results.items() if result == "the process that read it crashed"} == {
        "crash1",
        "crash2",
    }
    assert sum(result == INFO for result in results.values()) == 40


def killed(path: str) -> str:
    """Replaces `probe`: a process is killed by the memory killer, or its fork server dies, always or at first."""
    event, _, when = path.rpartition("/")[2].partition("_")
    marker = Path(path)
    if event == "good":
        marker.touch()
    elif not (when == "once" and marker.exists()):
        marker.touch()
        deadline = time.monotonic() + 60
        while not marker.with_name("good_1").exists() and time.monotonic() < deadline:
            time.sleep(0.02)  # until the other worker has read a file: otherwise no process could be started at all
        time.sleep(0.5)  # the pool has its result
        os.kill(os.getppid() if event == "server" else os.getpid(), signal.SIGKILL)
        time.sleep(10)  # the process of a dead fork server lives on
    return path


def test_a_file_whose_process_is_killed_is_read_again_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("good_1", "memory_once", "memory_always", "good_2", "good_3")]
    results = dict(run_on_files(paths, killed, workers=2, timeout_s=60.0))
    message = results.pop(paths[2])
    assert isinstance(message, NotProbed)
    assert message == "the process that read it was killed (SIGKILL; the memory may be full)"
    assert results == {path: path for path in paths if path != paths[2]}
    assert "2 files to read again, each alone" in capsys.readouterr().err


def test_a_dead_fork_server_is_reported_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("server_once", "good_1", "good_2", "good_3")]
    assert dict(run_on_files(paths, killed, workers=2, timeout_s=60.0)) == {path: path for path in paths}
    assert "the fork server, which starts the processes that read videos, died" in capsys.readouterr().err


class Unreadable:
    """A result that the reading process can send, and the first process cannot take: the pool breaks."""

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return int, (None,)  # TypeError


def breaking(path: str) -> object:
    """Replaces `probe`: breaks the pool at one file, always or once."""
    event, _, when = path.rpartition("/")[2].partition("_")
    if event == "good" or (when == "once" and Path(path).exists()):
        return path
    Path(path).touch()
    return Unreadable()


def test_a_new_pool_goes_on_with_the_files_of_a_broken_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("good_1", "break_once", "good_2", "good_3")]
    assert dict(run_on_files(paths, breaking, workers=1, timeout_s=60.0)) == {path: path for path in paths}
    assert "the processes that read videos broke down; new ones read on" in capsys.readouterr().err


def test_a_pool_that_breaks_at_once_is_an_error_with_the_files_in_work(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("good_1", "break_always")]
    with pytest.raises(RunError, match=r"memory is full; fewer data\.workers.* in work were .*/break_always$"):
        dict(run_on_files(paths, breaking, workers=1, timeout_s=60.0))


def test_a_file_for_which_the_memory_does_not_suffice_is_not_broken() -> None:
    assert isinstance(run(["memory"])["memory"], NotProbed)


def test_a_file_that_takes_too_long_fails_alone() -> None:
    start = time.monotonic()
    results = run(["hang1", *(f"good{i}" for i in range(20)), "hang2"], timeout_s=1.0)
    assert time.monotonic() - start < 15
    assert results.pop("hang1") == results.pop("hang2") == "reading it took longer than 1 s"
    assert set(results.values()) == {INFO}
    assert len(results) == 20


def test_any_exception_becomes_the_cause_of_its_file() -> None:
    assert run(["bug", "broken", "good"]) == {
        "bug": "reading it raised KeyError: 'a bug of a library'",
        "broken": "no video",
        "good": INFO,
    }


def test_the_processes_do_not_import_torch() -> None:
    import rank_jobs  # here, because the processes import this module

    rank_jobs.end_server()  # workers of a loader may have begun it, with torch
    assert run(["torch"])["torch"] == replace(INFO, codec="not imported")


def test_no_paths_give_no_results() -> None:
    assert run([]) == {}


class Counting(list[str]):
    """A list that counts the items that were read from it."""

    read = 0

    def __iter__(self) -> Iterator[str]:
        for path in super().__iter__():
            self.read += 1
            yield path


def test_few_files_are_in_flight_and_closing_stops_at_once() -> None:
    paths = Counting(["good", *(f"hang{i}" for i in range(100_000))])
    with closing(run_on_files(paths, by_name, workers=2, timeout_s=600.0)) as results:
        assert next(results) == ("good", INFO)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert paths.read < 100


@pytest.fixture(scope="module")
def six_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("six") / "six.mp4", 6)


@pytest.fixture
def paths(tmp_path: Path, six_frames: Path) -> list[str]:
    """Five videos, some with unusual names, a file that is not a video, and a missing file."""
    names = [f"{name}.mp4" for name in ("a", "b b", "ünï-日本", "d\u2028e", '"f"', "broken", "gone")]
    for name in names[:5]:
        shutil.copy(six_frames, tmp_path / name)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    return [str(tmp_path / name) for name in names]


def probe_all(paths: list[str], cache: Path, *, full: bool = False) -> dict[str, ProbeResult]:
    return probe_files(paths, full=full, cache=cache, workers=2, timeout_s=60.0)


def entries(cache: Path) -> list[str]:
    """Returns the names of the files in a cache, in the order in which they were probed."""
    lines = filter(None, cache.read_text().splitlines())
    return [json.loads(line)["stamp"].rpartition("/")[2] for line in lines]


def test_results_are_cached_and_failures_are_not(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "run" / "probed.jsonl"
    first = probe_all(paths, cache)
    assert [first[path] for path in paths[:5]] == [probe(path) for path in paths[:5]]
    assert "cannot be read" in str(first[paths[5]])
    assert first[paths[6]] is None
    assert sorted(entries(cache)) == sorted(Path(path).name for path in paths[:5])
    written = cache.read_bytes()
    assert probe_all(paths, cache) == first
    assert cache.read_bytes() == written


def test_an_interrupted_call_continues_where_it_stopped(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "probed.jsonl"
    first = probe_all(paths, cache)
    lines = cache.read_text().split("\n")
    cache.write_text("\n".join(lines[:4]) + "\n" + lines[4][:40])  # three results, and an incomplete fourth line
    kept = [json.loads(line)["stamp"].rpartition("/")[2] for line in lines[1:4]]
    changed = next(path for path in paths if Path(path).name == kept[0])
    write_video(Path(changed), 7)
    shutil.copy(paths[1], paths[6])
    second = probe_all(paths, cache)
    assert second == first | {changed: probe(changed), paths[6]: probe(paths[6])}
    probed = [line for line in cache.read_text().split("\n")[5:] if line]
    assert len(probed) == 4  # two after the interruption, the changed file, the file that was missing
    assert probe_all(paths, cache) == second


def test_a_full_result_serves_a_quick_call_but_not_the_reverse(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "probed.jsonl"
    quick = probe_all(paths[:5], cache)
    full = probe_all(paths[:5], cache, full=True)
    assert len(entries(cache)) == 10
    assert full == {path: verify(path) for path in paths[:5]}
    assert full != quick
    assert probe_all(paths[:5], cache, full=True) == probe_all(paths[:5], cache) == full
    assert len(entries(cache)) == 10


def test_an_overwritten_image_of_a_folder_is_probed_again(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(numbered(1, start=number)[0]).save(folder / f"{number}.bmp")
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    cache, path = tmp_path / "cache" / "probed.jsonl", str(folder)
    first = probe_all([path], cache)
    assert probe_all([path], cache) == first
    assert len(entries(cache)) == 1
    folder_time = folder.stat().st_mtime_ns
    Image.fromarray(numbered(1, start=9)[0]).save(folder / "1.bmp")  # the size is unchanged
    assert folder.stat().st_mtime_ns == folder_time
    second = probe_all([path], cache)
    assert second == {path: probe(folder)}
    assert second != first


def test_results_of_another_version_are_not_used(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "probed.jsonl"
    first = probe_all(paths[:2], cache)
    monkeypatch.setattr(probe_pool, "PROBE_VERSION", probe_pool.PROBE_VERSION + 1)
    assert probe_all(paths[:2], cache) == first
    assert len(entries(cache)) == 4
    monkeypatch.setattr(probe_pool, "version", lambda _: "0.1")
    assert probe_all(paths[:2], cache) == first
    assert len(entries(cache)) == 6


def test_an_unreadable_path_is_broken_and_not_missing(tmp_path: Path, six_frames: Path) -> None:
    (tmp_path / "folder").mkdir()
    names = ["x" * 300 + ".mp4", "nul\0.mp4", "folder", str(six_frames) + "/inside.mp4"]
    paths = [str(tmp_path / name) for name in names]
    results = probe_all(paths, tmp_path / "cache" / "probed.jsonl")
    assert "too long" in str(results[paths[0]])
    assert "null" in str(results[paths[1]])
    assert "folder without images" in str(results[paths[2]])
    assert results[paths[3]] is None


def test_a_stopped_job_keeps_its_results_and_continues_later(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "probed.jsonl"
    with StopRequest(JOB_SIGNALS) as job:
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe_pool.Bar, "step", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
            probe_all(paths[:5], cache)
        assert job.received == signal.SIGUSR2  # the job knows that it must be submitted again
    assert len(entries(cache)) == 1
    assert probe_all(paths[:5], cache) == {path: probe(path) for path in paths[:5]}
    assert len(entries(cache)) == 5


def test_a_job_that_was_stopped_before_opens_no_file(paths: list[str], tmp_path: Path) -> None:
    with StopRequest(JOB_SIGNALS), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        probe_all(paths, tmp_path / "probed.jsonl")
    assert not (tmp_path / "probed.jsonl").exists()


def hang(_: str, limits: Limits) -> VideoInfo:  # noqa: ARG001
    """Replaces `probe`."""
    time.sleep(600)
    return INFO


def test_ctrl_c_does_not_wait_for_a_file(paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_pool, "probe", hang)
    start = time.monotonic()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        probe_all(paths, tmp_path / "probed.jsonl")
    assert time.monotonic() - start < 15


def send_warnings(path: str) -> str:
    """Replaces `probe`: sends the signal that SLURM sends to all processes of a job near its time limit."""
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getppid(), signal.SIGUSR2)  # the fork server
    return path


def test_the_processes_survive_the_warning_signals_of_a_job() -> None:
    paths = [f"file{i}" for i in range(8)]
    assert dict(run_on_files(paths, send_warnings, workers=2, timeout_s=60.0)) == {path: path for path in paths}


@pytest.mark.parametrize(
    ("field", "value"), [("frames", "16"), ("fps", None), ("fps", float("nan")), ("reader", "other"), ("width", [1])]
)
def test_a_cached_result_of_another_type_is_probed_again(tmp_path: Path, field: str, value: object) -> None:
    info = asdict(VideoInfo(16, 30.0, 8, 8, 1.0, "h264", "mp4", 0, "pyav", 9, "00"))
    cache = tmp_path / "probed.jsonl"
    lines = [{"stamp": "whole", "by": "me", "info": info}, {"stamp": "bad", "by": "me", "info": info | {field: value}}]
    cache.write_text("\n".join([*map(json.dumps, lines), "[" * 100_000]))
    assert set(probe_pool._read_cache(cache, "me", DEFAULT_LIMITS, full=False)) == {"whole"}
