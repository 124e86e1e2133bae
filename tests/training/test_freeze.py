"""Frozen parts: they do not move, and cost neither memory nor a backward pass."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs as runs
from videoadapt.config.sections import ModelConfig
from videoadapt.data.clips.loader import train_batches
from videoadapt.data.index.manifest import load_or_index
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.model.timesformer import TimeSformer
from videoadapt.training.freeze import freeze, set_training_mode
from videoadapt.training.groups import make_plan
from videoadapt.training.step import RankRole, train_step
from videoadapt.training.train import start_or_resume


def tiny(**values: Any) -> TimeSformer:
    config = {"width": 32, "depth": 3, "heads": 2, "patch": 4, "size": 16, "num_frames": 2, "num_classes": 7}
    return TimeSformer(ModelConfig(**config | {"points": ("4", "2"), "drop_path": 0.5} | values))


def trainable(model: TimeSformer) -> set[str]:
    names = (name.split(".") for name, p in model.named_parameters() if p.requires_grad)
    return {".".join(name[: 2 if name[0] == "blocks" else 1]) for name in names}


def test_a_number_freezes_embeddings_and_first_blocks_and_backbone_all_but_the_heads() -> None:
    model = tiny(distill_token=True)
    freeze(model, 0)
    assert trainable(model) == {"blocks.0", "blocks.1", "blocks.2", "norm", "head", "head_dist"}
    freeze(model, 2)
    assert trainable(model) == {"blocks.2", "norm", "head", "head_dist"}
    freeze(model, "backbone")
    assert trainable(model) == {"head", "head_dist"}
    freeze(model, None)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("embed", ["resize", "stem"])
def test_no_graph_is_kept_of_frozen_parts_and_they_are_in_inference_mode(embed: str) -> None:
    model = tiny(embed=embed)
    freeze(model, 2)
    set_training_mode(model, 2)
    graphs: dict[int, bool] = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, n=number: graphs.update({n: out[1].requires_grad}))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    clips = torch.randn(2, 3, 2, 16, 16)
    model(clips, "4").sum().backward()
    assert graphs == {0: False, 1: False, 2: True}
    assert [block.training for block in model.blocks] == [False, False, True]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())  # BatchNorm's statistics
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_frozen_weights_keep_their_bits_in_model_and_average(tmp_path: Path) -> None:
    data, source = runs.make_data(tmp_path / "data"), tmp_path / "init.pth"
    torch.save(TimeSformer(runs.config(data, tmp_path / "run").model).state_dict(), source)
    settings = {"init": str(source), "freeze": 1, "weight_decay": 0.5, "layer_decay": 0.8}
    config = runs.config(data, tmp_path / "run", train=settings, loss={"class_weights": "balanced"})
    manifest = load_or_index(config)
    state = start_or_resume(config, manifest, train_checkpoints(config.run.dir))
    assert state.ema is not None
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    role = RankRole.from_plan(config, state.model, make_plan(config, 1, {}))
    for batches in itertools.islice(train_batches(manifest, config), 2):
        train_step(state, role, batches)
    tensors, _ = state.saved()
    for name, start in before.items():
        frozen = not name.startswith(("blocks.1.", "norm.", "head."))
        assert torch.equal(tensors[f"model/{name}"], start) == frozen, name
        assert torch.equal(tensors[f"ema/{name}"], start) == frozen, name
        assert (f"optimizer/{name}/exp_avg" in tensors) != frozen, name
