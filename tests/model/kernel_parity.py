"""Compares the kernels with the plain path, in Triton's interpreter: `TRITON_INTERPRET=1 python kernel_parity.py`.

A script of its own, because Triton reads the variable when it is imported. Prints JSON: for each case the largest error
of the logits over the largest logit, the largest relative error of a gradient, and whether the same ones are there.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from videoadapt.config.sections import ModelConfig
from videoadapt.model import block, timesformer
from videoadapt.model.attention import attend_over_time
from videoadapt.model.kernels import temporal_attention
from videoadapt.model.timesformer import TimeSformer

SMALL: dict[str, Any] = {"width": 12, "depth": 2, "heads": 2, "patch": 4, "size": 8, "num_frames": 2}
SMALL |= {"num_classes": 5, "points": ("2",), "drop_blocks": (1,)}
CASES: dict[str, dict[str, Any]] = {
    "image": {"temporal": False, "num_frames": 1},
    "all options": {
        **{"points": ("2", "2@0.5", "1"), "distill_token": True},
        **{"layer_scale": 0.5, "residual_scale": 0.5, "drop_path": 0.5},
    },
    "sequences dropped": {"drop_path": 0.5, "drop_path_unit": "sequence"},
}
SHAPES = ((2, 8, 10, 1, 16), (1, 3, 2, 2, 24), (1, 96, 2, 1, 16))  # B, T, N, M, D / M


def outcome(model: TimeSformer, point: str, *, kernels: bool, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one batch."""
    block.has_kernel = lambda x: kernels  # as on CUDA
    timesformer._fuses = lambda patches: kernels
    model.activation_checkpointing = checkpointing
    model.zero_grad()
    torch.manual_seed(3)  # for drop path
    clips = torch.randn(2, 3, model.config.num_frames, 8, 8)
    logits = model(clips, point)
    assert isinstance(logits, Tensor)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(name: str, options: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """One row for each point."""
    torch.manual_seed(0)
    model = TimeSformer(ModelConfig(**SMALL | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # no gradient is zero
    rows = []
    for point in model.config.points:
        logits, gradients = outcome(model, point, kernels=False, checkpointing=False)
        got, got_gradients = outcome(model, point, kernels=True, checkpointing=name == "all options")
        errors = [
            float((got_gradients[key] - value).norm() / value.norm().clamp(min=1e-6))
            for key, value in gradients.items()
            if key in got_gradients
        ]
        error = float((got - logits).abs().max() / logits.abs().max())
        rows.append((f"{name} {point}", error, max(errors), gradients.keys() == got_gradients.keys()))
    return rows


def attention() -> list[tuple[str, float, float, bool]]:
    """One row for each shape of temporal attention."""
    rows = []
    for shape in SHAPES:
        clips, frames, positions, heads, width = shape
        qkv = torch.randn(clips, frames, positions, 3 * heads * width, requires_grad=True)
        results = []
        for function in (attend_over_time, temporal_attention.attend_over_time):
            out = function(qkv, heads)
            (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
            results.append((out.detach(), gradient))
        (out, gradient), (got, got_gradient) = results
        error = float((got - out).abs().max() / out.abs().max())
        rows.append((f"attention {shape}", error, float((got_gradient - gradient).norm() / gradient.norm()), True))
    return rows


if __name__ == "__main__":
    print(json.dumps(attention() + [row for name, options in CASES.items() for row in compare(name, options)]))
