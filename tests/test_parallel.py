"""Ranks: one process alone needs no launcher, several meet, and rank 0 goes first where it must."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from videoadapt.errors import RunError
from videoadapt.parallel import first_rank_first, rank, ranks, wait_for_all, world_size


def test_one_process_alone_is_rank_0_of_1() -> None:
    with ranks():
        assert (rank(), world_size()) == (0, 1)
        wait_for_all()
        assert first_rank_first(lambda: "done") == "done"


def test_rank_0_acts_before_the_others(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import sys, time
from pathlib import Path
from videoadapt.parallel import first_rank_first, rank, ranks, world_size

file = Path(sys.argv[1])

def action():
    if rank() == 0:
        time.sleep(0.5)
        file.write_text("made")
    return file.read_text()

with ranks():
    assert first_rank_first(action) == "made"
    file.with_name(f"rank{rank()}of{world_size()}").touch()
"""
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run([*run, str(tmp_path / "made.txt")], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0of2", "rank1of2"]


def test_ranks_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RunError, match=r"the 2 ranks \(WORLD_SIZE\) cannot meet: .*RANK"), ranks():
        pass
