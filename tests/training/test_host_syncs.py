"""A training step never waits for the device. Its tensors are on the meta device, which has no values to wait for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import small_runs as runs
from videoadapt.data.clips.datasets import Failure
from videoadapt.data.clips.loader import Batch
from videoadapt.data.index.manifest import SCHEMA, Manifest
from videoadapt.errors import RunError
from videoadapt.training import step as module
from videoadapt.training.groups import make_plan
from videoadapt.training.state import State
from videoadapt.training.step import RankRole, train_step
from videoadapt.training.step_report import Reports, StepReport

META, CPU = torch.device("meta"), torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "lengths, mixup, EMA": {"data": {"mixup": 0.8, "cutmix": 1.0}, "train": {"ema": 0.9, "clip_grad": 1.0}},
    "keeps": {"model": {"points": ["8", "8@0.5", "4"], "drop_blocks": [1]}, "train": {"accumulate": 2}},
    "stem, distillation token": {"model": {"embed": "stem", "distill_token": True}},
}


class CopiesToHost(TorchDispatchMode):
    """Counts copies from the device to the host, and gives them the value 1."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == CPU and args[0].device == META:
            assert kwargs["non_blocking"], "a copy that the host waits for"
            self.count += 1
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        return func(*args, **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_host_reads_one_copy_per_step(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other look at a value of the device raises here: `.item()`, `.cpu()`, `bool()` or an index of booleans."""
    config = runs.config(tmp_path, tmp_path / "run", **VARIANTS[variant])
    state = State.start(config, Manifest(SCHEMA.empty_table(), tuple(map(str, range(config.model.num_classes)))))
    state.device = META
    for model in filter(None, (state.model, state.ema and state.ema.module)):
        model.to_empty(device=META)
    # The fused kernels, which look at no value either, refuse the meta device.
    monkeypatch.setattr(state.optimizer, "step", lambda: None)
    monkeypatch.setattr(module.torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the device
    role = RankRole.from_plan(config, state.model, make_plan(config, 1, {}))
    with CopiesToHost() as copies:
        report = train_step(state, role, [_clips(config, number) for number in range(config.train.accumulate)])
        assert copies.count == 1
        values = report.read(state)
    assert values["loss/8"] == values["grad_norm"] == 1.0
    assert copies.count == 1


def _clips(config: Any, micro_batch: int) -> Batch:
    count, model = config.train.micro_batch, config.model
    frames = torch.zeros((count, 3, model.num_frames, model.size, model.size), dtype=torch.uint8, device=META)
    positions = range(micro_batch * count, (micro_batch + 1) * count)
    return Batch(frames, torch.zeros(count, dtype=torch.int64, device=META), torch.tensor(positions), [*positions], [])


def test_a_report_is_read_one_step_late_on_a_gpu() -> None:
    for device, late in ((torch.device("cuda"), 1), (CPU, 0)):
        taken: list[int] = []
        reports = Reports(device, lambda report, _, taken=taken: bool(taken.append(report.step)))  # type: ignore[misc]
        for step in range(3):
            reports.add(_report(step))
            assert taken == list(range(step + 1 - late))
        assert not reports.take_all()
        assert taken == [0, 1, 2]


def _report(step: int) -> StepReport:
    return StepReport(step, {}, torch.zeros(6, dtype=torch.float64), None, 0.1, [])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("embed", ["resize", "stem"])
def test_a_bad_step_changes_nothing(
    optimizer: str, embed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, momentum, moving average and the statistics of BatchNorms stay, also if the report is read late."""
    train = {"optimizer": optimizer, "ema": 0.5, "lr": 0.1}
    config = runs.config(tmp_path, tmp_path / "run", train=train, model={"embed": embed})
    row = {field.name: {pa.string(): "", pa.bool_(): False}.get(field.type, 0) for field in SCHEMA}
    videos = pa.Table.from_pylist([row | {"video": f"clip{n}"} for n in range(config.train.batch)], schema=SCHEMA)
    state = State.start(config, Manifest(videos, tuple(map(str, range(config.model.num_classes)))))
    role = RankRole.from_plan(config, state.model, make_plan(config, 1, {}))
    generator = torch.Generator().manual_seed(3)
    batch = _clips(config, 0)
    clips = torch.randint(0, 256, batch.clips.shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, config.model.num_classes, batch.labels.shape, generator=generator)
    batch = Batch(clips, labels, batch.videos, batch.positions, [])
    train_step(state, role, [batch]).read(state)
    before = _tensors(state)
    loss_at = module.loss_at
    with monkeypatch.context() as patch:
        patch.setattr(module, "loss_at", lambda *args, **given: loss_at(*args, **given) * float("nan"))
        bad = train_step(state, role, [batch])
    assert all(torch.equal(tensor, before[name]) for name, tensor in _tensors(state).items())
    good = train_step(state, role, [batch])
    with pytest.raises(RunError, match="the loss is not finite on the clips of manifest rows"):
        bad.read(state)
    good.read(state)
    assert not torch.equal(_tensors(state)["model/head.weight"], before["model/head.weight"])


@pytest.mark.parametrize("tokens", [False, True])
def test_a_clip_that_failed_is_replaced_by_one_without_weight(
    tokens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled model sees the same number of clips in every step, and the gradients are those of the rest."""
    model: dict[str, Any] = {"points": ["8", "8@0.5", "4"], "drop_blocks": [1], "drop_path": 0.0}
    changes: dict[str, Any] = {"model": model, "data": {"mixup": 0.8}}
    if tokens:
        changes = {"model": {"dense_head": 0.25, "drop_path": 0.0}, "data": {"mix_token": 1.0}}
    config = runs.config(tmp_path, tmp_path / "run", **changes, train={"batch": 4})
    gradients, seen = [], []
    generator = torch.Generator().manual_seed(3)
    planned = module.planned_clips
    clips = torch.randint(0, 256, (3, *_clips(config, 0).clips.shape[1:]), dtype=torch.uint8, generator=generator)
    batch = Batch(clips, torch.tensor([1, 2, 0]), torch.tensor([0, 1, 3]), [0, 1, 3], [Failure(2, "gone.mp4", "gone")])
    for rows in (planned, lambda *_: 0):
        monkeypatch.setattr(module, "planned_clips", rows)
        state = State.start(config, Manifest(SCHEMA.empty_table(), tuple(map(str, range(config.model.num_classes)))))
        state.model.double()
        state.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        monkeypatch.setattr(state.optimizer, "step", lambda: None)
        report = train_step(state, RankRole.from_plan(config, state.model, make_plan(config, 1, {})), [batch])
        assert report.sums[2] == 3  # clips
        gradients.append({name: p.grad for name, p in state.model.named_parameters() if p.grad is not None})
    points = len(config.model.points)
    assert seen == [4] * points + [3] * points
    padded, unpadded = gradients
    assert padded.keys() == unpadded.keys()
    for name, gradient in unpadded.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-10, atol=1e-10)


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.saved()[0].items()}
