"""Leases: one writer in a run folder, which owners are replaced, and which processes cannot write any more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs as runs
from videoadapt.config.load import make_config
from videoadapt.errors import RunError, UserError
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.routing.label import label
from videoadapt.routing.scores import score, score_split
from videoadapt.runtime import lease as module
from videoadapt.runtime.files import replacing
from videoadapt.runtime.lease import Lease, Owner, sole_writer
from videoadapt.training.train import train


def write_owner(folder: Path, owner: Owner) -> None:
    (folder / "train.owner").write_text(json.dumps(asdict(owner)))


def another_process() -> Owner:
    """A process that is running: the parent of this one."""
    pid = os.getppid()
    return replace(Owner.this_process(), pid=pid, born=module._start_time(pid))


ELSEWHERE = Owner(host="node7", machine="another", pid=1, born="1", job=None, restarts=0)


def test_a_lease_is_released(tmp_path: Path) -> None:
    for _ in range(2):
        with Lease.acquire(tmp_path, "train") as lease, lease.lock():
            assert json.loads((tmp_path / "train.owner").read_text())["pid"] == os.getpid()
        assert (tmp_path / "train.owner").read_text() == ""


def test_a_call_that_fails_leaves_no_owner_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "label.owner").touch()  # of an earlier call
    for stage, left in (("evaluate", ["label.owner"]), ("label", ["label.owner"])):
        with pytest.raises(UserError), Lease.acquire(tmp_path, stage):
            raise UserError("no video")
        assert os.listdir(tmp_path) == left
    with pytest.raises(UserError), Lease.acquire(tmp_path / "new" / "run", "train") as lease:
        (lease.path.parent / "kept").touch()
        raise UserError("no video")
    assert os.listdir(tmp_path / "new" / "run") == ["kept"]


def test_a_second_run_is_an_immediate_error_that_names_the_owner(tmp_path: Path) -> None:
    write_owner(tmp_path, another_process())
    started = time.monotonic()
    with pytest.raises(RunError, match=rf"in use by process {os.getppid()} on .*; wait until it ends, cancel it"):
        Lease.acquire(tmp_path, "train").__enter__()
    assert time.monotonic() - started < 5
    with Lease.acquire(tmp_path, "label"):  # of another stage
        pass


def test_a_killed_process_is_replaced(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from typing import Any
from videoadapt.runtime.lease import Lease
with Lease.acquire(Path({str(tmp_path)!r}), "train"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert (tmp_path / "train.owner").read_text()
    with Lease.acquire(tmp_path, "train"):
        pass


def test_another_process_with_the_id_of_the_owner_is_not_the_owner(tmp_path: Path) -> None:
    write_owner(tmp_path, replace(another_process(), born="1"))
    with Lease.acquire(tmp_path, "train"):
        pass


@pytest.mark.parametrize(
    ("states", "refusal"),
    [
        ({"5": "RUNNING|node7"}, r"in use by job 5, restart 0, process 1 on node7; wait until it ends[^.]*\.dir\.$"),
        (None, r"If it has certainly ended, delete .*train\.owner"),
        ({"5": "FAILED|node7"}, None),
        ({"5": "PENDING|"}, None),
        ({}, None),
    ],
)
def test_slurm_is_asked_about_a_job_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: dict[str, str] | None, refusal: str | None
) -> None:
    write_owner(tmp_path, replace(ELSEWHERE, job="5"))
    monkeypatch.setattr(module, "job_states", lambda _: states)
    if refusal:
        with pytest.raises(RunError, match=refusal):
            Lease.acquire(tmp_path, "train").__enter__()
    else:
        with Lease.acquire(tmp_path, "train"):
            pass


@pytest.mark.parametrize("there", [{"cluster": "b"}, {"cluster": "a", "job": "7"}], ids=["cluster", "own job"])
def test_slurm_does_not_know_the_end_of_another_clusters_job_or_of_a_process_of_this_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a")
    states = {"7": "RUNNING|node1"}
    monkeypatch.setattr(module, "job_states", lambda jobs: {job: states[job] for job in jobs if job in states})
    write_owner(tmp_path, replace(ELSEWHERE, **{"job": "5", **there}))  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"in use by job [57], .*If it has certainly ended, delete .*train\.owner"):
        Lease.acquire(tmp_path, "train").__enter__()


def test_a_process_from_before_the_machine_was_started_anew_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_installation_id", lambda: "one")
    now = another_process()
    before = replace(now, machine=f"boot {now.machine.partition(' ')[2]}")
    for owner in (replace(before, installation="two"), replace(before, host="other"), replace(before, machine="x y")):
        write_owner(tmp_path, owner)
        with pytest.raises(RunError, match="If it has certainly ended, delete"):
            Lease.acquire(tmp_path, "train").__enter__()
    write_owner(tmp_path, before)
    with Lease.acquire(tmp_path, "train"):
        pass


def test_a_process_on_another_machine_without_a_job_is_not_replaced(tmp_path: Path) -> None:
    write_owner(tmp_path, ELSEWHERE)
    with pytest.raises(RunError, match="If it has certainly ended, delete"):
        Lease.acquire(tmp_path, "train").__enter__()


def test_superseded_label_and_evaluate_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run", train={"epochs": 1})
    train(config)
    for stage, function, caller in (("label", label, label), ("evaluate", evaluate, score_split)):

        def superseded(*words: Any, stage: str = stage, **settings: Any) -> Any:
            (config.run.dir / f"{stage}.owner").write_text(json.dumps(asdict(ELSEWHERE)))
            return score(*words, **settings)

        monkeypatch.setattr(sys.modules[caller.__module__], "score", superseded)
        with pytest.raises(RunError, match=rf"{stage}\.owner: the owner is now process 1 on node7"):
            function(config)
        assert not list(config.run.dir.glob(f"{'labels' if stage == 'label' else stage}/*"))


def test_an_owner_file_cut_off_by_a_crash_has_no_owner(tmp_path: Path) -> None:
    (tmp_path / "train.owner").write_text('{"host": "no')
    with Lease.acquire(tmp_path, "train"):
        pass


def test_a_restarted_job_replaces_its_earlier_start_which_cannot_write_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with Lease.acquire(tmp_path, "train") as old:
        early = train_checkpoints(tmp_path, guard=old.lock)
        early.save(1, {"w": torch.zeros(1)}, {})
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with Lease.acquire(tmp_path, "train") as new:
            late = train_checkpoints(tmp_path, guard=new.lock)
            with pytest.raises(RunError, match=r"now job 5, restart 1, .* \(job 5, restart 0, .*\) was superseded"):
                early.save(2, {"w": torch.ones(1)}, {})
            late.save(3, {"w": torch.full((1,), 3.0)}, {})
            assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
                "step-00000001.safetensors",
                "step-00000003.safetensors",
            ]
            monkeypatch.delenv("SLURM_RESTART_COUNT")
            with pytest.raises(RunError, match="in use by job 5, restart 1"):  # the older one cannot come back
                Lease.acquire(tmp_path, "train").__enter__()


def test_the_owner_is_not_replaced_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_TIMEOUT_S", 0.2)
    with Lease.acquire(tmp_path, "train") as lease, lease.lock():
        with pytest.raises(RunError, match=r"train\.owner: another process has locked this file for 0\.2 s"):
            Lease.acquire(tmp_path, "train").__enter__()


def test_the_owner_removes_the_temporary_files_of_killed_writers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [".manifest.parquet", "checkpoints/.step-00000004.safetensors", "scores/label-1/.part-00000.npz"]
    abandoned = [tmp_path / f"{name}.abcd_123.tmp" for name in names]
    for path in abandoned:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    config = make_config({"run": {"dir": str(tmp_path)}})
    with replacing(tmp_path / "labels" / "label.json") as written:  # by another stage, which still runs
        with sole_writer(config, "train"):
            assert [path for path in abandoned if path.exists()] == []
        written.write_text("{}")
    assert (tmp_path / "labels" / "label.json").exists()
    assert "removed 3 temporary files of processes that were killed, such as" in capfd.readouterr().err
