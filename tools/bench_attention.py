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


def measure(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Prints the table."""
    kinds = {"fused": F.scaled_dot_product_attention, "plain": plain}
    print(f"{'dtype':>9} {'shape':>20} | forward: fused plain ratio | with backward: fused plain ratio")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
            times: dict[tuple[str, str], list[float]] = {}
            for _ in range(ROUNDS + 1):
                for name, attend in kinds.items():
                    with torch.no_grad():
                        times.setdefault((name, "f"), []).append(measure(lambda a=attend: a(q, k, v)))  # type: ignore[misc]
                    both = measure(lambda a=attend: a(q, k, v).sum().backward())  # type: ignore[misc]
                    times.setdefault((name, "b"), []).append(both)
            fused, plain_, fused_b, plain_b = (
                statistics.median(times[name, way][1:]) for way in "fb" for name in ("fused", "plain")
            )
            row = f"{fused:6.1f} {plain_:6.1f} {fused / plain_:5.2f} | {fused_b:6.1f} {plain_b:6.1f} {fused_b / plain_b:5.2f}"
            print(f"{str(dtype)[6:]:>9} {shape!s:>20} | {row}")


if __name__ == "__main__":
    main()
