"""On a real SLURM of three virtual nodes: all stages, time limits, preemption, dead nodes, and refused jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_launch import options_of

import small_runs as runs
from processes import finished, torchrun
from slurm_cluster import Cluster, ClusterError, alive
from videoadapt.commands.launch import jobs_of, sbatch_options, submit
from videoadapt.config.load import Config, dump_config, make_config
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.runtime.ranks import gpu_index

pytestmark = pytest.mark.slurm

# Most of the time of these tests is the start of processes, which import torch. So a test interrupts its job in several
# ways, one after the other.
FILES = Path(__file__).parents[2] / "slurm"
LONG = {"epochs": 16, "save_steps": 10, "validate_every": 0}  # long enough for something to happen in between
STEPS = 80
ENDLESS = {"epochs": 4000, "save_steps": 2, "validate_every": 0}  # runs until the test ends it
VIDEOS = 2000  # take seconds to index
SMALL = ("--cpus-per-task=1",)
REST_S = 6.0  # longer than ranks wait for a dead rank


class Slurm:
    """Submits small runs and observes their jobs."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.data = runs.make_data(folder / "data")

    def config(self, name: str, **sections: dict) -> Config:
        """Writes the config of a new run; its file is next to the run folder."""
        sections = {"slurm": {"cpus_per_task": 1}, **sections}
        sections["parallel"] = {"groups": "auto"} | sections.get("parallel", {})  # each rank has lengths of its own
        config = runs.config(self.data, self.folder / name, **sections)
        self.file(config).write_text(dump_config(config))
        return config

    def file(self, config: Config) -> Path:
        return config.run.dir.with_suffix(".yaml")

    def sbatch(self, stage: str, config: Config, *options: str) -> str:
        """Submits `slurm/STAGE.sbatch`; returns the id of the job."""
        log = f"--output={config.run.dir}-%j.log"
        script = str(FILES / f"{stage}.sbatch")
        return self.cluster.run("sbatch", "--parsable", log, *SMALL, *options, script, str(self.file(config))).strip()

    def log(self, config: Config, job: str) -> str:
        """The logs of all ranks of a job."""
        paths = [Path(f"{config.run.dir}-{job}.log"), *sorted((config.run.dir / "jobs").glob(f"{job}_*_log.out"))]
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def state(self, job: str) -> str:
        return self.cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait(self, job: str, timeout_s: float = 240.0) -> str:
        """Waits for the end of a job; returns its last state. A requeued job starts at once, not after two minutes."""

        def ended() -> bool:
            state = self.state(job)
            if state == "PENDING":
                self.start_now(job)
            return state not in {"PENDING", "RUNNING", "COMPLETING", "NODE_FAIL", "REQUEUED"}

        wait_until(ended, timeout_s, lambda: f"job {job} to end; it is {self.state(job)}")
        return self.state(job)

    def start_now(self, job: str, *changes: str) -> None:
        try:
            self.cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now", *changes)
        except ClusterError:  # it has just started, or SLURM is cleaning up
            pass

    def wait_for_log(self, config: Config, job: str, message: str) -> None:
        wait_until(lambda: message in self.log(config, job), 60, lambda: f"{message}: {self.log(config, job)}")

    def wait_for_restart(self, job: str, *changes: str) -> None:
        wait_until(lambda: self.state(job) == "PENDING", 60, lambda: "the job to be requeued")

        def started() -> bool:
            self.start_now(job, *changes)
            return self.state(job) == "RUNNING"

        wait_until(started, 60, lambda: f"{job} to start again")

    def wait_for_steps(self, config: Config, more: int) -> None:
        """Waits until a run has made some more steps than now."""
        metrics = config.run.dir / "metrics.jsonl"

        def made() -> int:
            return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

        goal = made() + more
        wait_until(lambda: made() >= goal, 120, lambda: f"step {goal} of {config.run.dir}", every_s=0.05)


def wait_until(done: Callable[[], bool], timeout_s: float, what: Callable[[], str], every_s: float = 0.3) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what()}"
        time.sleep(every_s)


@pytest.fixture(scope="module")
def slurm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("jobs")
    command = folder / "bin" / "videoadapt"  # with this interpreter, whatever is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m videoadapt "$@"\n')
    command.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(FILES.parent))
        patch.setenv("SLURM_CONF", str(cluster.conf))
        yield Slurm(cluster, folder)


@pytest.fixture(scope="module")
def never_stopped(slurm: Slurm) -> dict[str, torch.Tensor]:
    """The final tensors of an uninterrupted run of two ranks of torchrun. SLURM's jobs must give the same bits."""
    config = slurm.config("never_stopped", train=LONG)
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = finished(torchrun(2, "-m", "videoadapt", "train", slurm.file(config)), env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads((config.run.dir / "train.json").read_text())["steps"] == steps(config)
    return final_tensors(config)


def steps(config: Config) -> int:
    found = train_checkpoints(config.run.dir).latest()
    assert found
    step: int = found.meta["step"]
    return step


def final_tensors(config: Config) -> dict[str, torch.Tensor]:
    found = train_checkpoints(config.run.dir).latest()
    assert found
    assert found.meta["step"] == STEPS
    return found.tensors


def task(job: str, rank: int) -> int:
    """Returns the process id of a rank.

    Its data workers have the same environment. They are its children, or orphans that are about to end.
    """
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_text().split("\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            started_by = Path("/proc", parent, "comm").read_text().strip()
        except OSError:  # the process has ended
            continue
        if wanted <= set(variables) and started_by == "slurmstepd":
            found.append(int(folder.name))
    [rank_process] = found
    return rank_process


def test_a_chain_survives_warnings_preemption_and_a_dead_node(
    slurm: Slurm, never_stopped: dict[str, torch.Tensor]
) -> None:
    """All stages, with arrays. The training is interrupted three times, and ends with the bits of one that was not."""
    nodes = {"stages": {"train": {"nodes": 2, "extra": {"nodelist": "127.0.0.[2-3]"}}}}
    # With workers, processes without a handler of their own get the signals too.
    config = slurm.config(
        "chain", slurm={"cpus_per_task": 1} | nodes, launch={"shards": 2}, train=LONG, data={"workers": 1}
    )
    done = runs.command("launch", slurm.file(config), "launch.stage=all", "--json")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)["jobs"]
    assert [job["stage"] for job in jobs] == ["train", "label", "label", "assign", "evaluate", "evaluate"]
    job = jobs[0]["id"]

    slurm.wait_for_steps(config, 3)
    os.kill(task(job, 1), signal.SIGUSR2)  # as before the time limit; the other rank is not warned
    slurm.wait_for_log(config, job, "saved and requeued (restart 1)")
    slurm.wait_for_restart(job)

    slurm.wait_for_steps(config, 3)
    slurm.cluster.run("scancel", "--signal=TERM", job)  # preemption
    slurm.wait_for_log(config, job, "saved, waiting for the end")
    time.sleep(REST_S)
    assert slurm.state(job) == "RUNNING"
    slurm.cluster.run("scontrol", "requeue", job)  # as SLURM does after preemption
    slurm.wait_for_restart(job)

    slurm.wait_for_steps(config, 3)
    slurm.cluster.kill_node("127.0.0.2")
    slurm.cluster.run("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=lost")  # or 10 s later
    slurm.wait_for_restart(job, "ReqNodeList=")
    slurm.cluster.revive_node("127.0.0.2")

    assert slurm.wait(jobs[-1]["id"], 480) == "COMPLETED", slurm.log(config, job)
    assert slurm.log(config, job).count("continuing from") == 3
    tensors = final_tensors(config)
    assert tensors.keys() == never_stopped.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], never_stopped[name])] == []
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert json.loads((config.run.dir / "evaluate" / "evaluate.json").read_text())["scored"] == 12
    assert Path(jobs[0]["log"]).exists()


def test_a_job_that_is_interrupted_while_it_indexes_continues_there(slurm: Slurm) -> None:
    many = slurm.folder / "many"
    video = next((slurm.data / "val").glob("*.mp4"))
    many.mkdir()
    for copy in range(VIDEOS):  # links: one file of a few kB
        os.link(video, many / f"{copy}.mp4")
    (many / "val.csv").write_text("".join(f"{many}/{copy}.mp4 0\n" for copy in range(VIDEOS)))
    data = {"val": {"annotations": str(many / "val.csv")}}
    config = slurm.config("indexing", data=data, train={"epochs": 1, "validate_every": 0})
    job, cache = slurm.sbatch("train", config, "--nodes=2"), config.run.dir / "probed.jsonl"

    wait_until(lambda: cache.exists() and cache.read_bytes().count(b"\n") > 100, 90, lambda: "videos", 0.02)
    slurm.cluster.run("scancel", "--signal=USR2", job)
    slurm.wait_for_log(config, job, "saved and requeued")
    assert not (config.run.dir / "manifest.parquet").exists()
    slurm.wait_for_restart(job)
    assert slurm.wait(job) == "COMPLETED", slurm.log(config, job)
    probed = [json.loads(line)["stamp"] for line in cache.read_text().splitlines() if line]
    assert len(probed) == len(set(probed)) == VIDEOS + 48  # no file was probed twice
    assert "Traceback" not in slurm.log(config, job)


def test_a_run_has_one_owner_and_a_number_of_restarts(slurm: Slurm) -> None:
    """A second run is refused; a start that SLURM has lost can not write any more; the last start fails."""
    options = {"cpus_per_task": 1, "exclude": "127.0.0.[1-2]", "max_restarts": 1}
    config = slurm.config("owned", train=ENDLESS, slurm=options, launch={"stage": "train"})
    (handle,) = submit(jobs_of(config)[0], config)
    job = handle.job_id
    slurm.wait_for_steps(config, 3)
    assert handle.get_info(mode="force")["State"] == "RUNNING"

    second = slurm.sbatch("train", config)
    assert slurm.wait(second, 120) == "FAILED"
    assert f"is in use by job {job}, restart 0" in slurm.log(config, second)

    old = json.loads((config.run.dir / "train.owner").read_text())["pid"]
    slurm.cluster.kill_node("127.0.0.3", spare=old)
    slurm.cluster.run("scontrol", "update", "nodename=127.0.0.3", "state=down", "reason=lost")  # or 10 s later
    wait_until(lambda: slurm.state(job) == "PENDING", 60, lambda: "the job to be requeued")
    assert alive(old)
    slurm.start_now(job, "ExcNodeList=")
    wait_until(lambda: not alive(old), 90, lambda: "the old start to end")
    errors = slurm.log(config, job)
    assert f"the owner is now job {job}, restart 1, process" in errors
    assert f"this process (job {job}, restart 0, process {old} on" in errors
    slurm.cluster.revive_node("127.0.0.3")

    before = steps(config)
    wait_until(lambda: steps(config) > before, 60, lambda: "the new start to continue")
    slurm.cluster.run("scancel", "--signal=USR2", job)
    assert slurm.wait(job) == "FAILED"
    assert f"job {job} was restarted 1 time, and slurm.max_restarts is 1" in slurm.log(config, job)
    assert steps(config) > before
    assert handle.get_info(mode="force")["State"] == "FAILED"
    assert handle.done(force_check=True)


FAILING = """
import sys
from videoadapt.config.load import load_config
from videoadapt.runtime.ranks import rank, ranks, wait_for_all

with ranks(load_config(sys.argv[1])):
    wait_for_all()
    if rank() == 1:
        raise ValueError("the first cause")
    wait_for_all()
"""


def test_a_failed_rank_ends_the_job_in_seconds_with_one_traceback(slurm: Slurm) -> None:
    """Before it, a process that srun did not start is refused."""
    config = slurm.config("dead_rank")
    program = slurm.folder / "failing.py"
    program.write_text(FAILING)
    run = f"{sys.executable} {program} {slurm.file(config)}"
    line = f"{run} 2>&1 | tail -n 1; srun --kill-on-bad-exit=1 {run}"
    log = f"--output={config.run.dir}-%j.log"
    job = slurm.cluster.run("sbatch", "--parsable", log, "--nodes=2", "--ntasks-per-node=1", "--wrap", line).strip()
    slurm.wait_for_log(config, job, f"job {job} has 2 tasks, but this process was not started by srun")
    slurm.wait_for_log(config, job, "the first cause")
    failed_at = time.monotonic()
    assert slurm.wait(job, 30) == "FAILED"
    assert time.monotonic() - failed_at < 15
    assert slurm.log(config, job).count("Traceback") == 1


EVERYTHING = {
    "account": "vision",
    "reservation": "course",
    "wckey": "thesis",
    "licenses": "matlab:2",
    "mail": "me@example.org",
    "comment": "two words",
    "time_minutes": "1-00:30",
    "tasks_per_node": 4,
    "gres": "gpu:a100:4",
    "gpu_bind": "single:1",
}


@pytest.fixture(scope="module")
def course(slurm: Slurm) -> Iterator[None]:
    with slurm.cluster.reserved("course", "127.0.0.3"):
        yield


@pytest.mark.usefixtures("course")
@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (
            EVERYTHING,
            {
                "Account": "vision",
                "Reservation": "course",
                "WCKey": "thesis",
                "Licenses": "matlab:2",
                "MailUser": "me@example.org",
                "MailType": "END,FAIL",
                "TimeLimit": "1-00:30:00",
                "NumTasks": "4",
                "TresPerNode": "gres:gpu:a100:4",
                "TresBind": "gpu:single:1",
            },
        ),
        ({"gpus_per_node": "a100:2", "tasks_per_node": 2}, {"TresPerNode": "gres:gpu:a100:2", "NumTasks": "2"}),
        ({"nodes": 2}, {"TresPerNode": "gres:gpu:1", "TresBind": None, "NumNodes": "2-2", "WCKey": "*"}),
        ({"gpus_per_task": 1}, {"TresPerTask": "gres:gpu:1"}),
        ({"gpus_per_task": 0}, {"TresPerTask": None, "TresPerNode": None, "TimeLimit": "1-00:00:00"}),
    ],
)
def test_a_dry_run_equals_what_slurm_shows_of_the_job(
    slurm: Slurm, asked: dict[str, Any], shown: dict[str, str | None]
) -> None:
    options = {"cpus_per_task": 1, "extra": {"hold": True}} | asked
    config = slurm.config(f"dry_{len(asked)}_{len(shown)}", slurm=options, launch={"stage": "train"})
    [planned] = json.loads(runs.command("launch", slurm.file(config), "--dry-run", "--json").stdout)["jobs"]
    assert not config.run.dir.exists()
    [launched] = json.loads(runs.command("launch", slurm.file(config), "--json").stdout)["jobs"]
    by_hand = subprocess.run(
        ["bash", "-c", planned["sbatch"]], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    jobs = [slurm.cluster.run("scontrol", "show", "job", job) for job in (launched["id"], by_hand)]
    script = slurm.cluster.run("scontrol", "write", "batch_script", launched["id"], "-")
    slurm.cluster.run("scancel", launched["id"], by_hand)
    assert script.rstrip("\0\n") == planned["script"].rstrip()
    assert options_of(script) == planned["options"]
    for job, text in zip((launched["id"], by_hand), jobs, strict=True):
        fields: dict[str, str | None] = dict(re.findall(r"([A-Z][\w/]+)=(\S*)", text))
        assert {name: fields.get(name) for name in shown} == shown
        assert fields["JobName"] == planned["options"]["job-name"]
        assert fields["CPUs/Task"] == planned["options"]["cpus-per-task"]
        assert fields["NumNodes"] == "-".join([planned["options"]["nodes"]] * 2)  # from, to
        assert fields["StdOut"] == planned["log"].replace("%j", job)
        assert fields["Requeue"] == "1"


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"gpus_per_task": 1},
        {"gpus_per_node": "a100:2"},
        {"gres": "gpu:a100:2"},
        {"gres": "gpu:2", "gpu_bind": "single:1"},
    ],
)
def test_each_rank_has_a_gpu_of_its_own(slurm: Slurm, asked: dict[str, str]) -> None:
    config = make_config({"slurm": {"tasks_per_node": 2, "cpus_per_task": 1} | asked, "launch": {"stage": "train"}})
    options = sbatch_options(jobs_of(config)[0], config)
    flags = [f"--{name}={options[name]}" for name in options if re.match("nodes|ntasks|cpus|gpu|gres", name)]
    output = slurm.cluster.run("srun", *flags, "sh", "-c", "echo $SLURM_LOCALID $CUDA_VISIBLE_DEVICES")
    used = set()
    for local_rank, visible in map(str.split, output.splitlines()):
        gpus = visible.split(",")
        index = gpu_index(int(local_rank), len(gpus))
        assert index is not None
        used.add(gpus[index])
    assert len(used) == 2


def test_the_jobs_before_a_refused_one_are_cancelled(slurm: Slurm) -> None:
    # More jobs than MaxArraySize. The first job is held, so that no process starts.
    config = slurm.config("half_way", launch={"shards": 2000}, slurm={"cpus_per_task": 1, "extra": {"hold": True}})
    done = runs.command("launch", slurm.file(config), "launch.stage=all")
    assert done.returncode == 1
    assert "label cannot be submitted: " in done.stderr
    cancelled = re.search(r"cancelled, because the chain cannot be completed: train (\d+)\n", done.stderr)
    assert cancelled
    assert slurm.wait(cancelled[1], 30) == "CANCELLED"


def test_a_local_launch_inside_a_job_starts_its_own_ranks(slurm: Slurm) -> None:
    config = slurm.config(
        "inside",
        train={"epochs": 1, "validate_every": 0},
        launch={"cluster": "local", "stage": "train"},
        slurm={"tasks_per_node": 2, "gpus_per_task": 0},
    )
    # srun waits for the launch, which waits for its ranks.
    line = ("srun", "--ntasks=1", "--cpus-per-task=2", "videoadapt", "launch", str(slurm.file(config)))
    slurm.cluster.run(*line, timeout_s=240)
    assert (config.run.dir / "train.json").exists()
    assert json.loads((config.run.dir / "train.owner").read_text() or "null") is None
