"""`train.compile`: which module is compiled, and what happens if the compiler fails."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import small_runs as runs
from videoadapt.model.timesformer import TimeSformer
from videoadapt.training.compile import Compiled
from videoadapt.training.ddp import sum_gradients
from videoadapt.training.groups import make_plan
from videoadapt.training.step import RankRole


@pytest.fixture
def model(tmp_path: Path) -> TimeSformer:
    torch._dynamo.reset()
    config = runs.config(tmp_path, tmp_path / "run", model={"depth": 1, "drop_path": 0.0, "points": ["8"]})
    return TimeSformer(config.model).double()


def clips(model: TimeSformer) -> torch.Tensor:
    config = model.config
    return torch.randn(2, 3, config.num_frames, config.size, config.size, dtype=torch.float64)


def test_training_goes_on_without_a_compiler_that_fails(
    model: TimeSformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    forward, inputs = Compiled(model, model), clips(model)
    for _ in range(2):
        assert torch.equal(forward(inputs, "8"), model(inputs, "8"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "train.compile" in line]
    assert len(lines) == 1
    assert "no C++ compiler" in lines[0]


def test_the_graph_is_that_of_ddp_and_gives_the_same_gradients(
    model: TimeSformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    inputs = clips(model)
    model(inputs, "8").square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        forward = Compiled(sum_gradients(model), model)
        forward(inputs, "8").square().sum().backward()
    finally:
        dist.destroy_process_group()
    assert graphs
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("choice", "compiles"), [("auto", False), ("on", True), ("off", False)])
def test_only_on_compiles_until_a_gpu_has_shown_that_it_pays(choice: str, compiles: bool, tmp_path: Path) -> None:
    config = runs.config(tmp_path, tmp_path / "run", train={"compile": choice})
    model = TimeSformer(config.model)
    role = RankRole.from_plan(config, model, make_plan(config, 1, {}))
    assert role.module is model
    assert isinstance(role.forward, Compiled) == compiles


def test_activation_checkpointing_compiles_into_one_graph_and_gives_the_same_gradients(tmp_path: Path) -> None:
    torch._dynamo.reset()
    config = runs.config(tmp_path, tmp_path / "run", model={"depth": 2, "drop_path": 0.3, "points": ["8"]})
    model = TimeSformer(config.model).double().train()
    inputs, gradients = clips(model), []
    for checkpointing, forward in ((False, model), (True, torch.compile(model, backend="aot_eager", fullgraph=True))):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(0)  # of drop path
        forward(inputs, "8").square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
