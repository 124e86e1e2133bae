"""On a real SLURM of three virtual nodes: all stages, time limits, preemption, dead nodes, and refused jobs."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_launch import options_of

import small_runs as runs
from processes import finished, torchrun
from slurm_cluster import Cluster, ClusterError, alive
from videoadapt.commands.launch import jobs_of, sbatch_line, sbatch_options, submit
from videoadapt.config.load import Config, dump_config, load_config
from videoadapt.model.checkpoint import train_checkpoints

pytestmark = pytest.mark.slurm

FILES = Path(__file__).parents[2] / "slurm"
LONG = {"epochs": 12, "save_steps": 0}  # 60 steps take seconds: long enough for something to happen in between
STEPS = 60
ENDLESS = {"epochs": 400, "save_steps": 2}  # runs until the test cancels it
VIDEOS = 2000  # take seconds to index
SMALL = ("--cpus-per-task=1", "--gpus-per-task=1")


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
        path = Path(f"{config.run.dir}-{job}.log")
        return path.read_text() if path.exists() else ""

    def state(self, job: str) -> str:
        return self.cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait(self, job: str, timeout_s: float = 240.0) -> str:
        """Waits for the end of a job; returns its last state. A requeued job starts at once, not after two minutes."""

        def ended() -> bool:
            state = self.state(job)
            if state == "PENDING":
                try:
                    self.cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now")
                except ClusterError:  # it has just started, or SLURM is cleaning up
                    pass
            return state not in {"PENDING", "RUNNING", "COMPLETING", "NODE_FAIL", "REQUEUED"}

        wait_until(ended, timeout_s, lambda: f"job {job} to end; it is {self.state(job)}")
        return self.state(job)

    def wait_for_step(self, config: Config, step: int) -> None:
        metrics = config.run.dir / "metrics.jsonl"
        wait_until(
            lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step, 90, lambda: f"step {step}"
        )


def wait_until(done: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what()}"
        time.sleep(0.2)


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


def assert_equals_never_stopped(config: Config, expected: dict[str, torch.Tensor]) -> None:
    tensors = final_tensors(config)
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_launch_runs_all_stages_to_a_finished_evaluation(slurm: Slurm) -> None:
    config = slurm.config("chain", slurm={"nodes": 3, "cpus_per_task": 1}, launch={"shards": 2}, train={"epochs": 1})
    done = runs.command("launch", slurm.file(config), "launch.stage=all", "--json")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)["jobs"]
    assert [job["stage"] for job in jobs] == ["train", "label", "label", "assign", "evaluate", "evaluate"]
    assert slurm.wait(jobs[-1]["id"], 480) == "COMPLETED"  # seven jobs, one after the other
    assert json.loads((config.run.dir / "evaluate" / "evaluate.json").read_text())["scored"] == 12
    assert Path(jobs[0]["log"]).exists()
    for job, submission in zip(jobs_of(load_config(slurm.file(config))), jobs, strict=True):
        (script,) = (config.run.dir / "jobs" / submission["id"]).glob("*submission.sh")
        options = options_of(script.read_text())
        expected = {name: value for name, value in sbatch_options(job, config).items() if name != "array"}
        assert {name: options[name] for name in expected} == expected


def task(job: str, rank: int) -> int:
    """Returns the process id of a rank. Its data workers have the same command line, but a rank as their parent."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            variables = (folder / "environ").read_text().split("\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
        if words[1:4] == ["-m", "videoadapt", "train"] and wanted <= set(variables):
            parents[int(folder.name)] = parent
    [rank_process] = [process for process, parent in parents.items() if parent not in parents]
    return rank_process


@pytest.mark.parametrize("warned", ["all", "one rank"])
def test_a_job_near_its_time_limit_is_requeued_and_gives_the_same_result(
    slurm: Slurm, never_stopped: dict[str, torch.Tensor], warned: str
) -> None:
    # With workers, processes without a handler of their own get the signal too. One rank is warned without them.
    config = slurm.config(f"warned_{warned[:3]}", train=LONG, data={"workers": int(warned == "all")})
    job = slurm.sbatch("train", config, "--nodes=2")
    slurm.wait_for_step(config, 3)
    if warned == "all":
        slurm.cluster.run("scancel", "--signal=USR2", job)
    else:
        os.kill(task(job, 1), signal.SIGUSR2)
    assert slurm.wait(job) == "COMPLETED", slurm.log(config, job)
    assert "saved and requeued (restart 1)" in slurm.log(config, job)
    assert "continuing from" in slurm.log(config, job)
    assert_equals_never_stopped(config, never_stopped)


@pytest.mark.parametrize(
    ("number", "message"), [("USR2", "saved and requeued"), ("TERM", "saved, waiting for the end")]
)
def test_a_job_that_is_interrupted_while_it_indexes_continues_there(slurm: Slurm, number: str, message: str) -> None:
    many = slurm.folder / f"many_{number}"
    video = next((slurm.data / "val").glob("*.mp4"))
    many.mkdir()
    for copy in range(VIDEOS):  # links: one file of a few kB
        os.link(video, many / f"{copy}.mp4")
    (many / "val.csv").write_text("".join(f"{many}/{copy}.mp4 0\n" for copy in range(VIDEOS)))
    data = {"val": {"annotations": str(many / "val.csv")}}
    config = slurm.config(f"indexing_{number}", data=data, train={"epochs": 1})
    job, cache = slurm.sbatch("train", config, "--nodes=2"), config.run.dir / "probed.jsonl"
    wait_until(lambda: cache.exists() and cache.read_text().count("\n") > 100, 60, lambda: "the first hundred videos")
    slurm.cluster.run("scancel", f"--signal={number}", job)
    wait_until(lambda: message in slurm.log(config, job), 30, lambda: "the end of indexing")
    assert not (config.run.dir / "manifest.parquet").exists()
    if number == "TERM":
        assert slurm.state(job) == "RUNNING"
        slurm.cluster.run("scontrol", "requeue", job)  # as preemption ends
    assert slurm.wait(job) == "COMPLETED", slurm.log(config, job)
    probed = [json.loads(line)["stamp"] for line in cache.read_text().splitlines() if line]
    assert len(probed) == len(set(probed)) == VIDEOS + 48  # no file was probed twice
    assert "Traceback" not in slurm.log(config, job)


def test_a_preempted_job_waits_for_its_end_and_continues(slurm: Slurm, never_stopped: dict[str, torch.Tensor]) -> None:
    config = slurm.config("preempted", train=LONG, data={"workers": 1})
    job = slurm.sbatch("train", config, "--nodes=2")
    slurm.wait_for_step(config, 3)
    slurm.cluster.run("scancel", "--signal=TERM", job)
    wait_until(lambda: "saved, waiting for the end" in slurm.log(config, job), 30, lambda: "the save")
    time.sleep(7)  # longer than ranks wait for a dead rank
    assert slurm.state(job) == "RUNNING"
    slurm.cluster.run("scontrol", "requeue", job)  # as SLURM does after preemption
    assert slurm.wait(job) == "COMPLETED", slurm.log(config, job)
    assert_equals_never_stopped(config, never_stopped)


def test_a_job_without_restarts_left_fails(slurm: Slurm) -> None:
    config = slurm.config("worn_out", train=LONG, slurm={"max_restarts": 0})
    job = slurm.sbatch("train", config, "--nodes=2")
    slurm.wait_for_step(config, 3)
    slurm.cluster.run("scancel", "--signal=USR2", job)
    assert slurm.wait(job) == "FAILED"
    assert f"job {job} was restarted 0 times, and slurm.max_restarts is 0" in slurm.log(config, job)
    assert 3 <= steps(config) < STEPS


def test_a_second_run_in_the_same_folder_is_refused(slurm: Slurm) -> None:
    config = slurm.config("twice", train=ENDLESS)
    first = slurm.sbatch("train", config)
    slurm.wait_for_step(config, 1)
    second = slurm.sbatch("train", config)
    assert slurm.wait(second, 60) == "FAILED"
    assert f"is in use by job {first}, restart 0" in slurm.log(config, second)
    slurm.cluster.run("scancel", first)


def test_a_process_of_a_job_that_srun_did_not_start_is_refused(slurm: Slurm) -> None:
    config = slurm.config("world")
    path = slurm.folder / "alone.sh"
    path.write_text(f"#!/bin/sh\nvideoadapt train {slurm.file(config)}\n")  # no srun
    job = slurm.cluster.run("sbatch", "--parsable", f"--output={config.run.dir}-%j.log", "-n3", str(path)).strip()
    assert slurm.wait(job, 60) == "FAILED"
    assert f"job {job} has 3 tasks, but this process was not started by srun" in slurm.log(config, job)


def test_the_death_of_a_node_does_not_change_the_result(slurm: Slurm, never_stopped: dict[str, torch.Tensor]) -> None:
    config = slurm.config("killed", train=LONG | {"save_steps": 2})
    job = slurm.sbatch("train", config, "--nodelist=127.0.0.[2-3]", "--nodes=2")
    slurm.wait_for_step(config, 5)
    slurm.cluster.kill_node("127.0.0.2")
    wait_until(lambda: slurm.state(job) not in {"RUNNING", "COMPLETING"}, 60, lambda: "SLURM to notice the dead node")
    slurm.cluster.run("scontrol", "update", f"jobid={job}", "ReqNodeList=")
    assert slurm.wait(job) == "COMPLETED", slurm.log(config, job)
    slurm.cluster.revive_node("127.0.0.2")
    assert_equals_never_stopped(config, never_stopped)


def test_processes_of_an_earlier_start_cannot_write_any_more(slurm: Slurm) -> None:
    config = slurm.config(
        "fenced",
        train=ENDLESS,
        slurm={"cpus_per_task": 1, "exclude": "127.0.0.[1-2]"},
        launch={"stage": "train"},
    )
    (handle,) = submit(jobs_of(config)[0], config)
    slurm.wait_for_step(config, 3)
    old = json.loads((config.run.dir / "train.owner").read_text())["pid"]
    slurm.cluster.kill_node("127.0.0.3", spare=old)
    slurm.cluster.run(
        "scontrol", "update", "nodename=127.0.0.3", "state=down", "reason=lost"
    )  # SLURM itself takes 10 s
    job = handle.job_id
    wait_until(lambda: slurm.state(job) == "PENDING", 60, lambda: "the job to be requeued")
    assert alive(old)
    slurm.cluster.run("scontrol", "update", f"jobid={job}", "ExcNodeList=", "StartTime=now")
    wait_until(lambda: not alive(old), 60, lambda: "the old start to end")
    errors = handle.paths.stderr.read_text(errors="replace")
    assert f"the owner is now job {job}, restart 1, process" in errors
    assert f"this process (job {job}, restart 0, process {old} on" in errors
    before = steps(config)
    wait_until(lambda: steps(config) > before, 30, lambda: "the new start to continue")
    slurm.cluster.run("scancel", job)
    slurm.cluster.revive_node("127.0.0.3")


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
    config = slurm.config("dead_rank")
    program = slurm.folder / "failing.py"
    program.write_text(FAILING)
    line = f"srun --kill-on-bad-exit=1 {sys.executable} {program} {slurm.file(config)}"
    log = f"--output={config.run.dir}-%j.log"
    job = slurm.cluster.run("sbatch", "--parsable", log, "--nodes=2", "--ntasks-per-node=1", "--wrap", line).strip()
    wait_until(lambda: "the first cause" in slurm.log(config, job), 60, lambda: "the failure")
    failed_at = time.monotonic()
    assert slurm.wait(job, 30) == "FAILED"
    assert time.monotonic() - failed_at < 15
    assert slurm.log(config, job).count("Traceback") == 1


def test_handles_know_the_state_of_jobs_without_sacct(slurm: Slurm) -> None:
    config = slurm.config("cancelled", train=ENDLESS, launch={"stage": "train"})
    (handle,) = submit(jobs_of(config)[0], config)
    slurm.wait_for_step(config, 1)
    assert handle.get_info(mode="force")["State"] == "RUNNING"
    handle.cancel()
    slurm.wait(handle.job_id)
    assert handle.get_info(mode="force")["State"] == "CANCELLED"
    assert handle.done(force_check=True)


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_printed_line_asks_for_what_launch_asks_for(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    config = slurm.config(f"line_{gpus}", slurm={"cpus_per_task": 1, "gpus_per_task": gpus, "nodes": 2})
    line = sbatch_line(jobs_of(config)[0], config, [str(slurm.file(config))], None)
    monkeypatch.chdir(FILES.parent)  # the line names the file from there
    command, *words = shlex.split(line)
    printed = slurm.cluster.run(command, "--parsable", "--hold", *words).strip()
    (handle,) = submit(jobs_of(config)[0], config)
    shown = [slurm.cluster.run("scontrol", "show", "job", job) for job in (printed, handle.job_id)]
    slurm.cluster.run("scancel", printed, handle.job_id)
    assert [re.search(r"gres[:/]gpu[:=]1", text) is not None for text in shown] == [gpus == 1] * 2
    for option in (r"NumNodes=\S+", r"NumTasks=\d+", r"CPUs/Task=\d+", r"TimeLimit=\S+", r"Requeue=\d"):
        first, second = (re.search(option, text) for text in shown)
        assert first
        assert second
        assert first[0] == second[0]


def test_the_jobs_before_a_refused_one_are_cancelled(slurm: Slurm) -> None:
    config = slurm.config("half_way", launch={"shards": 2000})  # more than MaxArraySize
    done = runs.command("launch", slurm.file(config), "launch.stage=all")
    assert done.returncode == 1
    assert "label cannot be submitted: " in done.stderr
    cancelled = re.search(r"cancelled, because the chain cannot be completed: train (\d+)\n", done.stderr)
    assert cancelled
    assert slurm.wait(cancelled[1], 30) == "CANCELLED"


def test_a_local_launch_inside_a_job_starts_its_own_ranks(slurm: Slurm) -> None:
    config = slurm.config(
        "inside",
        train={"epochs": 1},
        launch={"cluster": "local", "stage": "train"},
        slurm={"tasks_per_node": 2, "gpus_per_task": 0},
    )
    # srun waits for the launch, which waits for its ranks.
    line = ("srun", "--ntasks=1", "--cpus-per-task=2", "videoadapt", "launch", str(slurm.file(config)))
    slurm.cluster.run(*line, timeout_s=240)
    assert (config.run.dir / "train.json").exists()
    assert json.loads((config.run.dir / "train.owner").read_text() or "null") is None
