"""The CUDA kernels between two branches of a block, in Triton: add a branch to the tokens, then LayerNorm, in one pass.

The branches read and write tokens in the layouts of `layout.py`, and the kernels go from one to another without a copy.
A branch over patches leaves the prefix as it is. Of a branch over frames, the prefix gets the mean over its copies.

The forward pass keeps the sum alone, and the backward pass normalises it again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from videoadapt.model.layout import FRAMES, PATCHES, TOKENS

_PROGRAMS_PER_PROCESSOR = 8  # of the backward pass, each with its own sums for the gradients of weight and bias


@triton.jit
def _row_of(clip, token, frames, positions, prefix, LAYOUT: tl.constexpr):
    """Returns the row of a token in a layout. For a prefix token in `frames`, the row of its first copy."""
    if LAYOUT == 0:
        row = clip * (prefix + frames * positions) + token
    elif LAYOUT == 1:
        row = clip * frames * positions + token - prefix
    else:
        patch = tl.maximum(token - prefix, 0)
        of_patch = (clip * frames + patch // positions) * (prefix + positions) + prefix + patch % positions
        row = tl.where(token < prefix, clip * frames * (prefix + positions) + token, of_patch)
    return row


@triton.jit
def _load(tensor, clip, token, frames, positions, prefix, width, column, mask, LAYOUT: tl.constexpr):
    """Returns the sum over a token's copies in a layout; zero for the prefix in `patches`. float32."""
    row = _row_of(clip, token, frames, positions, prefix, LAYOUT).to(tl.int64)
    read = mask if LAYOUT != 1 else mask & (token >= prefix)
    total = tl.load(tensor + row * width + column, mask=read, other=0.0).to(tl.float32)
    if LAYOUT == 2 and token < prefix:
        for copy in range(1, frames):
            other = row + copy * (prefix + positions)
            total += tl.load(tensor + other * width + column, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _store(tensor, value, clip, token, frames, positions, prefix, width, column, mask, LAYOUT: tl.constexpr):
    """Writes a value to all copies of a token in a layout."""
    row = _row_of(clip, token, frames, positions, prefix, LAYOUT).to(tl.int64)
    written = mask if LAYOUT != 1 else mask & (token >= prefix)
    value = value.to(tensor.dtype.element_ty)
    tl.store(tensor + row * width + column, value, mask=written)
    if LAYOUT == 2 and token < prefix:
        for copy in range(1, frames):
            tl.store(tensor + (row + copy * (prefix + positions)) * width + column, value, mask=mask)


@triton.jit
def _normalised(x, width, eps, mask):
    """Returns a row with mean 0 and variance 1, and the factor that it was multiplied by."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(mask, x - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * factor, factor


@triton.jit
def _forward(x, branch, gate, weight, bias, out, y, scale, eps, frames, positions, prefix, width,
             SOURCE: tl.constexpr, TARGET: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    clip = row // (prefix + frames * positions)
    token = row % (prefix + frames * positions)
    column = tl.arange(0, COLUMNS)
    mask = column < width
    place = row.to(tl.int64) * width + column
    branch_sum = _load(branch, clip, token, frames, positions, prefix, width, column, mask, SOURCE)
    factor = scale if gate is None else scale * tl.load(gate + clip)
    if SOURCE == 2 and token < prefix:
        factor = factor / frames
    total = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + factor * branch_sum
    total = total.to(out.dtype.element_ty)  # the rounded sum is normalised, as in separate operations
    tl.store(out + place, total, mask=mask)
    normal, _ = _normalised(total.to(tl.float32), width, eps, mask)
    normal = normal * tl.load(weight + column, mask=mask, other=0.0) + tl.load(bias + column, mask=mask, other=0.0)
    _store(y, normal, clip, token, frames, positions, prefix, width, column, mask, TARGET)


@triton.jit
def _backward(grad_out, grad_y, out, gate, weight, grad_x, grad_branch, grad_weight, grad_bias, scale, eps, rows,
              frames, positions, prefix, width, SOURCE: tl.constexpr, TARGET: tl.constexpr,
              COLUMNS: tl.constexpr):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    mask = column < width
    multiplier = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([COLUMNS], tl.float32)
    bias_sum = tl.zeros([COLUMNS], tl.float32)
    programs = tl.num_programs(0)
    for step in range(0, tl.cdiv(rows - tl.program_id(0), programs)):
        row = tl.program_id(0) + step * programs
        clip = row // (prefix + frames * positions)
        token = row % (prefix + frames * positions)
        place = row.to(tl.int64) * width + column
        g = _load(grad_y, clip, token, frames, positions, prefix, width, column, mask, TARGET)
        normal, factor = _normalised(tl.load(out + place, mask=mask, other=0.0).to(tl.float32), width, eps, mask)
        weight_sum += g * normal
        bias_sum += g
        g = g * multiplier
        g = factor * (g - tl.sum(g, 0) / width - normal * (tl.sum(g * normal, 0) / width))
        g += tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + place, g.to(grad_x.dtype.element_ty), mask=mask)
        share = scale if gate is None else scale * tl.load(gate + clip)
        if SOURCE == 2 and token < prefix:
            share = share / frames
        _store(grad_branch, g * share, clip, token, frames, positions, prefix, width, column, mask, SOURCE)
    place = tl.program_id(0) * width + column
    tl.store(grad_weight + place, weight_sum, mask=mask)
    tl.store(grad_bias + place, bias_sum, mask=mask)


class _AddNorm(torch.autograd.Function):
    """`add_norm` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, scale: float,
        eps: float, frames: int, prefix: int, source: int, target: int, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.settings = (scale, eps, frames, prefix, source, target)
        ctx.branch_dtype = branch.dtype
        out, y = torch.ops.videoadapt.add_norm(x, branch, gate, weight, bias, *ctx.settings, dtype)
        ctx.save_for_backward(out, gate, weight)
        return out, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        out, gate, weight = ctx.saved_tensors
        of_x, of_branch, of_weight, of_bias = torch.ops.videoadapt.add_norm_backward(
            grad_out, grad_y, out, gate, weight, *ctx.settings, ctx.branch_dtype
        )
        return (of_x, of_branch, None, of_weight, of_bias, *[None] * 7)


def add_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor,
    scale: float, eps: float, frames: int, prefix: int, source: int, target: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes `x + scale * gate * branch`, and its LayerNorm.

    Args:
        x: `(B, P + T N, D)`.
        branch: In the layout `source`.
        gate: A factor of the branch for each clip `(B,)`, float32, for drop path; None = 1.
        weight: Of the LayerNorm `(D,)`.
        bias: Of the LayerNorm `(D,)`.
        scale: A factor of all branches.
        eps: Added to the variance.
        frames: T.
        prefix: P.
        source: The layout of `branch`.
        target: The layout of the second result.
        dtype: The dtype of the second result.

    Returns:
        The sum, like `x`; and its LayerNorm in the layout `target`.
    """
    return _AddNorm.apply(x, branch, gate, weight, bias, scale, eps, frames, prefix, source, target, dtype)


def _launch_forward(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor,
    scale: float, eps: float, frames: int, prefix: int, source: int, target: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = x.contiguous()
    out, y = _empty(x, frames, prefix, target, dtype)
    clips, tokens, width = x.shape
    _forward[(clips * tokens,)](
        x, branch.contiguous(), gate, weight, bias, out, y, scale, eps, frames, (tokens - prefix) // frames, prefix,
        width, SOURCE=source, TARGET=target, COLUMNS=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return out, y


def _launch_backward(
    grad_out: Tensor, grad_y: Tensor, out: Tensor, gate: Tensor | None, weight: Tensor,
    scale: float, eps: float, frames: int, prefix: int, source: int, target: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    clips, tokens, width = out.shape
    grad_x, grad_branch = _empty(out, frames, prefix, source, dtype)
    programs = min(clips * tokens, _programs(out.device))
    sums = out.new_empty(2, programs, width, dtype=torch.float32)
    _backward[(programs,)](
        grad_out.contiguous(), grad_y.contiguous(), out, gate, weight, grad_x, grad_branch, sums[0], sums[1], scale,
        eps, clips * tokens, frames, (tokens - prefix) // frames, prefix, width, SOURCE=source, TARGET=target,
        COLUMNS=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return grad_x, grad_branch, sums[0].sum(0).to(weight.dtype), sums[1].sum(0).to(weight.dtype)


# Operators of torch, so that torch.compile and tensors without data know their shapes. Their gradients are an
# `autograd.Function` because `torch.library.custom_op` costs the host three times as much per call.
_SETTINGS = "float scale, float eps, int frames, int prefix, int source, int target, ScalarType dtype"
_LIBRARY = torch.library.Library("videoadapt", "FRAGMENT")
_LIBRARY.define(
    f"add_norm(Tensor x, Tensor branch, Tensor? gate, Tensor weight, Tensor bias, {_SETTINGS}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"add_norm_backward(Tensor grad_out, Tensor grad_y, Tensor out, Tensor? gate, Tensor weight, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("add_norm", _launch_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("add_norm_backward", _launch_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("videoadapt::add_norm", lib=_LIBRARY)
def _(x, branch, gate, weight, bias, scale, eps, frames, prefix, source, target, dtype):
    return _empty(x, frames, prefix, target, dtype)


@torch.library.register_fake("videoadapt::add_norm_backward", lib=_LIBRARY)
def _(grad_out, grad_y, out, gate, weight, scale, eps, frames, prefix, source, target, dtype):
    return (*_empty(out, frames, prefix, source, dtype), torch.empty_like(weight), torch.empty_like(weight))


def _empty(x: Tensor, frames: int, prefix: int, layout: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns uninitialised tensors: one like x, and one for its tokens in a layout."""
    clips, tokens, width = x.shape
    positions = (tokens - prefix) // frames
    shape = {
        TOKENS: (clips, tokens, width),
        PATCHES: (clips, frames, positions, width),
        FRAMES: (clips * frames, prefix + positions, width),
    }[layout]
    return torch.empty_like(x), x.new_empty(shape, dtype=dtype)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 3
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _warps(width: int) -> int:
    return 4 if width > 256 else 1  # noqa: PLR2004
