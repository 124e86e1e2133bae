"""Stage 1: what a step computes, and that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import small_runs as runs
from videoadapt.config.load import Config, dump_config
from videoadapt.config.sections import ModelConfig
from videoadapt.data.clips.datasets import Failure
from videoadapt.data.clips.loader import epoch_rows, train_batches
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import CheckpointError, RunError
from videoadapt.model.checkpoint import load_checkpoint, load_model, train_checkpoints
from videoadapt.model.timesformer import TimeSformer
from videoadapt.training.draws import drawn_points
from videoadapt.training.groups import make_plan
from videoadapt.training.preflight import Rates
from videoadapt.training.state import State
from videoadapt.training.step import RankRole, train_step
from videoadapt.training.train import say_splits, start_or_resume, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data"))


def alone(state: State) -> RankRole:
    """Returns the role of the only rank."""
    return RankRole.from_plan(state.config, state.model, make_plan(state.config, 1, {}))


def first_batches(config: Config) -> tuple[State, list]:
    manifest = load_or_index(config)
    state = State.start(config, manifest)
    return state, next(train_batches(manifest, config))


def gradients(state: State) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}


def final_tensors(config: Config) -> dict[str, Tensor]:
    checkpoint = train_checkpoints(config.run.dir).latest()
    assert checkpoint is not None
    return checkpoint.tensors


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_accumulation_does_not_change_the_gradient(data: Path, tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 4):
        config = runs.config(data, tmp_path / "run", train={"accumulate": accumulate}, model={"drop_path": 0.0})
        config = config.model_copy(update={"train": config.train.model_copy(update={"clip_grad": None})})
        state, batches = first_batches(config)
        train_step(state, alone(state), batches)
        found.append(gradients(state))
    for name, gradient in found[0].items():
        assert torch.linalg.norm(gradient - found[1][name]) <= 1e-4 * torch.linalg.norm(gradient) + 1e-7, name


def test_the_gradient_is_the_sum_over_points_of_the_mean_over_clips(data: Path, tmp_path: Path) -> None:
    """Against an independent implementation: cross-entropy for 8, (1 - lam) CE + lam KL(p_8 || p) for 6 and 4."""
    config = runs.config(data, tmp_path / "run", model={"drop_path": 0.0}, loss={"lam": 0.7, "tau": 2.0})
    config = config.model_copy(update={"train": config.train.model_copy(update={"clip_grad": None})})
    state, batches = first_batches(config)
    train_step(state, alone(state), batches)
    found = gradients(state)

    torch.manual_seed(config.run.seed)
    fresh = State.start(config, state.manifest).model.train()
    clips = (batches[0].clips.float() / 255 - 0.45) / 0.225
    teacher = fresh(clips, "8")
    total = torch.nn.functional.cross_entropy(teacher, batches[0].labels)
    wanted = (teacher.detach() / 2.0).softmax(-1)
    for point in ("6", "4"):
        logits = fresh(clips, point)
        kl = (wanted * (wanted.log() - (logits / 2.0).log_softmax(-1))).sum(-1).mean()
        total = total + 0.3 * torch.nn.functional.cross_entropy(logits, batches[0].labels) + 0.7 * 4.0 * kl
    total.backward()
    for name, parameter in fresh.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


GRID = {"points": ["8", "8@0.5", "6", "6@0.5", "4", "4@0.5"], "drop_blocks": [1], "drop_path": 0.0}
SAMPLED = {"draw": "sampled", "clip_grad": None, "weight_decay": 0.5}


def test_a_sampled_step_has_the_objective_of_supervit(data: Path, tmp_path: Path) -> None:
    """Cross-entropy for 8, ReViT's mix for another length, and KL(p_l || p_l@k) below keep 1, whatever lam and tau."""
    loss = {"lam": 0.4, "tau": 2.0}
    config = runs.config(data, tmp_path / "run", model=GRID, train=SAMPLED, loss=loss)
    state, batches = first_batches(config)
    train_step(state, alone(state), batches)
    found = gradients(state)

    torch.manual_seed(config.run.seed)
    fresh = State.start(config, state.manifest).model.train()
    clips, labels = (batches[0].clips.float() / 255 - 0.45) / 0.225, batches[0].labels

    def divergence(teacher: Tensor, logits: Tensor, tau: float) -> Tensor:
        wanted = (teacher.detach() / tau).softmax(-1)
        return tau**2 * (wanted * (wanted.log() - (logits / tau).log_softmax(-1))).sum(-1).mean()

    drawn = drawn_points(config, 0)
    other = next(point for point in drawn[1:] if "@" not in point)
    assert sorted(drawn) == sorted(["8", "8@0.5", other, f"{other}@0.5"])
    whole = {length: fresh(clips, length) for length in ("8", other)}
    total = torch.nn.functional.cross_entropy(whole["8"], labels)
    total = total + 0.6 * torch.nn.functional.cross_entropy(whole[other], labels)
    total = total + 0.4 * divergence(whole["8"], whole[other], 2.0)
    for length, logits in whole.items():
        total = total + divergence(logits, fresh(clips, f"{length}@0.5"), 1.0)
    total.backward()
    for name, parameter in fresh.named_parameters():
        assert (parameter.grad is None) == (name not in found), name
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_parameters_of_lengths_that_are_not_drawn_do_not_move(data: Path, tmp_path: Path) -> None:
    """No gradient, no decay, no momentum, although all parameters have moved before."""
    config = runs.config(data, tmp_path / "run", model=GRID, train=SAMPLED | {"optimizer": "sgd", "lr": 0.1})
    state, batches = first_batches(config)
    with torch.no_grad():
        for parameter in state.model.parameters():  # away from zero: attention over time starts without an effect
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for state.step in range(8):
        before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
        values = train_step(state, alone(state), batches).read(state)
        lengths = {point.partition("@")[0] for point in drawn_points(config, state.step)}
        assert {key.removeprefix("loss/") for key in values if key.startswith("loss/")} == set(
            drawn_points(config, state.step)
        )
        for name, parameter in state.model.named_parameters():
            own = {"8", "6", "4"} & set(name.split("."))  # the numbers of blocks are 0 and 1
            moved = not torch.equal(parameter, before[name])
            assert moved or own - lengths, name
            assert not moved or not own - lengths, name


def test_a_resumed_run_draws_the_points_of_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    config = runs.config(data, tmp_path / "run", model=GRID, train=SAMPLED | {"keep_checkpoints": 9})
    train(config)
    uninterrupted = final_tensors(config)
    for path in sorted((config.run.dir / "checkpoints").glob("step-*"))[1:]:
        path.unlink()
    (config.run.dir / "checkpoints" / "last").unlink()
    (config.run.dir / "train.json").unlink()
    summary = train(config)
    assert set(summary.points) == set(config.model.points)
    assert_same_bits(final_tensors(config), uninterrupted)


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    config = runs.config(data, tmp_path / "run")
    state, batches = first_batches(config)
    with torch.no_grad():
        state.model.head.weight[0, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    with pytest.raises(RunError, match=r"step 0, point 8: the loss is not finite .*rows \["):
        train_step(state, alone(state), batches).read(state)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    state, batches = first_batches(runs.config(data, tmp_path / "run"))
    state.model.cls_token.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    with pytest.raises(RunError, match="gradient is not finite"):
        train_step(state, alone(state), batches).read(state)
    assert all(torch.equal(p, before[name]) for name, p in state.model.named_parameters())


def test_distillation_token_ema_sgd_bf16_checkpointing_and_mixing_train(data: Path, tmp_path: Path) -> None:
    config = runs.config(
        data,
        tmp_path / "run",
        run={"precision": "bf16"},
        model={"distill_token": True},
        data={"mixup": 0.2, "cutmix": 1.0},
        loss={"hard": True, "label_smoothing": 0.1},
        train={
            "epochs": 1,
            "optimizer": "sgd",
            "schedule": "step",
            "milestones": [0.5],
            "accumulate": 2,
            "activation_checkpointing": True,
        },
    )
    summary = train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, summary.steps + 1))
    assert {"loss/8", "loss/6", "loss/4", "top1/4", "lr", "grad_norm", "clips_per_s", "wait_fraction"} <= lines[
        0
    ].keys()
    assert summary.steps == 5
    assert "mfu/4" not in lines[0]  # the first micro-batches are not timed
    for name, point in summary.points.items():
        assert point.mfu is not None
        assert 0 < point.mfu == pytest.approx(lines[-1][f"mfu/{name}"], abs=1e-4)
    # Warm-up in steps 0 and 1, the full rate in step 2, and gamma times it after the milestone at half an epoch.
    rates = [config.train.lr * factor for factor in (1 / 3, 2 / 3, 1.0, config.train.gamma, config.train.gamma)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    ema = load_model(config.run.dir, config.model).state_dict()
    raw = train_checkpoints(config.run.dir).latest().tensors_under("model")  # type: ignore[union-attr]
    assert any(not torch.equal(ema[name], raw[name]) for name in raw)


def start_run(config: Config, folder: Path) -> subprocess.Popen[bytes]:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", "videoadapt", "train", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def wait_for_step(config: Config, step: int, process: subprocess.Popen[bytes]) -> None:
    metrics = config.run.dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        time.sleep(0.01)
    raise AssertionError("the run did not get to the step in time")


LONG = {"epochs": 6, "save_steps": 3}
STEPS = 30


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a finished run that was never interrupted."""
    config = runs.config(data, tmp_path_factory.mktemp("uninterrupted") / "run", train=LONG)
    train(config)
    return config


def test_a_run_killed_in_the_middle_of_an_epoch_ends_with_the_same_bits(
    data: Path, tmp_path: Path, uninterrupted: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.config(data, tmp_path / "run", train=LONG, data={"workers": 1})
    process = start_run(config, tmp_path)
    wait_for_step(config, 7, process)  # 5 steps an epoch, checkpoints at 3, 6, 9 ...
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = int(train_checkpoints(config.run.dir).latest().meta["step"])  # type: ignore[union-attr]
    assert 0 < stopped_at < STEPS and stopped_at % 5  # noqa: PT018 - in the middle of an epoch
    train(config)
    assert f"at step {stopped_at}" in capsys.readouterr().err
    assert_same_bits(final_tensors(config), final_tensors(uninterrupted))
    steps = [json.loads(line)["step"] for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_ctrl_c_saves_and_exits_with_130(data: Path, tmp_path: Path, uninterrupted: Config) -> None:
    config = runs.config(data, tmp_path / "run", train=LONG | {"save_steps": 0})
    process = start_run(config, tmp_path)
    wait_for_step(config, 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors.decode()
    assert train_checkpoints(config.run.dir).latest() is not None
    train(config)
    assert_same_bits(final_tensors(config), final_tensors(uninterrupted))


def test_a_torn_last_checkpoint_falls_back_to_the_one_before(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], uninterrupted: Config
) -> None:
    config = runs.config(data, tmp_path / "run", train=LONG)
    shutil.copytree(uninterrupted.run.dir, config.run.dir)
    folder = config.run.dir / "checkpoints"
    newest = folder / (folder / "last").read_text()
    newest.write_bytes(newest.read_bytes()[:1000])
    train(config)
    assert "torn" in capsys.readouterr().err
    assert load_checkpoint(newest, "train").meta["step"] == STEPS
    assert_same_bits(final_tensors(config), final_tensors(uninterrupted))


def test_another_architecture_or_recipe_is_refused(data: Path, tmp_path: Path) -> None:
    config = runs.config(data, tmp_path / "run", train={"epochs": 1})
    train(config)
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()}
    with pytest.raises(CheckpointError, match=r"model\.width is 32 in the checkpoint, 64 in the config"):
        train(runs.config(data, tmp_path / "run", model={"width": 64}))
    with pytest.raises(CheckpointError, match=r"train\.lr is 0\.002 in the checkpoint, 0\.1 in the config"):
        train(runs.config(data, tmp_path / "run", train={"lr": 0.1}))
    with pytest.raises(CheckpointError, match="manifest"):  # another seed holds out other clips
        train(runs.config(data, tmp_path / "run", run={"seed": 2}))
    assert {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()} == before


@pytest.mark.parametrize(
    ("source", "validate"), [("train", "val"), ("train", "holdout"), ("holdout", "val"), ("teacher", "val")]
)
def test_a_holdout_that_no_stage_uses_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, validate: str
) -> None:
    config = runs.config(
        data,
        tmp_path / "run",
        data={"validate": validate},
        train={"validate_every": 1},
        label={"source": source},
    )
    say_splits(load_or_index(config), config)
    assert ("no stage uses the" in capsys.readouterr().err) == ((source, validate) == ("train", "val"))


def test_videos_that_cannot_be_read_are_skipped_counted_and_listed(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    config = runs.config(copy, tmp_path / "run", train={"epochs": 1, "batch": 4})
    manifest = load_or_index(config)
    bad = Path(manifest.split("train").table["path"][0])
    bad.write_bytes(bad.read_bytes()[:200])  # after it was indexed
    summary = train(config)
    assert summary.skipped == 1
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["path"] for line in listed] == [str(bad)]
    assert summary.steps == len(manifest.split("train")) // 4


def test_a_run_does_not_go_on_with_its_videos_in_another_order(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    config = runs.config(tmp_path / "data", tmp_path / "run", train={"epochs": 2})
    summary = train(config)
    list_ = tmp_path / "data" / "train.csv"
    list_.write_text("".join(reversed(list_.read_text().splitlines(keepends=True))))
    assert train(config) == summary  # no step is left
    checkpoints = config.run.dir / "checkpoints"
    for path in (sorted(checkpoints.glob("step-*"))[-1], checkpoints / "last", config.run.dir / "train.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="the same videos in another order"):
        train(config)


def test_a_step_of_which_no_clip_can_be_read_changes_nothing(data: Path, tmp_path: Path) -> None:
    state, batches = first_batches(runs.config(data, tmp_path / "run", train={"ema": 0.9}))
    role = alone(state)
    train_step(state, role, batches).read(state)  # from here on, momentum and moving average would go on
    before = {name: tensor.clone() for name, tensor in state.saved()[0].items()}
    empty = [replace(batch.without_clips(), failures=[Failure(0, "a.mp4", "gone")]) for batch in batches]
    assert train_step(state, role, empty).read(state).keys() == {"grad_norm", "lr"}
    assert_same_bits(before, state.saved()[0])
    assert state.skipped == len(batches)


def test_the_trained_steps_are_saved_if_reading_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would find that the files are missing.
    monkeypatch.setattr("videoadapt.training.train.preflight", lambda *_: Rates(1e10, None))
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    config = runs.config(copy, tmp_path / "run", train={"epochs": 2, "batch": 4, "save_steps": 0})
    manifest = load_or_index(config)
    for row in epoch_rows(manifest, config, 0)[2:].flat:  # after two steps the file system goes away
        Path(manifest.row(int(row)).path).unlink()
    with pytest.raises(RunError, match="of the last .* training clips"):
        train(config)
    saved = train_checkpoints(config.run.dir).latest()
    assert saved is not None
    steps = [json.loads(line)["step"] for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert saved.meta["step"] == steps[-1] > 2


@pytest.mark.parametrize("which", ["ema", "last"])
def test_the_config_decides_which_weights_a_run_starts_from_and_how_grids_are_resampled(
    tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = runs.values(tmp_path, tmp_path / "run")["model"] | {"size": 32, "points": ["4"]}
    last = TimeSformer(ModelConfig(**small)).state_dict()
    ema = {name: tensor + 1.0 for name, tensor in last.items()}
    torch.save({"model": last, "model_ema": ema}, tmp_path / "a.pth")
    settings = {"init": str(tmp_path / "a.pth"), "weights": which, "resample": "nearest", "ema": None}
    config = runs.config(tmp_path, tmp_path / "run", train=settings, model={"points": ["8"]})
    manifest: Any = SimpleNamespace(classes=(), hash="")  # of a manifest, only these are read
    state = start_or_resume(config, manifest, train_checkpoints(tmp_path / "run"))
    grid = (ema if which == "ema" else last)["pos_embed.grid.4"].view(4, 4, -1)
    expected = torch.stack([grid[row // 2, column // 2] for row in range(8) for column in range(8)])
    assert torch.equal(state.model.pos_embed.grid["8"], expected)
    assert ("the moving average model_ema" if which == "ema" else "the last weights") in capsys.readouterr().err
