"""Model FLOPs utilisation (MFU): the part of the device's matrix-multiply rate that training reaches at each point.

The rate is that of a large matrix product on the same device in the same precision, not a data sheet's. The operations
are those of the architecture (`config.cost`): what activation checkpointing computes again does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from videoadapt.config.cost import backward_macs, point_macs
from videoadapt.config.load import Config
from videoadapt.runtime.machine import now
from videoadapt.training.throughput import DeviceClock

PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices: large enough to reach the peak of the device
_PRODUCTS = 5  # the best of so many: other programs only make one slower
_ENOUGH_S = 0.5  # of products: one takes seconds in bf16 on a CPU that has no units for it
_WARM_UP = 2  # micro-batches, which compile and fill caches


def matrix_product(device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Returns a function that multiplies two large matrices: `PRODUCT_SIDE` cubed multiply-adds (MACs)."""
    side = PRODUCT_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return lambda: matrix @ matrix


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the MACs per second of a large matrix product."""
    product = matrix_product(device, dtype)
    warm_up = torch.ones(8, 8, device=device, dtype=dtype)
    warm_up @ warm_up  # loads the library
    seconds: list[float] = []
    while len(seconds) < _PRODUCTS and sum(seconds) < _ENOUGH_S:
        begin = now(device)
        product()
        seconds.append(now(device) - begin)
    return PRODUCT_SIDE[device.type] ** 3 / min(seconds)


class PointClock:
    """Adds up the time of the passes at one point on this rank, and counts their clips, without the first passes."""

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._micro_batches = 0  # whose passes are done

    @contextmanager
    def timed(self, clips: int = 0) -> Iterator[None]:
        """Times a `with` block. The last block of a micro-batch names its number of clips, padding included."""
        started = self._clock.start()
        yield
        if self._micro_batches >= _WARM_UP:
            self._clock.stop(started, clips)
        self._micro_batches += clips > 0

    def clips_per_s(self) -> float | None:
        """Returns the clips per second of passes so far; None if none has been timed."""
        seconds, clips = self._clock.read()
        return clips / seconds if seconds else None


def utilisation(clocks: Mapping[str, PointClock], macs_per_s: float, config: Config) -> dict[str, float]:
    """Returns the MFU, 0 to 1, of each point that this rank has trained.

    Args:
        clocks: The clocks of this rank's points.
        macs_per_s: `product_rate` of this rank.
        config: Gives the model, and the layers that are trained.
    """
    macs = point_macs(config.model)
    rates = {point: clock.clips_per_s() for point, clock in clocks.items()}
    return {
        point: rate * (macs[point] + backward_macs(config.model, point, config.train.freeze)) / macs_per_s
        for point, rate in rates.items()
        if rate is not None
    }
