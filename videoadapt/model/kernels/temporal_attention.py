"""The CUDA kernel of temporal attention, in Triton: many short sequences, packed into tiles.

A tile holds ROWS tokens of one head: the T frames of ROWS / TIMES neighbouring positions, with T padded to TIMES, a
power of two. All products of the tile run on tensor cores; a mask keeps each position to itself. The products between
different positions are wasted, but the kernel is bound by memory, and each number is read and written once. The
backward pass computes the tile again, so the forward pass saves nothing but its input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE_ROWS = 64  # the fastest of 16 to 128 over 8 frames, with 4 warps (docs/results/gpu.md)


@triton.jit
def _tile(clip_tile, tiles, frames, positions, stride_clip, stride_frame, stride_position,
          TIMES: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Returns, for each row of a tile: its offset in a tensor of tokens, its place, its position and its frame."""
    clip = clip_tile // tiles
    row = tl.arange(0, ROWS)
    position = (clip_tile % tiles) * (ROWS // TIMES) + row // TIMES
    frame = row % TIMES
    offset = clip.to(tl.int64) * stride_clip + frame.to(tl.int64) * stride_frame + position * stride_position
    return offset, (position < positions) & (frame < frames), row // TIMES, frame


@triton.jit
def _softmax(q, k, scale, group, frame, frames, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """Returns the attention (ROWS, ROWS) of each row to the rows of its own position."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    row = tl.arange(0, ROWS)
    # Padding frames attend to themselves alone: a row without any entry would be NaN.
    seen = (group[:, None] == group[None, :]) & ((frame[None, :] < frames) | (row[:, None] == row[None, :]))
    scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward(qkv, out, scale, heads, tiles, frames, positions, width, head_width, stride_clip, stride_frame,
             stride_position, TIMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    head = program % heads  # neighbouring programs read neighbouring numbers
    tile = program // heads
    offset, inside, group, frame = _tile(
        tile, tiles, frames, positions, stride_clip, stride_frame, stride_position, TIMES, ROWS
    )
    column = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < head_width)[None, :]
    source = qkv + offset[:, None] + (head * head_width + column)[None, :]
    q = tl.load(source, mask=mask, other=0.0)
    k = tl.load(source + width, mask=mask, other=0.0)
    v = tl.load(source + 2 * width, mask=mask, other=0.0)
    weights = _softmax(q, k, scale, group, frame, frames, ROWS, PRECISION)
    mixed = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    target, _, _, _ = _tile(tile, tiles, frames, positions, frames * positions * width, positions * width, width,
                            TIMES, ROWS)  # fmt: skip
    tl.store(out + target[:, None] + (head * head_width + column)[None, :], mixed.to(v.dtype), mask=mask)


@triton.jit
def _backward(qkv, grad, grad_qkv, scale, heads, tiles, frames, positions, width, head_width, stride_clip,
              stride_frame, stride_position, TIMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads
    offset, inside, group, frame = _tile(
        tile, tiles, frames, positions, stride_clip, stride_frame, stride_position, TIMES, ROWS
    )
    column = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < head_width)[None, :]
    source = qkv + offset[:, None] + (head * head_width + column)[None, :]
    q = tl.load(source, mask=mask, other=0.0)
    k = tl.load(source + width, mask=mask, other=0.0)
    v = tl.load(source + 2 * width, mask=mask, other=0.0)
    token, _, _, _ = _tile(tile, tiles, frames, positions, frames * positions, positions, 1, TIMES, ROWS)
    g = tl.load(grad + (token * width)[:, None] + (head * head_width + column)[None, :], mask=mask, other=0.0)
    weights = _softmax(q, k, scale, group, frame, frames, ROWS, PRECISION)
    grad_v = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
    grad_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    mean = tl.sum(weights * grad_weights, 1)[:, None]
    grad_scores = (weights * (grad_weights - mean) * scale).to(q.dtype)
    grad_q = tl.dot(grad_scores, k, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(grad_scores), q, input_precision=PRECISION)
    target = grad_qkv + (token * (3 * width))[:, None] + (head * head_width + column)[None, :]
    tl.store(target, grad_q.to(q.dtype), mask=mask)
    tl.store(target + width, grad_k.to(q.dtype), mask=mask)
    tl.store(target + 2 * width, grad_v.to(q.dtype), mask=mask)


class _AttendOverTime(torch.autograd.Function):
    """`attend_over_time` with its gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.heads = heads
        ctx.save_for_backward(qkv)
        return torch.ops.videoadapt.attend_over_time(qkv, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        return torch.ops.videoadapt.attend_over_time_backward(grad, qkv, ctx.heads), None


def attend_over_time(qkv: Tensor, heads: int) -> Tensor:
    """Computes `attention.attend_over_time` on CUDA: `(B, T, N, 3 D)` to `(B, T, N, D)`."""
    return _AttendOverTime.apply(qkv, heads)


def _launch_forward(qkv: Tensor, heads: int) -> Tensor:
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    _launch(_forward, qkv, heads, out)
    return out


def _launch_backward(grad: Tensor, qkv: Tensor, heads: int) -> Tensor:
    grad_qkv = qkv.new_empty(qkv.shape)
    _launch(_backward, qkv, heads, grad.contiguous(), grad_qkv)
    return grad_qkv


# Operators of torch: see `add_norm.py`.
_LIBRARY = torch.library.Library("videoadapt", "FRAGMENT")
_LIBRARY.define("attend_over_time(Tensor qkv, int heads) -> Tensor")
_LIBRARY.define("attend_over_time_backward(Tensor grad, Tensor qkv, int heads) -> Tensor")
_LIBRARY.impl("attend_over_time", _launch_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_over_time_backward", _launch_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("videoadapt::attend_over_time", lib=_LIBRARY)
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


@torch.library.register_fake("videoadapt::attend_over_time_backward", lib=_LIBRARY)
def _(grad: Tensor, qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _launch(kernel: triton.JITFunction, qkv: Tensor, heads: int, *tensors: Tensor) -> None:
    """Runs a kernel over all tiles of all heads."""
    clips, frames, positions, width = *qkv.shape[:3], qkv.shape[3] // 3
    if qkv.stride(3) != 1:
        qkv = qkv.contiguous()
    times = triton.next_power_of_2(frames)
    rows = max(times, _TILE_ROWS)
    tiles = triton.cdiv(positions, rows // times)
    head_width = width // heads
    kernel[(clips * tiles * heads,)](
        qkv, *tensors, head_width**-0.5, heads, tiles, frames, positions, width, head_width,
        qkv.stride(0), qkv.stride(1), qkv.stride(2),
        TIMES=times, ROWS=rows, COLUMNS=max(16, triton.next_power_of_2(head_width)),
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=_warps(rows),
    )  # fmt: skip


def _warps(rows: int) -> int:
    return 8 if rows >= 128 else 4
