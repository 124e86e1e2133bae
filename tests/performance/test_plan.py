"""`plan` from end to end, and its prediction of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import small_runs as runs
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, dump_config, make_config
from videoadapt.data.index.manifest import index
from videoadapt.errors import RunError, UserError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.performance.memory import TrainingMemory, parameter_count, saved_bytes, training_memory
from videoadapt.performance.plan import analytic_passes, plan, print_plan
from videoadapt.performance.timing import Round, Stopwatch
from videoadapt.training.forecast import groups_setting
from videoadapt.training.groups import make_plan

CPU = torch.device("cpu")
MACS_PER_S = {"macs_per_s": 1e10}


def tiny(folder: Path, /, **sections: dict) -> Config:
    return runs.config(folder / "data", folder / "run", **sections)


def really_saved_bytes(config: Config, point: str, clips: int) -> int:
    """Counts the storages that a real forward pass keeps."""
    model = TimeSformer(config.model).train()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(clips, 3, config.model.num_frames, config.model.size, config.model.size), point)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in parameters)


@pytest.mark.parametrize("point", ["8", "4"])
def test_saved_bytes_are_those_of_a_real_pass(tmp_path: Path, point: str) -> None:
    config = tiny(tmp_path, model={"drop_path": 0.0})
    for clips in (1, 3):
        found = saved_bytes(config, point, clips, CPU, checkpointing=False)
        assert found == pytest.approx(really_saved_bytes(config, point, clips), rel=0.01)


def memory_of(folder: Path, points: tuple[str, ...] = ("8",), /, **sections: dict) -> TrainingMemory:
    sections["model"] = {"points": list(points), **sections.get("model", {})}
    return training_memory(tiny(folder, **sections), CPU)


def test_memory_grows_with_length_and_clips(tmp_path: Path) -> None:
    memory = memory_of(tmp_path, ("8", "4"))
    assert memory.bytes(["8"], 2) > memory.bytes(["4"], 2) > memory.state
    assert memory.bytes(["8", "4"], 2) == memory.bytes(["8"], 2)
    more = memory.bytes(["8"], 4) - memory.bytes(["8"], 3)
    assert memory.bytes(["8"], 3) - memory.bytes(["8"], 2) == more == memory.saved["8"][1]


def test_the_costliest_point_last_keeps_the_activations_of_two_points(tmp_path: Path) -> None:
    memory = memory_of(tmp_path, ("8", "6", "4"))
    kept = {point: memory.bytes([point], 2) - memory.state for point in ("8", "6", "4")}
    assert memory.bytes(["8", "6", "4"], 2, costliest_last=True) == memory.state + kept["8"] + kept["6"]
    assert memory.bytes(["8"], 2, costliest_last=True) == memory.state + kept["8"]


def test_memory_depends_on_optimizer_checkpointing_and_precision(tmp_path: Path) -> None:
    parameters = parameter_count(tiny(tmp_path, model={"points": ["8"]}))
    adamw = memory_of(tmp_path, train={"ema": None})
    assert adamw.state == 16 * parameters  # weights, gradients, and two values of AdamW, 4 bytes each
    sgd = memory_of(tmp_path, train={"optimizer": "sgd", "momentum": 0.0, "ema": 0.9})
    assert sgd.state == 12 * parameters  # weights, gradients, moving average
    bf16 = memory_of(tmp_path, run={"precision": "bf16"})
    assert bf16.saved["8"][1] < adamw.saved["8"][1]
    deep = {"depth": 6}
    checkpointed = memory_of(tmp_path, train={"activation_checkpointing": True}, model=deep)
    assert checkpointed.saved["8"][1] < memory_of(tmp_path, model=deep).saved["8"][1] / 2


def test_frozen_parts_keep_no_gradients_optimizer_state_or_activations(tmp_path: Path) -> None:
    whole = memory_of(tmp_path, train={"ema": None})
    frozen = memory_of(tmp_path, train={"ema": None, "freeze": "backbone", "init": "a.pth"})
    assert frozen.state < whole.state / 3  # AdamW: the weights are a quarter
    assert frozen.saved["8"][1] < whole.saved["8"][1] / 10
    for freeze in (None, "backbone"):
        watch = Stopwatch(tiny(tmp_path, train={"freeze": freeze, "init": "a.pth"}, model={"points": ["8"]}), (4, 8))
        assert all(p.requires_grad for p in watch.model.blocks.parameters()) == (freeze is None)


def test_a_plan_from_analytic_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, plan={**MACS_PER_S, "clips": 1000}, parallel={"groups": {"8": 1, "6": 1, "4": 1}})
    summary = plan(config, 3)
    assert not config.run.dir.exists()  # `plan` only reads
    rows = {row.groups: row for row in summary.layouts}
    assert {"null", "{8: 1, 6: 1, 4: 1}", "{8: 2, 6+4: 1}"} <= set(rows)
    assert [row.step_s for row in summary.layouts] == sorted(row.step_s for row in summary.layouts)
    assert summary.groups_of_the_config == "{8: 1, 6: 1, 4: 1}"
    assert summary.measured_at_clips is None
    row = rows["null"]
    assert row.clips_per_s == pytest.approx(8 / row.step_s)
    assert row.gpu_hours == pytest.approx(3 * 2 * (1000 // 8) * row.step_s / 3600)  # ranks x epochs x steps
    assert row.bytes_per_rank < rows["{8: 1, 6: 1, 4: 1}"].bytes_per_rank  # 3 clips on a rank, not 8
    print_plan(summary)
    output = capsys.readouterr().out
    assert f"recommended: parallel.groups={summary.recommended}: " in output
    assert "nothing measured" in output


def test_measuring_restores_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stopwatch: Stopwatch) -> Round:  # noqa: ARG001
        assert torch.get_num_threads() == 1
        raise RunError("no measurement")

    monkeypatch.setattr(Stopwatch, "measure", fail)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(RunError, match="no measurement"):
            plan(tiny(tmp_path), 1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_checkpointed_backward_pass_repeats_the_forward_pass(tmp_path: Path) -> None:
    once = analytic_passes(tiny(tmp_path, plan=MACS_PER_S))
    twice = analytic_passes(tiny(tmp_path, plan=MACS_PER_S, train={"activation_checkpointing": True}))
    for point, passes in once.items():
        assert twice[point].forward == passes.forward
        assert twice[point].backward.seconds(6) == pytest.approx(passes.seconds(6))


def test_a_step_takes_at_least_its_launches(tmp_path: Path) -> None:
    """One clip for each of many fast GPUs gains nothing."""
    config = tiny(tmp_path, plan={"macs_per_s": 1e20}, train={"batch": 32}, model={"points": ["8"]})
    steps = [plan(config, gpus).layouts[0].step_s for gpus in (16, 32)]
    assert steps[0] == steps[1] == plan(config, 16).floor_s


def test_a_sampled_step_launches_the_drawn_points_only(tmp_path: Path) -> None:
    """A step trains both points of length 8, and either 6 or 4: three of four points."""
    model = {"points": ["8", "8@0.5", "6", "4"], "drop_blocks": [1]}
    fast = {"macs_per_s": 1e20}
    sampled, whole = (
        plan(tiny(tmp_path, train={"draw": draw}, plan=fast, model=model), 2) for draw in ("sampled", "all")
    )
    assert sampled.floor_s and whole.floor_s
    assert sampled.floor_s == pytest.approx(3 / 4 * whole.floor_s)
    rows = {row.groups: row for row in sampled.layouts}
    assert rows["null"].step_s == sampled.floor_s
    assert rows["{8: 1, 6+4: 1}"].step_s == pytest.approx(2 / 3 * sampled.floor_s)
    assert rows["null"].utilisation < 0.01  # the ranks wait for the host


def test_the_memory_of_a_rate_is_that_of_a_gpu(tmp_path: Path) -> None:
    """On CPUs, bf16 takes an attention that keeps all its weights; a plan for GPUs does not count them."""
    keys: dict[str, dict] = {"run": {"precision": "bf16"}, "model": {"points": ["8"]}}
    config = tiny(tmp_path, plan=MACS_PER_S, **keys)
    here, on_gpu = (training_memory(config, CPU, as_on_gpu=as_on_gpu) for as_on_gpu in (False, True))
    weights = 2 * config.model.depth * config.model.heads * config.model.num_frames * (8**2 + 1) ** 2  # bytes
    assert here.saved["8"][1] - on_gpu.saved["8"][1] > weights / 2
    (row,) = plan(config, 1).layouts
    assert row.bytes_per_rank == on_gpu.bytes(["8"], 8)


def test_the_largest_batch_that_fits(tmp_path: Path) -> None:
    memory = memory_of(tmp_path, ("8", "4"))
    assert memory.most_clips(["8", "4"], memory.bytes(["8", "4"], 5)) == 5
    assert memory.most_clips(["8", "4"], memory.bytes(["8", "4"], 5) - 1) == 4
    assert memory.most_clips(["8"], 0) == 0


def test_a_plan_says_what_the_order_of_backward_passes_gains_and_takes(tmp_path: Path) -> None:
    # Gradients of several buckets: DDP sums the last one after the passes. One length, and so one layout.
    wide = {"points": ["8", "8@0.5"], "drop_blocks": [1], "width": 768, "depth": 4, "heads": 12}
    fast = plan(tiny(tmp_path, plan=MACS_PER_S, model=wide), 2)
    assert fast.notes[-1].endswith("parallel.overlap=auto would not choose it")
    backward_s = fast.clips / 2 * fast.passes["8"]["backward_per_clip_s"]  # hides sums of this time
    slow = MACS_PER_S | {"bandwidth_gbps": 8e-9 * fast.gradient_bytes / backward_s}
    off, auto = (
        plan(tiny(tmp_path, plan=slow, model=wide, parallel={"overlap": order}), 2) for order in ("off", "auto")
    )
    [off_row], [auto_row] = off.layouts, auto.layouts
    assert (off_row.costliest_last, auto_row.costliest_last) == (False, True)
    assert auto_row.step_s < 0.98 * off_row.step_s
    assert auto_row.bytes_per_rank > off_row.bytes_per_rank
    assert off.notes == auto.notes
    note = off.notes[-1]
    assert f"takes {1000 * auto_row.step_s:.1f} instead of {1000 * off_row.step_s:.1f} ms" in note
    assert f"{auto_row.bytes_per_rank / (1 << 30):.2f} instead of {off_row.bytes_per_rank / (1 << 30):.2f} GiB" in note
    assert note.endswith("parallel.overlap=auto would choose it")


def test_the_learning_rate_grows_with_the_batch(tmp_path: Path) -> None:
    config = tiny(tmp_path, plan=MACS_PER_S, train={"batch": 32, "lr": 0.01}, model={"points": ["8"]})
    (note,) = plan(config, 8).notes
    assert note.startswith("train.batch=32 is 4 clips for each GPU")
    assert "train.batch=64 train.lr=0.02 by the linear rule" in note


def test_the_advised_batch_can_be_split_and_is_for_videos(tmp_path: Path) -> None:
    train = {"batch": 48, "accumulate": 6}
    (note,) = plan(tiny(tmp_path, plan=MACS_PER_S, train=train, data={"mixup": 0.8}, model={"points": ["8"]}), 2).notes
    assert "with 12 (TimeSformer has 8): train.batch=24" in note  # whole pairs in each of 6 micro-batches
    image = {"points": ["8"], "num_frames": 1, "temporal": False}
    (note,) = plan(tiny(tmp_path, plan=MACS_PER_S, model=image, assign={"frames": 1}), 4).notes
    assert note == "train.batch=8 is 2 clips for each GPU without groups"


def test_a_plan_says_how_many_cores_decoding_needs(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    config = tiny(tmp_path, plan=MACS_PER_S, model={"points": ["8"]})
    index(config)
    assert any("clips/s of the run's files, so each GPU needs" in note for note in plan(config, 1).notes)


def test_the_clips_of_an_epoch_come_from_the_manifest(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    config = tiny(tmp_path, plan=MACS_PER_S, model={"points": ["8"]})  # one point: memory is predicted for each
    assert plan(config, 1).clips_an_epoch is None
    train_videos = int((index(config)["split"] == "train").sum())
    assert plan(config, 1).clips_an_epoch == train_videos


def test_an_epoch_without_a_step_is_an_error(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    train, model = {"batch": 64}, {"points": ["8"]}
    index(tiny(tmp_path, train=train))
    with pytest.raises(UserError, match="64 clips a step, but only .* train videos can be read"):
        plan(tiny(tmp_path, plan=MACS_PER_S, train=train, model=model), 1)
    with pytest.raises(UserError, match="plan.clips: 63 clips an epoch"):
        plan(tiny(tmp_path, plan=MACS_PER_S | {"clips": 63}, train=train, model=model), 1)


def test_a_plan_shows_the_groups_that_training_would_take(tmp_path: Path) -> None:
    config = tiny(tmp_path, plan=MACS_PER_S, parallel={"groups": "auto"}, train={"freeze": "backbone", "init": "a.pth"})
    assert plan(config, 5).groups_of_the_config == "{8: 2, 6: 2, 4: 1}"


def test_a_stem_that_all_lengths_share_has_one_group(tmp_path: Path) -> None:
    summary = plan(tiny(tmp_path, plan=MACS_PER_S, model={"embed": "stem", "share_patch": True}), 3)
    assert [row.groups for row in summary.layouts] == ["null"]


def test_the_command_measures_and_prints_json(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    done = runs.command("plan", path, "--gpus", 2, "--json", "train.batch=4", "plan.bandwidth_gbps=1")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["measured_at_clips"] == [2, 4]
    assert {row["groups"] for row in result["layouts"]} == {
        "null",
        "{8: 1, 6+4: 1}",
        "{8+4: 1, 6: 1}",
        "{8+6: 1, 4: 1}",
    }
    # A measured step takes at least the passes of the busiest rank, and the recommendation is the fastest layout.
    steps = {row["groups"]: row["step_s"] for row in result["layouts"]}
    slowest_pass_s = max(2 * p["forward_per_clip_s"] + 2 * p["backward_per_clip_s"] for p in result["passes"].values())
    assert min(steps.values()) >= slowest_pass_s
    assert steps[result["recommended"]] <= 1.02 * min(steps.values())
    assert result["passes"].keys() == {"8", "6", "4"}
    # Training accepts the recommended layout.
    changed = config.model_dump(mode="json")
    changed["parallel"]["groups"] = yaml.safe_load(result["recommended"])
    accepted = make_plan(make_config(changed), 2, point_macs(config.model))
    assert groups_setting(accepted) == result["recommended"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus: expected 1 to 4096, got 0"),
        ([], "Missing option '--gpus'"),
        (["--gpus", "999999999999", "plan.macs_per_s=1e9"], "--gpus: expected 1 to 4096, got 999999999999"),
        (["--gpus", "2", "model.points=[8,7,6,5,4,3,2]"], "model.points: 7 lengths; plan compares all ways"),
        (["--gpus", "99", "plan.macs_per_s=1e9"], "99 ranks, but a micro-batch has only 8 clips"),
        (["--gpus", "2", "plan.bandwidth=3"], "unknown key plan.bandwidth; did you mean plan.bandwidth_gbps?"),
        (["--gpus", "2", "plan.macs_per_s=0"], "plan.macs_per_s: input should be greater than or equal to 1"),
    ],
)
def test_the_command_rejects_bad_input(tmp_path: Path, words: list[str], message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny(tmp_path)))
    done = runs.command("plan", path, *words)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch finds no GPU"):
        plan(tiny(tmp_path, run={"device": "cuda"}), 2)
