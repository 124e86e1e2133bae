"""Fused attention against explicit matrix products on this machine's CPU: `python tools/bench_attention.py`.

Prints the median ms of each over interleaved rounds, forward, and forward and backward, and the ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((16, 6, 197, 64), (16, 6, 50, 64), (1568, 6, 8, 64), (392, 6, 8, 64), (64, 4, 65, 16))
ROUNDS = 7


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention as two matrix products."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def measure(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], *, backward: bool) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = attend(*inputs)
    if backward:
        out.sum().backward()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Prints the table."""
    kinds: dict[str, Callable[..., Tensor]] = {"fused": F.scaled_dot_product_attention, "plain": plain}
    print(f"{'dtype':>9} {'shape':>20} | forward: fused plain ratio | with backward: fused plain ratio")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            times: dict[tuple[str, bool], list[float]] = {}
            for _ in range(ROUNDS + 1):
                for name, attend in kinds.items():
                    for backward in (False, True):
                        taken = measure(attend, inputs, backward=backward)
                        times.setdefault((name, backward), []).append(taken)
            cells = []
            for backward in (False, True):
                fused, other = (statistics.median(times[name, backward][1:]) for name in kinds)
                cells.append(f"{fused:6.1f} {other:6.1f} {fused / other:5.2f}")
            print(f"{str(dtype)[6:]:>9} {shape!s:>20} | " + " | ".join(cells))


if __name__ == "__main__":
    main()
