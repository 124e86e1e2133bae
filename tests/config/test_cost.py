"""Costs computed from the architecture equal the MACs that torch counts in a forward pass."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import small_runs as runs
from videoadapt.config.cost import Cost, backward_macs, point_cost, point_macs
from videoadapt.config.load import load_config
from videoadapt.config.points import Point
from videoadapt.config.sections import AssignConfig, ModelConfig
from videoadapt.model.block import Block
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner, assigner_macs
from videoadapt.training.freeze import freeze

CONFIGS = Path(__file__).parents[2] / "configs"

TINY: dict[str, Any] = {"width": 24, "depth": 2, "heads": 3, "patch": 4, "size": 32, "num_frames": 3, "num_classes": 5}
IMAGE: dict[str, Any] = {"temporal": False, "num_frames": 1}
KEEPS: dict[str, Any] = {"points": ("8", "8@0.7", "8@0.2", "5", "5@0.5", "3", "3@0.6"), "drop_blocks": (1, 2)}


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**(TINY | {"points": ("8", "5", "3")} | changes))


def counted(model: TimeSformer, point: str, batch: int = 1) -> int:
    """MACs by torch: of attention it counts the two products only where they are plain matrix products."""
    config, device = model.config, model.cls_token.device
    clips = torch.zeros(batch, 3, config.num_frames, config.size, config.size, device=device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with mock.patch.object(Block, "_project_over_time", apart):
            model(clips, point)
    return counter.get_total_flops() // 2


def apart(block: Block, x: Tensor, *_: Any) -> Tensor:
    """The two layers after temporal attention one after the other, as in the papers, and not as one."""
    return block.temporal_fc(block.temporal_attn.proj(x))


@pytest.mark.parametrize("frozen", [None, 0, 1, 2, "backbone"])
@pytest.mark.parametrize("changes", [{}, KEEPS, IMAGE], ids=["video", "keeps", "image"])
def test_a_backward_pass_costs_twice_the_layers_that_are_trained(changes: dict[str, Any], frozen: Any) -> None:
    config = tiny(**changes)
    model = TimeSformer(config).eval()
    freeze(model, frozen)
    for point, forward in point_macs(config).items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with mock.patch.object(Block, "_project_over_time", apart):
                model(torch.zeros(2, 3, config.num_frames, config.size, config.size), point).sum().backward()
        # torch computes no gradients of the pixels, and none of the input of the heads if nothing else is trained.
        cost = point_cost(config, point)
        unneeded = {None: cost.embedding, "backbone": cost.head}.get(frozen, 0)
        found = counter.get_total_flops() // 4 - forward  # 2 clips, 2 operations
        share_of_scores = 0.01 if "@" in point else 0.0  # of tokens, for dropping: they have no gradient
        assert found == pytest.approx(backward_macs(config, point, frozen) - unneeded, rel=share_of_scores, abs=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embed": "kernel"},
        {"embed": "kernel", "size": 33},
        {"embed": "kernel", "share_patch": True},
        {"embed": "stem"},
        {"embed": "stem", "share_patch": True},
        {"distill_token": True},
        {"distill_token": True, "embed": "stem", **IMAGE},
        {"layer_scale": 0.1, "share_norm": True, "share_pos": True},
        {"mlp_ratio": 2.7, "width": 30},
        {"dense_head": 0.25, "embed": "stem", "qkv_bias": False, "residual_scale": 0.5, **IMAGE},
        {"dense_head": 0.25, "distill_token": True},
        {"num_frames": 1},
        IMAGE,
        KEEPS,
        KEEPS | IMAGE,
        KEEPS | {"dense_head": 0.25},
        KEEPS | {"distill_token": True, "embed": "kernel"},
    ],
    ids=str,
)
def test_costs_equal_what_torch_counts(changes: dict[str, Any]) -> None:
    model = TimeSformer(tiny(**changes)).eval().requires_grad_(False)
    assert point_macs(model.config) == {point: counted(model, point) for point in model.config.points}


def test_costs_per_view_do_not_depend_on_the_batch() -> None:
    config = tiny()
    assert counted(TimeSformer(config).eval().requires_grad_(False), "5", batch=4) == 4 * point_cost(config, "5").total


def test_a_point_is_given_as_text_or_as_a_point() -> None:
    config = tiny(distill_token=True)
    for point in config.points:
        assert point_cost(config, point) == point_cost(config, Point.parse(point))


def test_components_add_up_to_the_total_and_a_missing_component_costs_nothing() -> None:
    cost = point_cost(tiny(**IMAGE), "8")
    assert cost.temporal_attention == 0
    assert sum(asdict(cost).values()) == cost.total
    assert Cost(1, 2, 3, 4, 5).total == 15


@given(
    st.sets(st.tuples(st.integers(3, 14), st.sampled_from([0.3, 0.5, 0.7, 1.0])), min_size=2),
    st.booleans(),
    st.sampled_from(["resize", "kernel", "stem"]),
)
def test_points_are_listed_costliest_first(points: set[tuple[int, float]], token: bool, embed: Any) -> None:
    config = ModelConfig(points=tuple(str(Point(*point)) for point in points), distill_token=token, embed=embed)
    found = list(point_macs(config).values())
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    "config", [AssignConfig(frames=2, size=48, stages=4), AssignConfig(frames=1, size=32, stages=3)]
)
def test_the_cost_of_the_assigner_equals_what_torch_counts(config: AssignConfig) -> None:
    assigner = Assigner(config, 3).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        assigner(torch.zeros(1, 3, config.frames, config.size, config.size, dtype=torch.uint8))
    assert assigner_macs(config, 3) == counter.get_total_flops() // 2
    assert assigner_macs(config, 3) > 1000


def test_counting_the_assigner_changes_neither_default_device_nor_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assigner_macs(AssignConfig(frames=1, size=32, stages=2), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.zeros(1).device.type == "cpu"


# SuperViT's Table 1: GMACs an image at keep 0.5, 0.7 and 1.0.
DEIT_S = {14: (2.30, 3.01, 4.60), 12: (1.67, 2.19, 3.32), 10: (1.16, 1.51, 2.27), 8: (0.74, 0.97, 1.44)}
LVVIT_S = {14: (3.4, 4.3, 6.6), 12: (2.5, 3.2, 4.7), 10: (1.7, 2.2, 3.3), 8: (1.1, 1.4, 2.0)}


@pytest.mark.parametrize(
    ("name", "printed", "tolerance"),
    [("deit_s", DEIT_S, {"abs": 0.005}), ("lvvit_s", LVVIT_S, {"rel": 0.03})],  # the printed digit; 3 %
)
def test_the_points_of_supervit_cost_what_its_table_1_prints(
    tmp_path: Path, name: str, printed: dict[int, tuple[float, ...]], tolerance: dict[str, Any]
) -> None:
    """By the command, and by what torch counts on a forward pass (without values, which take half a minute)."""
    path = CONFIGS / f"supervit_{name}_in1k.yaml"
    done = runs.command("flops", path, "--json", f"run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = {row["point"]: row["macs_per_view"] for row in json.loads(done.stdout)["points"]}
    table = {str(Point(n, k)): v for n, row in printed.items() for k, v in zip((0.5, 0.7, 1.0), row, strict=True)}
    assert {point: value / 1e9 for point, value in found.items()} == pytest.approx(table, **tolerance)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    with torch.device("meta"):
        model = TimeSformer(load_config(path).model).eval().requires_grad_(False)
    assert {point: counted(model, point) for point in table} == {point: found[point] for point in table}
