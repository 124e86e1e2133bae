"""Ranks: a single process, the rendezvous, collectives, and one error message for a job with a failed rank."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from processes import finished, torchrun
from rank_jobs import HEAD, JOIN_S, Ranks, as_step
from videoadapt.config.load import Config, make_config
from videoadapt.data.index.probe_pool import run_on_files
from videoadapt.errors import RunError, UserError
from videoadapt.runtime.ranks import (
    _exit_code,
    all_gather,
    all_reduce_sum,
    any_requested,
    broadcast_result,
    gpu_index,
    is_collective_error,
    rank,
    ranks,
    wait_for_all,
    world_size,
)
from videoadapt.runtime.signals import StopRequest

pytestmark = pytest.mark.usefixtures("rank_server")


def config_of(folder: Path, **parallel: int | float) -> Config:
    return make_config({"run": {"dir": str(folder), "device": "cpu"}, "parallel": parallel})


def test_a_single_process_is_rank_0_of_1(tmp_path: Path) -> None:
    with ranks(config_of(tmp_path)) as collectives:
        collectives.set_timeout(1.0)
        assert (rank(), world_size()) == (0, 1)
        wait_for_all()
        assert broadcast_result(lambda: "done") == "done"
        assert all_gather("mine") == ["mine"]
        assert all_reduce_sum(torch.ones(2)).tolist() == [1.0, 1.0]
        assert not any_requested(StopRequest())


ACTION = """
import torch
from videoadapt.runtime.ranks import all_reduce_sum

for rendezvous in range(2):
    with ranks(config):
        assert broadcast_result(lambda: [rank()]) == [0]
        assert all_gather(rank() * 10) == [number * 10 for number in range(world_size())]
        assert all_reduce_sum(torch.tensor([rank() + 1.0])).item() == sum(range(world_size() + 1))
        assert not any_requested(StopRequest())
        (folder / f"rank{rank()}of{world_size()}").touch()
"""


FAIL_ONCE = """
from videoadapt.runtime import heartbeats

heartbeats.GRACE_BEATS = 0
with ranks(config):
    wait_for_all()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError("the first start")
    time.sleep(3)
"""


def test_collectives_of_ranks_that_torchrun_started_again_after_a_failure(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(HEAD + FAIL_ONCE + ACTION)
    launcher, words = torchrun(2), [program, tmp_path, JOIN_S]
    done = finished([*launcher, "--max-restarts=1", *map(str, words)])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("rank?of*")) == ["rank0of2", "rank1of2"]


def test_collectives_of_ranks_that_srun_started(tmp_path: Path) -> None:
    ended = Ranks(ACTION, tmp_path, 3).ended()
    assert [code for code, _ in ended.values()] == [0, 0, 0], ended
    assert sorted(path.name for path in tmp_path.glob("rank?of*")) == ["rank0of3", "rank1of3", "rank2of3"]


def test_ranks_start_with_torch_after_an_index_too(tmp_path: Path) -> None:
    """A process has one fork server, and each index sets what it imports when it starts."""
    for _ in range(2):
        assert dict(run_on_files(["video"], len, workers=1, timeout_s=60)) == {"video": 5}
        ended = Ranks("assert preloaded", tmp_path, 2).ended()
        assert [code for code, _ in ended.values()] == [0, 0], ended


def test_a_missing_variable_of_the_launcher_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(RunError, match=r"the 2 ranks \(WORLD_SIZE\) cannot find each other: .*MASTER_ADDR"),
        ranks(config_of(tmp_path)),
    ):
        pass


def test_the_number_of_ranks_must_be_parallel_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected 3 ranks, but this process is one of 1 \(no launcher started it\)"):
        ranks(config_of(tmp_path, ranks=3)).__enter__()
    for name, value in as_step(0, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=r"expected 3 ranks, but this process is one of 2 \(slurm started it\)"):
        ranks(config_of(tmp_path, ranks=3)).__enter__()


def test_several_tasks_without_srun_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(RunError, match=r"job 7 has 4 tasks, but this process was not started by srun"):
        ranks(config_of(tmp_path)).__enter__()


def test_an_assigned_gpu_that_torch_does_not_find_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    config = make_config({"run": {"dir": str(tmp_path)}})
    with pytest.raises(RunError, match="SLURM gave GPU 3 to this task, but torch finds no GPU; check nvidia-smi"):
        ranks(config).__enter__()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with ranks(config):
        pass


def test_the_gpu_index_follows_from_the_local_rank() -> None:
    assert [gpu_index(local, 4) for local in range(5)] == [0, 1, 2, 3, None]
    assert [gpu_index(local, 1) for local in range(3)] == [0, 0, 0]  # bound by SLURM to one each


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_only_the_dead_rank_is_named_if_others_wait_for_a_failed_rank(tmp_path: Path, launcher: str) -> None:
    # If a rank dies, torchrun ends the other ranks before they can report it; so it hangs instead.
    end, timeout_s = ("os._exit(9)", 60.0) if launcher == "srun" else ("time.sleep(60)", 3.0)
    program = f"""
import torch
from torch import distributed

with ranks(config, {timeout_s}):
    wait_for_all()
    if rank() == 1:
        {end}
    distributed.recv(torch.zeros(1), 1 if rank() == 0 else 0)
"""
    if launcher == "srun":
        ended = Ranks(program, tmp_path, 3).ended()
        assert all(code != 0 for code, _ in ended.values())
        output = "".join(errors for _, errors in ended.values())
    else:
        (tmp_path / "program.py").write_text(HEAD + program)
        output = finished(torchrun(3, tmp_path / "program.py", tmp_path, JOIN_S)).stderr
    assert re.search(r"RunError: rank 1 of 3 \(\S+\) died or hangs", output)
    assert output.count("RunError:") == 1


def test_only_the_first_failing_rank_reports_its_error(tmp_path: Path) -> None:
    program = """
with ranks(config):
    wait_for_all()
    if rank() == 1:
        raise ValueError("the first cause")
    wait_for_all()
"""
    job = Ranks(program, tmp_path, 3)
    ended = job.ended()
    assert time.monotonic() - job.since < 40
    assert "ValueError: the first cause" in ended[1][1]
    assert "".join(errors for _, errors in ended.values()).count("Traceback") == 1
    assert all(code != 0 for code, _ in ended.values())


def test_all_ranks_get_the_signal_of_highest_priority(tmp_path: Path) -> None:
    """SIGUSR2 requests a requeue and overrides SIGTERM."""
    program = """
import os, signal

with ranks(config), StopRequest() as stop:
    if rank() > 0:
        os.kill(os.getpid(), signal.SIGTERM if rank() == 1 else signal.SIGUSR2)
    assert any_requested(stop)
    (folder / f"{rank()}{stop.received.name}").touch()
    wait_for_all()
"""
    ended = Ranks(program, tmp_path, 3).ended()
    assert [code for code, _ in ended.values()] == [0, 0, 0], ended
    assert {path.name for path in tmp_path.glob("?SIG*")} == {"0SIGUSR2", "1SIGUSR2", "2SIGUSR2"}


def test_a_signal_during_the_all_reduce_is_returned_by_the_next_call(tmp_path: Path) -> None:
    program = """
import os, subprocess

with ranks(config), StopRequest() as stop:
    wait_for_all()
    if rank() == 0:
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -USR2 {os.getpid()}"])
    else:
        time.sleep(2)
    first, second = any_requested(stop), any_requested(stop)
    (folder / f"{rank()}{first}{second}{stop.received.name}").touch()
"""
    ended = Ranks(program, tmp_path, 2).ended()
    assert [code for code, _ in ended.values()] == [0, 0], ended
    assert {path.name for path in tmp_path.glob("?False*")} == {"0FalseTrueSIGUSR2", "1FalseTrueSIGUSR2"}


STOP = """
import signal
from videoadapt.runtime import heartbeats
from videoadapt.runtime.ranks import stopping_together
from videoadapt.runtime.signals import Stopped

heartbeats.GRACE_BEATS = 1
try:
    with ranks(config), stopping_together(), StopRequest() as stop:
        me = rank()
        if me == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        assert any_requested(stop)
        if me == 0:
            SAVE
        stop.stop()
except Stopped:
    (folder / f"stopped{me}").touch()
"""


def test_a_stopped_rank_waits_while_rank_0_saves(tmp_path: Path) -> None:
    """Otherwise its end would end rank 0 after `GRACE_BEATS`."""
    ended = Ranks(STOP.replace("SAVE", "time.sleep(5)"), tmp_path, 3).ended()
    assert [code for code, _ in ended.values()] == [0, 0, 0], ended
    assert len(list(tmp_path.glob("stopped?"))) == 3


def test_an_error_while_rank_0_saves_is_not_taken_for_a_stop(tmp_path: Path) -> None:
    ended = Ranks(STOP.replace("SAVE", 'raise OSError(28, "the disk is full")'), tmp_path, 3).ended()
    assert [code for code, _ in ended.values()] == [1, 1, 1], ended
    assert ended[0][1].splitlines()[-1] == "OSError: [Errno 28] the disk is full"
    assert not list(tmp_path.glob("stopped?"))


def test_an_interrupt_on_one_rank_interrupts_all(tmp_path: Path) -> None:
    program = """
import os

def stop():
    raise KeyboardInterrupt

try:
    with ranks(config):
        broadcast_result(stop)
except KeyboardInterrupt:  # a slow rank may still be joining when the first one is interrupted
    (folder / f"interrupted{os.environ['SLURM_PROCID']}").touch()
"""
    ended = Ranks(program, tmp_path, 3).ended()
    assert {path.name for path in tmp_path.glob("interrupted*")} == {f"interrupted{number}" for number in range(3)}
    assert [code for code, _ in ended.values()] == [0, 0, 0], ended


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("a"), 2), (RunError("a"), 1), (ValueError("a"), 1), (KeyboardInterrupt(), 130), (SystemExit(143), 143)],
    ids=repr,
)
def test_a_rank_that_leaves_nccl_suddenly_has_the_exit_code_of_its_error(error: BaseException, code: int) -> None:
    assert _exit_code(error) == code


def test_an_error_after_the_interrupt_of_another_rank_is_raised(tmp_path: Path) -> None:
    program = """
with ranks(config):
    me = rank()
    wait_for_all()
    if me == 1:
        time.sleep(1)
        raise KeyboardInterrupt
    time.sleep(3)  # it saves
    raise OSError(28, "the disk is full")
"""
    ended = Ranks(program, tmp_path, 2).ended()
    assert ended[0][1].splitlines()[-1] == "OSError: [Errno 28] the disk is full"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("Wait timeout"), True),  # of a file store, when a process group is created
        (torch.distributed.DistStoreError("Timed out after 4 seconds waiting for clients"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RunError("run/train.json: another rank wrote this file; timed out waiting"), False),
        (ValueError("gloo"), False),
    ],
)
def test_errors_of_collectives_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_collective_error(error) == expected


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)"])
def test_a_rank_that_died_or_hangs_is_named_after_the_timeout(tmp_path: Path, end: str) -> None:
    program = f"""
import os, signal
import torch
from torch import distributed

with ranks(config) as collectives:
    wait_for_all()
    collectives.set_timeout(3.0)
    wait_for_all()
    if rank() == 1:
        {end}
    # The second all-reduce waits longer. Its connection is closed when the first one fails.
    first = distributed.all_reduce(torch.ones(1), async_op=True)
    time.sleep(1)
    second = distributed.all_reduce(torch.ones(1), async_op=True)
    second.wait()
"""
    job = Ranks(program, tmp_path, 3)
    ended = job.ended(timeout_s=45, only=[0, 2])
    output = "".join(errors for _, errors in ended.values())
    assert re.search(r"rank 1 of 3 \(\S+\) died or hangs; a collective operation of the other ranks failed", output)
    assert output.count("RunError:") == 1
