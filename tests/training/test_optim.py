"""Which parameters decay, which do not move, and the learning rate at known steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from videoadapt.config.sections import ModelConfig, TrainConfig
from videoadapt.model.timesformer import TimeSformer
from videoadapt.training.optim import decays, make_optimizer, make_schedule

TINY: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "size": 16, "num_frames": 2, "num_classes": 3}


def tiny(**changes: Any) -> TimeSformer:
    torch.manual_seed(0)
    return TimeSformer(ModelConfig(**(TINY | {"points": ("4", "2")} | changes)))


def rates(config: TrainConfig, per_epoch: int, steps: int) -> list[float]:
    optimizer = make_optimizer([("w", torch.nn.Parameter(torch.zeros(2, 2)))], config)
    schedule = make_schedule(optimizer, config, per_epoch)
    found = []
    for step in range(steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("embed", ["resize", "kernel", "stem"])
def test_only_matrices_and_kernels_decay(embed: str) -> None:
    model = tiny(embed=embed, distill_token=True, layer_scale=0.1)
    decayed = {name for name, parameter in model.named_parameters() if decays(name, parameter)}
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) or type(module).__name__ == "Projection"
    }
    assert decayed == matrices
    rest = {name for name, _ in model.named_parameters()} - decayed
    for kind in ("cls_token", "dist_token", "time_embed", "pos_embed.grid", "pos_embed.cls", "pos_embed.dist", ".bias"):
        assert any(kind in name for name in rest), kind
    for kind in ("norm1.weight", "temporal_norm.weight", "scale1", "scale2", "temporal_scale"):
        assert any(kind in name for name in rest), kind


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_parameter_is_in_one_group(optimizer: Any) -> None:
    model = tiny()
    made = make_optimizer(model.named_parameters(), TrainConfig(optimizer=optimizer, weight_decay=0.3))
    grouped = [id(p) for group in made.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_moves_only_matrices_and_kernels(optimizer: Any) -> None:
    model = tiny()
    config = TrainConfig(optimizer=optimizer, weight_decay=0.5, lr=0.1)
    made = make_optimizer(model.named_parameters(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if decays(name, parameter) else before[name]
        assert torch.allclose(parameter, expected), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_length_that_was_not_drawn_does_not_move(optimizer: Any) -> None:
    model = tiny()
    config = TrainConfig(optimizer=optimizer, weight_decay=0.5, lr=0.1)
    made = make_optimizer(model.named_parameters(), config)
    clips = torch.randn(2, 3, 2, 16, 16)

    def step(point: str) -> None:
        made.zero_grad(set_to_none=True)
        model(clips, point).square().sum().backward()
        made.step()

    step("2")  # leaves momentum behind
    own = {name: p for name, p in model.named_parameters() if "2" in name.split(".")}
    before = {name: p.detach().clone() for name, p in own.items()}
    states = {name: {k: torch.as_tensor(v).clone() for k, v in made.state[p].items()} for name, p in own.items()}
    shared = model.head.weight.detach().clone()
    step("4")
    assert len(own) > 10
    assert not torch.equal(model.head.weight, shared)
    for name, parameter in own.items():
        assert torch.equal(parameter, before[name]), name
        assert all(torch.equal(torch.as_tensor(made.state[parameter][k]), v) for k, v in states[name].items())


def test_the_optimizer_has_the_settings_of_the_config() -> None:
    named = [("w", torch.nn.Parameter(torch.zeros(2, 2)))]
    adamw = make_optimizer(named, TrainConfig(optimizer="adamw", lr=0.01, betas=(0.8, 0.95)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["lr"], adamw.defaults["betas"]) == (0.01, (0.8, 0.95))
    sgd = make_optimizer(named, TrainConfig(optimizer="sgd", lr=0.02, momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.02, 0.7)


def test_three_steps_of_timesformers_sgd_are_those_of_its_formulas() -> None:
    """Nesterov's momentum, and decay of all parameters but BatchNorms, as in TimeSformer's public code."""
    model = tiny(embed="stem", distill_token=True)
    config = TrainConfig(nesterov=True, decay="all", lr=0.1, momentum=0.9, weight_decay=0.3)
    made = make_optimizer(model.named_parameters(), config)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        gradients = {name: torch.randn_like(value).float() for name, value in expected.items()}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        made.step()
        for name, value in expected.items():
            slope = gradients[name].double() + (0.0 if "bn" in name else 0.3) * value
            momenta[name] = slope if step == 0 else 0.9 * momenta[name] + slope
            expected[name] = value - 0.1 * (slope + 0.9 * momenta[name])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], atol=1e-5, rtol=1e-5, msg=name)
    assert {name.split(".")[-2] for name in expected if "bn" in name} == {"bn1", "bn2", "bn3"}
    assert all(decays(name, p, "all") for name, p in tiny().named_parameters())


def test_step_schedule_falls_exactly_at_its_milestones() -> None:
    config = TrainConfig(schedule="step", lr=1.0, gamma=0.1, milestones=(2, 3.5), epochs=5)
    found = rates(config, per_epoch=10, steps=50)
    assert found == pytest.approx([1.0] * 20 + [0.1] * 15 + [0.01] * 15)


def test_the_order_of_milestones_does_not_matter() -> None:
    config = TrainConfig(schedule="step", lr=1.0, epochs=5)
    in_order, mixed = (rates(config.model_copy(update={"milestones": m}), 4, 20) for m in ((1, 2, 3, 4), (4, 2, 1, 3)))
    assert in_order == mixed


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_warm_up_rises_linearly_to_the_full_rate(schedule: Any) -> None:
    config = TrainConfig(schedule=schedule, lr=1.0, milestones=(3,), epochs=4, warmup_epochs=1)
    found = rates(config, per_epoch=4, steps=16)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    peak = 1.0 if schedule == "step" else (1 + math.cos(math.pi * 4 / 16)) / 2
    assert found[4] == pytest.approx(peak)
    assert max(found) == found[4]


def test_the_warm_up_does_not_shift_the_milestones() -> None:
    config = TrainConfig(schedule="step", lr=1.0, milestones=(3,), epochs=4, warmup_epochs=1)
    assert rates(config, per_epoch=4, steps=16)[11:13] == pytest.approx([1.0, 0.1])


def test_a_cosine_falls_from_lr_to_min_lr() -> None:
    config = TrainConfig(schedule="cosine", lr=1.0, min_lr=0.1, epochs=5)
    found = rates(config, per_epoch=10, steps=51)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * t / 50)) / 2 for t in range(50)]
    assert found[:50] == pytest.approx(expected)
    assert found[50] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_rate_depends_on_the_step_alone(schedule: Any) -> None:
    config = TrainConfig(schedule=schedule, lr=0.3, milestones=(1, 2), epochs=3, warmup_epochs=0.5)
    optimizer = make_optimizer([("w", torch.nn.Parameter(torch.zeros(2, 2)))], config)
    make_schedule(optimizer, config, 8).step_update(13)
    assert optimizer.param_groups[0]["lr"] == rates(config, 8, 14)[13]


def test_layer_decay_has_timms_scales() -> None:
    """The same parameters of timm's ViT and of ours, at each of the 5 layers."""
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay

    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=7)
    theirs = {id(p): g["lr_scale"] for g in param_groups_layer_decay(vit, layer_decay=0.7) for p in g["params"]}
    scales = {name: theirs[id(p)] for name, p in vit.named_parameters()}
    model = tiny(depth=3)
    config = TrainConfig(layer_decay=0.7, lr=0.1, schedule="cosine", epochs=2, warmup_epochs=1)
    made = make_optimizer(model.named_parameters(), config)
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
    schedule = make_schedule(made, config, 10)
    for step in (0, 10, 15):
        schedule.step_update(step)
        rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
        ours = {name: rates[id(p)] for name, p in model.named_parameters()}
        top = ours["head.weight"]  # the full rate
        assert max(rates.values()) == top
        for name in ("cls_token", "blocks.0.attn.qkv.weight", "blocks.2.mlp.fc1.bias", "head.weight"):
            assert ours[name] == pytest.approx(scales[name] * top), name
        assert ours["norm.weight.4"] == pytest.approx(scales["norm.weight"] * top)
        assert ours["patch_embed.proj.4.weight"] == pytest.approx(scales["patch_embed.proj.weight"] * top)
        assert ours["blocks.1.temporal_fc.weight"] == pytest.approx(scales["blocks.1.attn.proj.weight"] * top)
