"""Compares fused attention with explicit matrix products on this machine's CPU: `python tools/bench_attention.py`.

The table has the median milliseconds of both over interleaved rounds, for a forward pass alone and with its backward
pass, and the ratio fused / explicit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (sequences, heads, tokens, width of a head): spatial attention at lengths 14 and 7, temporal attention over 8 frames
# at both, and the demo's spatial attention.
SHAPES = ((16, 6, 197, 64), (16, 6, 50, 64), (1568, 6, 8, 64), (392, 6, 8, 64), (64, 4, 65, 16))
ROUNDS = 7


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes softmax attention as two matrix products; all tensors are (sequences, heads, tokens, width)."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def measure(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], *, backward: bool) -> float:
    """Returns the milliseconds of one call."""
    begin = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = attend(*inputs)
    if backward:
        out.sum().backward()
    return (time.perf_counter() - begin) * 1e3


def ratios(shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """Measures one shape. Returns two cells, without and with the backward pass: both medians and their ratio."""
    kinds: dict[str, Callable[..., Tensor]] = {"fused": F.scaled_dot_product_attention, "explicit": explicit}
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    times: dict[tuple[str, bool], list[float]] = {(name, b): [] for name in kinds for b in (False, True)}
    for _ in range(1 + ROUNDS):
        for name, backward in times:  # interleaved, so that noise meets all of them
            times[name, backward].append(measure(kinds[name], inputs, backward=backward))
    cells = []
    for backward in (False, True):
        fused, other = (statistics.median(times[name, backward][1:]) for name in kinds)  # the first is a warm-up
        cells.append(f"{fused:6.1f} {other:6.1f} {fused / other:5.2f}")
    return cells


def main() -> None:
    """Prints the table."""
    print(f"{'dtype':>9} {'shape':>20} | forward: fused explicit ratio | with backward: fused explicit ratio")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            print(f"{str(dtype)[6:]:>9} {shape!s:>20} | " + " | ".join(ratios(shape, dtype)))


if __name__ == "__main__":
    main()
