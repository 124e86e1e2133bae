"""The jobs of each stage, the sbatch files that ask for the same, and all stages on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import small_runs as runs
from videoadapt.commands import launch as module
from videoadapt.commands.launch import (
    PASS_SIGNALS_ON,
    STAGES,
    Job,
    StageCall,
    jobs_of,
    launch,
    plan_launch,
    sbatch_command,
    sbatch_options,
)
from videoadapt.config.load import Config, dump_config, load_config, make_config
from videoadapt.errors import ConfigError, RunError, UserError
from videoadapt.model.checkpoint import train_checkpoints

FILES = Path(__file__).parents[2] / "slurm"


LISTS = {"train": {"annotations": "train.csv"}, "val": {"annotations": "val.csv"}}


def config_of(stage: str = "all", shards: int = 1, **slurm: object) -> Config:
    return make_config({"launch": {"stage": stage, "shards": shards}, "slurm": slurm, "data": LISTS})


def options_of(script: str) -> dict[str, str]:
    """Returns the options in the `#SBATCH` lines of a script."""
    words = (shlex.split(line)[1] for line in script.splitlines() if line[:7] == "#SBATCH")
    pairs = (word.removeprefix("--").partition("=") for word in words)
    return {option: value for option, _, value in pairs}


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120  # on a busy machine, the import of torch takes long
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def layout(jobs: list[Job]) -> list[tuple[str, int, int, int]]:
    return [(job.stage, job.options.nodes, job.options.tasks_per_node, job.shards) for job in jobs]


def test_all_is_the_stages_that_have_videos() -> None:
    jobs = jobs_of(config_of(nodes=2, tasks_per_node=8))
    assert layout(jobs) == [("train", 2, 8, 1), ("label", 2, 8, 1), ("assign", 1, 1, 1), ("evaluate", 2, 8, 1)]
    assert [job.ranks for job in jobs] == [16, 16, 1, 16]
    assert layout(jobs_of(config_of("evaluate"))) == [("evaluate", 1, 1, 1)]
    with_calibration = make_config({"data": {"calibrate": 0.1}, "launch": {"shards": 2}})
    assert [(job.stage, job.shards) for job in jobs_of(with_calibration)][-5:] == [
        ("assign", 1), ("calibrate", 2), ("calibrate", 1), ("evaluate", 2), ("evaluate", 1)
    ]  # fmt: skip
    for without in ({"label": {"source": "teacher"}}, {"model": {"points": ["14"]}}):
        assert [job.stage for job in jobs_of(make_config(without))] == ["train", "evaluate"]
    held_out = make_config({"label": {"source": "teacher"}, "data": {"holdout": 0.1}})
    assert [job.stage for job in jobs_of(held_out)] == ["train", "label", "assign", "evaluate"]


def test_shards_are_an_array_and_a_job_that_merges_them() -> None:
    jobs = jobs_of(config_of(shards=4, nodes=2, tasks_per_node=8))
    assert [(job.stage, job.ranks, job.shards) for job in jobs] == [
        ("train", 16, 1), ("label", 1, 4), ("label", 1, 1), ("assign", 1, 1), ("evaluate", 1, 4), ("evaluate", 1, 1)
    ]  # fmt: skip
    calls = [StageCall(jobs[1], config_of(shards=4), shard) for shard in range(4)]
    assert [call.values["parallel"]["shard"] for call in calls] == ["0/4", "1/4", "2/4", "3/4"]
    parallel = StageCall(jobs[0], config_of()).values["parallel"]
    assert (parallel["ranks"], parallel["shard"]) == (16, None)


# Values of every key that is passed to sbatch, with the options that must come of it.
GIVEN: dict[str, Any] = {
    "partition": "gpu",
    "account": "vision",
    "qos": "high",
    "reservation": "course",
    "wckey": "thesis",
    "constraint": "a100|h100",
    "exclude": "node[3-4]",
    "licenses": "matlab:2",
    "comment": "deadline of the 14th",
    "mail": "me@example.org",
    "mail_type": "end,REQUEUE",
    "time_minutes": "1-00:30",
    "tasks_per_node": 4,
    "gres": "gpu:a100:4,lscratch:10",
    "gpu_bind": "single:1",
    "mem_gb": 200,
    "extra": {"nice": 0, "exclusive": True, "mem_per_gpu": "32G", "contiguous": False},
    "signal_s": 300,
}
EXPECTED = {key: GIVEN[key] for key in list(GIVEN)[:9]} | {
    "mail-user": "me@example.org",
    "mail-type": "END,REQUEUE",
    "time": "1470",
    "ntasks-per-node": "4",
    "gres": "gpu:a100:4,lscratch:10",
    "gpu-bind": "single:1",
    "mem": "200G",
    "nice": "0",
    "exclusive": "",
    "mem-per-gpu": "32G",
    "signal": "USR2@300",
}


def test_every_key_is_an_option_of_sbatch() -> None:
    config = config_of("train", **GIVEN)
    options = sbatch_options(jobs_of(config)[0], config)
    assert options.items() >= EXPECTED.items()
    assert options.keys().isdisjoint({"gpus-per-task", "gpus-per-node", "contiguous", "array", "dependency"})


def test_a_job_with_one_task_gets_its_part_of_a_node() -> None:
    config = config_of(shards=2, gres="gpu:a100:4,lscratch:10", tasks_per_node=4, mem_gb=402)
    parts = [sbatch_options(job, config) for job in jobs_of(config)]
    assert [(part["gres"], part["mem"]) for part in parts] == [
        ("gpu:a100:4,lscratch:10", "402G"), *[("gpu:a100:1,lscratch:10", "101G")] * 5
    ]  # fmt: skip


def test_options_of_yaml_blocks_and_its_truth_values(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("slurm:\n  comment: |\n    my text\n  extra: {exclusive: True, contiguous: yes, hold: Off}\n")
    slurm = load_config(path).slurm
    assert (slurm.comment, slurm.extra) == ("my text", {"exclusive": "", "contiguous": "", "hold": None})


@pytest.mark.parametrize(
    ("slurm", "asked"),
    [
        ({"tasks_per_node": 8}, {"gpus-per-node": "8"}),
        ({"gpu_bind": "single:1"}, {"gpus-per-node": "1", "gpu-bind": "single:1"}),
        ({"gpus_per_task": 1}, {"gpus-per-task": "1"}),
        ({"gpus_per_task": 0}, {}),
        ({"gpus_per_node": "a100:2"}, {"gpus-per-node": "a100:2"}),
        ({"gres": "lscratch:10"}, {"gres": "lscratch:10", "gpus-per-node": "1"}),
        ({"gres": "gpu:2,lscratch:10", "stages": {"train": {"gpus_per_task": 0}}}, {"gres": "lscratch:10"}),
        ({"gpus_per_task": 1, "stages": {"train": {"gres": "gpu:v100"}}}, {"gres": "gpu:v100"}),
    ],
)
def test_one_option_asks_for_the_gpus(slurm: dict[str, Any], asked: dict[str, str]) -> None:
    config = config_of("train", **slurm)
    options = sbatch_options(jobs_of(config)[0], config)
    assert {name: value for name, value in options.items() if name.startswith("g")} == asked


def test_a_stage_has_its_own_keys() -> None:
    stages = {"assign": {"gpus_per_task": 0, "time_minutes": "0:30:00"}, "label": {"partition": None, "nodes": 1}}
    config = config_of(partition="gpu", nodes=2, stages=stages, extra={"nice": 5})
    train, label, assign, evaluate = (sbatch_options(job, config) for job in jobs_of(config))
    assert (assign["time"], assign.get("gpus-per-node")) == ("30", None)
    assert (label.get("partition"), label["nodes"], label["time"]) == (None, "1", "1440")
    assert train | {"job-name": ""} == evaluate | {"job-name": ""}
    assert make_config(config.model_dump(mode="json")) == config
    assert config.model_dump()["slurm"]["stages"].keys() == {"assign", "label"}


@pytest.mark.parametrize(("minutes", "expected"), [(1440, "240"), (60, "60")])
def test_the_assigner_takes_hours_at_most(minutes: int, expected: str) -> None:
    config = config_of("assign", time_minutes=minutes)
    assert sbatch_options(jobs_of(config)[0], config)["time"] == expected


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"gres": "gpu:4", "gpus_per_node": 4}, "slurm.gpus_per_node and slurm.gres: each asks for the GPUs"),
        ({"gres": "gpu:2", "tasks_per_node": 4}, "slurm.gres: gpu:2 has too few GPUs for the 4 tasks of a node"),
        ({"gres": "gpu:0"}, "slurm.gres: gpu:0 asks for no GPU"),
        ({"comment": "two\nlines"}, "slurm.comment: expected one line"),
        ({"extra": {"nodelist": "a\n#b"}}, "slurm.extra.nodelist: expected one line"),
        ({"gres": "gpu a100"}, "slurm.gres: expected NAME[:TYPE][:COUNT], such as gpu:a100:4, got 'gpu a100'"),
        ({"extra": {"partition": "x"}}, "slurm.extra: --partition has a key of its own, slurm.partition"),
        ({"extra": {"cpus": 4}}, "slurm.extra: --cpus has a key of its own, slurm.cpus_per_task"),
        ({"extra": {"no-requeue": True}}, "slurm.extra: --no-requeue is set by videoadapt launch"),
        ({"extra": {"--nice": 5}}, "slurm.extra: expected long names of sbatch's options without dashes"),
        ({"mail_type": "ENDE"}, "slurm.mail_type.0: input should be 'NONE'"),
        ({"stages": {"assign": {"nodes": 2}}}, "slurm.stages.assign.nodes: assign has one task"),
        ({"stages": {"label": {"time_minutes": "soon"}}}, "slurm.stages.label.time_minutes: input should be a valid"),
    ],
)
def test_wrong_options_are_refused(slurm: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(**slurm)


def test_a_run_folder_has_no_pattern_of_slurm() -> None:
    with pytest.raises(
        ConfigError, match=r"run\.dir: expected one folder for all stages and jobs of a run, without .*%j"
    ):
        make_config({"run": {"dir": "runs/%j"}})


def test_a_dry_run_writes_nothing_and_needs_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    nested = {
        "run": {"dir": str(tmp_path / "run")},
        "data": LISTS,
        "launch": {"shards": 2},
        "slurm": GIVEN | {"setup": ["module load cuda"]},
    }
    plan = plan_launch(make_config(nested), ["mine.yaml"])
    assert not any(tmp_path.iterdir())
    assert [(job.name, job.after, job.stage) for job in plan.jobs][:3] == [
        ("job1", None, "train"), ("job2", "job1", "label"), ("job3", "job2", "label")
    ]  # fmt: skip
    for job in plan.jobs:
        command, _, script = job.sbatch.partition(" <<'END'\n")
        printed = dict(re.findall(r"--([a-z-]+)=?(.*)", "\n".join(shlex.split(command)[1:])))
        assert options_of(job.script) == printed == job.options
        assert script.splitlines()[:2] == ["#!/bin/bash", "module load cuda"]
        assert "module load cuda" in job.script.splitlines()


def test_a_launch_without_slurm_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="no sbatch on this machine: launch from a node of the cluster"):
        launch(make_config({"run": {"dir": str(tmp_path / "run")}, "data": LISTS}), [])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"data": LISTS | {"val": {}}}, "data.val.annotations: evaluate needs"),
        ({"data": LISTS | {"train": {}}}, "data.train.annotations: train needs"),
        ({"parallel": {"groups": {"14": 4, "10": 2, "7": 1}}}, "needs 7 ranks, but this job has 8"),
        ({"train": {"batch": 4}}, "train.batch: 4 clips in 1 micro-batch leave nothing"),
        ({"launch": {"stage": "calibrate"}}, "data.calibrate: 0 leaves no video"),
        ({"launch": {"stage": "assign"}, "model": {"points": ["14"]}}, "model.points: 14 alone"),
        ({"evaluate": {"leap": ["7:cost=0.5"]}, "label": {"source": "teacher"}}, "7:cost=0.5 is fitted to labels"),
        ({"parallel": {"shard": "3/8"}}, "parallel.shard: 3/8 is one job of calibrate, evaluate, label"),
        ({"parallel": {"shard": "3/8"}, "launch": {"stage": "label", "shards": 8}}, "launch.shards=1"),
    ],
)
def test_a_chain_that_would_fail_in_its_jobs_is_refused(words: dict[str, Any], message: str) -> None:
    config = make_config({"data": LISTS, "slurm": {"tasks_per_node": 8}} | words)
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_launch(config, [])


def test_one_shard_is_launched_alone() -> None:
    config = make_config({"launch": {"stage": "label"}, "parallel": {"shard": "3/8"}})
    assert StageCall(jobs_of(config)[0], config).values["parallel"]["shard"] == "3/8"


def test_a_refused_submission_leaves_the_files_of_other_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sbatch` here is refused while another job writes its log."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\ntouch {tmp_path}/run/jobs/7_0_log.out\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    with pytest.raises(RunError, match="train cannot be submitted"):
        launch(make_config({"run": {"dir": str(tmp_path / "run")}, "data": LISTS}), [])
    assert [path.name for path in (tmp_path / "run" / "jobs").iterdir()] == ["7_0_log.out"]


def test_gpus_without_a_task_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    plan_launch(config_of("train", gres="gpu:a100:4"), [])
    assert "train: 4 GPUs on each node, of which 3 are idle" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_the_sbatch_files_have_the_options_of_launch(stage: str) -> None:
    (job,) = jobs_of(config_of(stage))
    script = (FILES / f"{stage}.sbatch").read_text()
    options = sbatch_options(job, config_of(stage))
    del options["output"]  # in the folder of the run, which the files do not know
    assert options_of(script) == options
    command = shlex.split(script.partition("\nsrun ")[2].replace("\\\n", ""))
    assert command[:5] == [
        "--unbuffered", "--kill-on-bad-exit=1", "--cpus-per-task=$SLURM_CPUS_PER_TASK", "videoadapt", stage
    ]  # fmt: skip
    assert "parallel.ranks=$SLURM_NTASKS" in command
    assert ("$shard" in command) == (stage in {"label", "calibrate", "evaluate"})


def array_of(least: int, most: int, count: int) -> dict[str, str]:
    found = {"MIN": least, "MAX": most, "COUNT": count, "ID": most}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in found.items()}


@pytest.mark.parametrize("stage", ["label", "calibrate", "evaluate"])
@pytest.mark.parametrize(
    ("array", "words", "shard"),
    [
        ({}, [], None),
        ({}, ["parallel.shard=3/8"], "3/8"),
        (array_of(0, 7, 8), [], "7/8"),
        (array_of(3, 3, 1), ["parallel.shard=3/8"], "3/8"),
        (array_of(3, 3, 1), [], "refused"),
        (array_of(1, 4, 4), [], "refused"),
        (array_of(0, 6, 4), [], "refused"),  # 0-6:2
    ],
)
def test_the_sbatch_files_score_each_shard_once(
    stage: str, array: dict[str, str], words: list[str], shard: str | None, tmp_path: Path
) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "8"} | array
    line = ["bash", str(FILES / f"{stage}.sbatch"), "mine.yaml", *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if shard == "refused" else 0)
    given = re.findall(r"parallel\.shard=(\S+)", done.stdout)
    assert given == ([] if shard in (None, "refused") else [shard])


def test_the_chain_file_has_the_stages_in_the_order_of_launch() -> None:
    script = (FILES / "chain.sbatch").read_text()
    loop = re.search(r"for stage in \$\{STAGES:-(.*)\}; do", script)
    assert loop
    assert loop[1].split() == [job.stage for job in jobs_of(config_of())]


def test_there_are_no_other_sbatch_files() -> None:
    assert {path.stem for path in FILES.iterdir()} == {*STAGES, "chain"}


def test_the_sbatch_command_survives_a_shell(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@"; cat\n')
    sbatch.chmod(0o755)
    config = config_of("train", comment="two words", exclude="node[1,2]", python="apptainer exec --nv v.sif python")
    command = sbatch_command(jobs_of(config)[0], config, ["my config.yaml", "train.lr=0.1"], "17")
    line = ["bash", "-c", command]
    done = subprocess.run(
        line, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True
    )
    flags, _, script = done.stdout.partition("#!/bin/bash\n")
    assert {"--comment=two words", "--exclude=node[1,2]", "--dependency=afterok:17", "--requeue"} < set(
        flags.splitlines()
    )
    assert script == "\n".join(PASS_SIGNALS_ON.splitlines()) + (
        "\nsrun --unbuffered --kill-on-bad-exit=1 --cpus-per-task=8 apptainer exec --nv v.sif python -m videoadapt "
        "train 'my config.yaml' train.lr=0.1 parallel.ranks=1\n"
    )


@pytest.mark.parametrize("stop", [RunError("assign cannot be submitted: no"), KeyboardInterrupt()])
def test_the_jobs_before_a_refused_one_are_cancelled_and_named(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submitted(job: Job, *_: object) -> list[Any]:
        if job.stage == "assign":
            raise stop
        return [SimpleNamespace(job_id=str(STAGES.index(job.stage) + 71), paths=SimpleNamespace(stdout=tmp_path))]

    cancelled: list[str] = []
    monkeypatch.setattr(module, "submit", submitted)
    monkeypatch.setattr(module, "cancel", cancelled.extend)
    with pytest.raises(type(stop)) as raised:
        launch(config_of(), [])
    assert raised.value is stop
    assert cancelled == ["71", "72"]
    assert "cancelled, because the chain cannot be completed: train 71, label 72" in capsys.readouterr().err


def test_jobs_that_cannot_be_cancelled_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submitted(job: Job, *_: object) -> list[Any]:
        if job.stage == "label":
            raise RunError("label cannot be submitted: no")
        return [SimpleNamespace(job_id="71", paths=SimpleNamespace(stdout=tmp_path))]

    def refused(jobs: list[str]) -> None:
        raise RunError(f"they cannot be cancelled (no); run scancel {jobs[0]}")

    monkeypatch.setattr(module, "submit", submitted)
    monkeypatch.setattr(module, "cancel", refused)
    with pytest.raises(RunError, match="label cannot be submitted"):
        launch(config_of(), [])
    assert "already submitted: train 71; they cannot be cancelled (no); run scancel 71" in capsys.readouterr().err


@pytest.mark.parametrize("called", ["in another folder", "in a job of the user's", "as a job"])
def test_the_chain_file_finds_the_other_files_and_keeps_the_working_directory(called: str, tmp_path: Path) -> None:
    sbatch, elsewhere, spool = tmp_path / "bin" / "sbatch", tmp_path / "elsewhere", tmp_path / "spool"
    for folder in (sbatch.parent, elsewhere, spool):
        folder.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$PWD" "$@" >> {tmp_path}/asked\necho 7\n')
    sbatch.chmod(0o755)
    script = FILES / "chain.sbatch"
    environment = {"PATH": f"{sbatch.parent}:{os.environ['PATH']}"}
    if called == "in a job of the user's":
        environment |= {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    elif called == "as a job":
        script = Path(shutil.copy(script, spool / "slurm_script"))
        environment |= {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(FILES.parent)}
    line = ["bash", str(script), "mine.yaml", "train.lr=0.1"]
    subprocess.run(line, cwd=elsewhere, env=environment, check=True, capture_output=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == f"{elsewhere} --parsable {FILES}/train.sbatch mine.yaml train.lr=0.1"
    chained = f"{elsewhere} --parsable --dependency=afterok:7 --kill-on-invalid-dep=yes {FILES}"
    assert asked[1:] == [
        f"{chained}/{stage}.sbatch mine.yaml train.lr=0.1" for stage in STAGES[1:] if stage != "calibrate"
    ]


def test_a_local_launch_refuses_several_nodes(tmp_path: Path) -> None:
    nested = {"run": {"dir": str(tmp_path)}, "launch": {"cluster": "local"}, "slurm": {"nodes": 2}, "data": LISTS}
    with pytest.raises(ConfigError, match=r"slurm\.nodes is 2; with launch\.cluster=local it must be 1"):
        launch(make_config(nested), [])


@pytest.mark.slow
def test_all_stages_on_this_machine(tmp_path: Path) -> None:
    data = runs.make_data(tmp_path / "data")
    config = runs.config(
        data,
        tmp_path / "run",
        train={"epochs": 1},
        launch={"cluster": "local", "shards": 2},  # no arrays here: shards has no effect
        slurm={"tasks_per_node": 1, "gpus_per_task": 0, "stages": {"label": {"tasks_per_node": 2}}},
    )
    result = launch(config, [])
    assert [(job.stage, job.ranks) for job in result.jobs] == [
        ("train", 1), ("label", 2), ("assign", 1), ("evaluate", 1)
    ]  # fmt: skip
    assert all(Path(job.log).exists() for job in result.jobs)
    assert json.loads((config.run.dir / "evaluate" / "evaluate.json").read_text())["scored"] == 12


def test_a_stage_that_fails_here_names_its_log(tmp_path: Path) -> None:
    nested = {"run": {"dir": str(tmp_path)}, "launch": {"cluster": "local", "stage": "assign"}}
    with pytest.raises(RunError, match=r"assign failed: .*; run `videoadapt label` with this config first") as raised:
        launch(make_config(nested), [])
    log = re.search(r"\(log: (.*_log\.out)\)$", str(raised.value))
    assert log
    lines = Path(log[1]).read_text().splitlines()
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith("error: ")
    assert not (tmp_path / "jobs" / "%j").exists()


def test_an_interrupted_launch_lets_its_ranks_save(tmp_path: Path) -> None:
    data = runs.make_data(tmp_path / "data")
    train = {"epochs": 10_000, "save_steps": 10**6}
    config = runs.config(
        data,
        tmp_path / "run",
        train=train,
        launch={"cluster": "local", "stage": "train"},
        slurm={"gpus_per_task": 0},
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    line = [sys.executable, "-m", "videoadapt", "launch", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(line, start_new_session=True, stderr=subprocess.PIPE, text=True)
    metrics = config.run.dir / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to launch, submitit's controller and the rank
        _, errors = process.communicate(timeout=120)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130, errors
    saved = train_checkpoints(config.run.dir).latest()
    assert saved is not None and saved.meta["step"] == len(metrics.read_text().splitlines())
    assert "Traceback" not in "".join(log.read_text() for log in (config.run.dir / "jobs").glob("*.out"))
    wait_until(lambda: not group_exists(process.pid))  # no orphan


@pytest.mark.parametrize("given", [None, "2,3"])
def test_ranks_on_this_machine_see_the_gpus_that_the_launch_was_given(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(module, "run_stage", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # by submitit
    StageCall(jobs_of(config_of())[0], config_of(), gpus=given)()
    assert seen == [given or "0,1"]


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no\nvideo"), 2), (RunError("no\nvideo"), 1), (OSError("no\nvideo"), 1)]
)
def test_an_error_inside_a_job_is_one_line(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_stage(*_: object) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(module, "run_stage", run_stage)
    with pytest.raises(SystemExit) as ended:  # not an `Exception`, whose traceback submitit would print
        StageCall(jobs_of(config_of())[0], config_of())()
    assert ended.value.code == code
    assert capsys.readouterr().err == "error: no video\n"


def test_the_sbatch_files_and_the_scripts_of_launch_pass_signals_on() -> None:
    assert all(module.PASS_SIGNALS_ON in (FILES / f"{stage}.sbatch").read_text() for stage in STAGES)
    (job,) = plan_launch(config_of("train"), []).jobs
    assert module.PASS_SIGNALS_ON in job.script


@pytest.mark.parametrize(("received", "code"), [([], 3), (["USR2"], 12), (["USR1", "USR1"], 12)])
def test_a_signal_to_the_batch_shell_reaches_the_tasks(received: list[str], code: int, tmp_path: Path) -> None:
    """`srun` here is a task that ends with code 12 when it has received as many signals; otherwise with code 3."""
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/bin/bash\n"
        "trap 'echo USR1; n=$((n + 1))' USR1; trap 'echo USR2; n=$((n + 1))' USR2\n"
        f'echo "$@"; touch {tmp_path}/ready\n'
        f"for _ in {{1..100}}; do sleep 0.1; [[ $n == {len(received) or 'x'} ]] && exit 12; "
        f"[[ {len(received)} == 0 ]] && exit 3; done\n"
    )
    srun.chmod(0o755)
    script = tmp_path / "script"
    script.write_text(f"#!/bin/bash\n{module.PASS_SIGNALS_ON}\nsrun --some 'two words'\n")
    process = subprocess.Popen(
        ["bash", str(script)], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, stdout=subprocess.PIPE, text=True
    )
    for number, name in enumerate(received):
        wait_until((tmp_path / "ready").exists)
        time.sleep(0.3 * (number + 1))
        process.send_signal(getattr(signal, f"SIG{name}"))
    output, _ = process.communicate(timeout=30)
    assert output.splitlines() == ["--some two words", *received]
    assert process.returncode == code
