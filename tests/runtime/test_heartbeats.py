"""Signs of life: a lost rank is named although the operations of the others would wait for it for an hour.

gloo's connections to a stopped process stay open, as NCCL's operations with a dead one wait: neither fails by itself.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from rank_jobs import Ranks

pytestmark = pytest.mark.usefixtures("rank_server")

PROGRAM = """
import json, multiprocessing, signal
import torch
from videoadapt.runtime import heartbeats
from videoadapt.runtime.lease import sole_writer

heartbeats.SILENT_BEATS, heartbeats.GRACE_BEATS = 8, 3
with ranks(config), sole_writer(config, "train"):
    wait_for_all()
    worker = multiprocessing.Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()
    (folder / f"worker{rank()}").write_text(str(worker.pid))
    lost = LOST
    (folder / f"pid{rank()}").write_text(str(os.getpid()))
    if rank() == lost:
        ACTION
    WAIT
"""


def ends(pid: int, timeout_s: float = 60) -> bool:
    """Waits until a process has ended, at most so long: a killed process takes its time on a busy machine."""
    end_s = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end_s:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("lost", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(tmp_path: Path, lost: int) -> None:
    program = PROGRAM.replace("LOST", str(lost)).replace("ACTION", "os.kill(os.getpid(), signal.SIGSTOP)")
    job = Ranks(program.replace("WAIT", "wait_for_all()"), tmp_path, 3)
    others = [rank for rank in range(3) if rank != lost]
    ended = job.ended(timeout_s=240, only=others)
    assert all(code == 1 for code, _ in ended.values()), ended
    output = "".join(errors for _, errors in ended.values())
    assert f"of 3: rank {lost} of 3" in output
    assert "died or hangs" in output
    assert lost == 0 or output.count("error on rank") == 1
    assert all(ends(int((tmp_path / f"worker{rank}").read_text())) for rank in others)
    assert (tmp_path / "train.owner").exists() == (lost == 0)  # rank 0 is the owner, and gives the folder back


def test_an_error_ends_ranks_that_wait_for_ever(tmp_path: Path) -> None:
    """A rank whose operation does not notice the failure, as those of NCCL."""
    program = PROGRAM.replace("LOST", "1").replace("ACTION", "raise ValueError('the cause')")
    ended = Ranks(program.replace("WAIT", "time.sleep(600)"), tmp_path, 3)
    codes = ended.ended(timeout_s=240)
    assert [code for code, _ in codes.values()] == [1, 1, 1], codes
    assert "ValueError: the cause" in codes[1][1]
    assert "error on rank" not in codes[0][1] + codes[2][1]


def test_only_connections_of_process_groups_are_closed(tmp_path: Path) -> None:
    program = """
import socket

listener = socket.create_server(("127.0.0.1", 0))
mine = socket.create_connection(listener.getsockname())
other, _ = listener.accept()
try:
    with ranks(config, 3.0):
        me = rank()
        wait_for_all()
        if me == 1:
            time.sleep(60)
        wait_for_all()
except BaseException as error:
    mine.sendall(b"open")
    (folder / f"{me}{other.recv(4).decode()}").touch()
    raise
"""
    ended = Ranks(program, tmp_path, 3).ended(timeout_s=60, only=[0, 2])
    assert len(list(tmp_path.glob("*open"))) == 2, ended
