"""Weights that are cast together equal weights that are cast one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from videoadapt.model.cast import cast_weights, own_weights

CUDA = torch.device("cuda")


def test_the_cast_and_its_gradient_are_those_of_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(4, 3), nn.Linear(3, 2, bias=False)]
    layers[0].bias.requires_grad_(False)  # frozen
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    weights = cast_weights(layers, CUDA)
    for layer in layers:
        weight, bias = weights(layer)
        assert torch.equal(weight, layer.weight.bfloat16())
        assert (bias is None) == (layer.bias is None)
        weight.backward(torch.full_like(weight, 0.1), retain_graph=True)
        assert layer.weight.grad is not None
        assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 0.1).bfloat16().float())
    assert layers[0].bias.grad is None
    assert cast_weights(layers, torch.device("cpu")) is own_weights


def test_nothing_is_cast_without_autocast() -> None:
    assert cast_weights([nn.Linear(2, 2)], CUDA) is own_weights
