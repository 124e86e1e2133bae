"""A stage as a job: what follows a signal, and how often a job restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import small_runs as runs
from videoadapt.commands import stage as jobs
from videoadapt.commands.stage import run_stage
from videoadapt.config.load import Config, dump_config, make_config
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import RunError
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.runtime.results import ShardResult
from videoadapt.runtime.signals import JOB_SIGNALS, Stopped, StopRequest
from videoadapt.training.state import State

CONFIG = make_config({"slurm": {"max_restarts": 3}})  # its run folder is in the working directory


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A SLURM job on its second restart, in an empty folder. SLURM ends it as soon as it waits. Returns its actions."""
    actions: list[str] = []
    before = {number: signal.getsignal(number) for number in JOB_SIGNALS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(jobs, "requeue", lambda job: actions.append(f"requeue {job}"))

    def sleep(_: float) -> None:
        actions.append("waits")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(jobs.time, "sleep", sleep)
    yield actions
    for number, handler in before.items():
        signal.signal(number, handler)


def stage_that(monkeypatch: pytest.MonkeyPatch, *received: signal.Signals) -> None:
    """Replaces the stage by one that receives these signals, saves, and stops."""

    def run(_: Config) -> ShardResult:
        with StopRequest() as stop:
            for number in received:
                os.kill(os.getpid(), number)
            if stop.requested:
                stop.stop()
        return ShardResult("1/4")

    monkeypatch.setattr(jobs, "_function", lambda _: run)


def test_a_stage_returns_its_summary(monkeypatch: pytest.MonkeyPatch, in_job: list[str]) -> None:
    stage_that(monkeypatch)
    assert run_stage("train", CONFIG) == ShardResult("1/4")
    assert in_job == []


@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warned_job_is_requeued_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, in_job: list[str], warning: signal.Signals
) -> None:
    stage_that(monkeypatch, warning)
    with pytest.raises(SystemExit):  # submitit would record a return as a result
        run_stage("train", CONFIG)
    assert in_job == ["requeue 7", "waits"]


def test_other_ranks_wait_for_their_end(monkeypatch: pytest.MonkeyPatch, in_job: list[str]) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    stage_that(monkeypatch, signal.SIGUSR2)
    with pytest.raises(SystemExit):
        run_stage("train", CONFIG)
    assert in_job == ["waits"]


def test_a_preempted_job_waits_for_its_end(monkeypatch: pytest.MonkeyPatch, in_job: list[str]) -> None:
    stage_that(monkeypatch, signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run_stage("train", CONFIG)
    assert in_job == ["waits"]
    assert ended.value.code == 143


def test_a_rank_that_received_no_signal_also_waits(monkeypatch: pytest.MonkeyPatch, in_job: list[str]) -> None:
    """It stops because another rank was warned. If it ended first, the job would fail."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")

    def run(_: Config) -> ShardResult:
        raise Stopped(signal.SIGUSR2)

    monkeypatch.setattr(jobs, "_function", lambda _: run)
    with pytest.raises(SystemExit):
        run_stage("train", CONFIG)
    assert in_job == ["waits"]


def test_a_warning_after_the_end_of_the_stage_is_ignored(monkeypatch: pytest.MonkeyPatch, in_job: list[str]) -> None:
    stage_that(monkeypatch)
    run_stage("train", CONFIG)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert in_job == []


def test_restarts_are_limited_at_signal_and_start(monkeypatch: pytest.MonkeyPatch, in_job: list[str]) -> None:
    stage_that(monkeypatch, signal.SIGUSR2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(RunError, match=r"job 7 was restarted 3 times, and slurm\.max_restarts is 3"):
        run_stage("train", CONFIG)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")  # SLURM requeues after a node has failed
    monkeypatch.setattr(jobs, "_function", None)
    with pytest.raises(RunError, match="job 7 was restarted 4 times"):
        run_stage("train", CONFIG)
    assert in_job == []


@pytest.mark.parametrize("saved", ["checkpoints/step-00000004.safetensors", "scores/label-1/part-00001.npz", ""])
def test_a_job_that_saves_nothing_in_two_starts_is_not_requeued(
    monkeypatch: pytest.MonkeyPatch, in_job: list[str], saved: str
) -> None:
    stage_that(monkeypatch, signal.SIGUSR2)
    with pytest.raises(SystemExit):
        run_stage("train", CONFIG)
    if saved:
        path = CONFIG.run.dir / saved
        path.parent.mkdir(parents=True)
        path.write_text("saved by the second start")
        with pytest.raises(SystemExit):
            run_stage("train", CONFIG)
    assert in_job == ["requeue 7", "waits"] * (2 if saved else 1)
    with pytest.raises(RunError, match=r"job 7 has saved nothing new in its last two starts: .*slurm\.time_minutes"):
        run_stage("train", CONFIG)
    assert in_job == ["requeue 7", "waits"] * (2 if saved else 1)
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted again, with a longer limit
    with pytest.raises(SystemExit):
        run_stage("train", CONFIG)


def test_a_finished_job_leaves_no_record_of_its_restarts(monkeypatch: pytest.MonkeyPatch, in_job: list[str]) -> None:
    stage_that(monkeypatch, signal.SIGUSR2)
    with pytest.raises(SystemExit):
        run_stage("train", CONFIG)
    assert [path.name for path in (CONFIG.run.dir / "restarts").iterdir()] == ["7"]
    stage_that(monkeypatch)
    run_stage("train", CONFIG)
    assert list((CONFIG.run.dir / "restarts").iterdir()) == []
    assert in_job == ["requeue 7", "waits"]


def test_ctrl_c_in_a_job_interrupts(monkeypatch: pytest.MonkeyPatch, in_job: list[str]) -> None:
    stage_that(monkeypatch, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_stage("train", CONFIG)
    assert in_job == []


def test_outside_a_job_a_signal_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    stage_that(monkeypatch, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_stage("train", CONFIG)


def handled(pid: int) -> bool:
    """Returns whether a process has a handler for SIGUSR2."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (signal.SIGUSR2 - 1) & 1)


def wait_until(done: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("stage", ["train", "label"])
def test_a_signal_before_torch_is_imported_requeues_after_the_first_save(tmp_path: Path, stage: str) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run", train={"save_steps": 0})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    if stage == "label":
        state = State.start(config, load_or_index(config))
        train_checkpoints(config.run.dir).save(0, *state.saved())
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    # SLURM ends all processes of the job, including `scontrol` itself.
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked; kill $$ $PPID\n')
    scontrol.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "videoadapt", stage, str(tmp_path / "config.yaml")],
        env=os.environ | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: handled(process.pid))
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGUSR2)
    assert "libtorch" not in maps
    _, errors = process.communicate(timeout=120)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert "saved and requeued (restart 1)" in errors
    assert "Traceback" not in errors
