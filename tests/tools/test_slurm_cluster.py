"""`tools/slurm_cluster.py`: jobs run on its nodes, and it starts and stops its daemons."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import slurm_cluster
from slurm_cluster import Cluster, ClusterError


@pytest.mark.slurm
def test_a_job_runs_on_every_node_with_its_fake_gpus(cluster: Cluster) -> None:
    output = cluster.run(
        "srun",
        "--nodes=3",
        "--ntasks=3",
        "--gpus-per-task=2",
        "sh",
        "-c",
        "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES",
    )
    assert sorted(output.split("\n")) == ["", "127.0.0.1 0,1", "127.0.0.2 0,1", "127.0.0.3 0,1"]


@pytest.mark.slurm
def test_a_second_cluster_in_one_folder_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="a cluster already runs there"):
        Cluster(cluster.folder).start()
    assert cluster.run("sinfo", "--noheader", "--format=%D").split() == ["3"]


@pytest.mark.slurm
def test_start_status_stop(cluster: Cluster, tmp_path: Path) -> None:
    def tool(*words: str) -> str:
        line = [sys.executable, slurm_cluster.__file__, *words]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=90).stdout

    assert tool("start", str(tmp_path), "--nodes=1") == f"export SLURM_CONF={tmp_path}/slurm.conf\n"
    lines = tool("status", str(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == ["slurmctld", "127.0.0.1"]
    assert all(line.endswith("runs") for line in lines)
    second = Cluster(tmp_path)
    pids = second.daemons().values()
    started = time.monotonic()
    tool("stop", str(tmp_path))
    assert time.monotonic() - started < 10
    assert not any(map(slurm_cluster.alive, pids))
    assert second.daemons() == {}


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_cluster, "missing", lambda: ["slurmctld", "srun"])
    with pytest.raises(ClusterError, match="not installed: slurmctld, srun; apt-get install slurmctld slurmd"):
        Cluster(tmp_path).start()
    assert not any(tmp_path.iterdir())
