"""Weights under autocast on CUDA: one cast for all linear layers of a block, instead of one for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Weights: TypeAlias = Callable[[nn.Linear], tuple[Tensor, Tensor | None]]  # the weight and the bias of a layer


def own_weights(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and the bias of a layer as they are."""
    return layer.weight, layer.bias


def cast_weights(layers: Sequence[nn.Linear], device: torch.device) -> Weights:
    """Returns a function that gives the weight and the bias of each of some layers, in the dtype of autocast.

    A block has 14 weights and biases. Autocast casts each of them in a launch of its own, and each gradient in another
    one; a small batch waits for these launches. `torch.compile` fuses them, and a CPU launches nothing.

    Args:
        layers: The layers.
        device: Where they run.
    """
    dtype = layers[0].weight.dtype
    is_cast = device.type == "cuda" and torch.is_autocast_enabled("cuda") and dtype == torch.float32
    if not is_cast or torch.compiler.is_compiling():
        return own_weights
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    cast = dict(zip(parameters, _Cast.apply(torch.get_autocast_dtype("cuda"), *parameters), strict=True))
    return lambda layer: (cast[layer.weight], None if layer.bias is None else cast[layer.bias])


class _Cast(torch.autograd.Function):
    """Casts float32 tensors to a dtype, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _cast(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast(grads, torch.float32)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    out = [torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) for tensor in tensors]
    torch._foreach_copy_(out, list(tensors))  # one launch for all that have equal strides
    return tuple(out)
