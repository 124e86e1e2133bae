"""Measures forward and backward passes at each point on this machine, on random clips."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.model.timesformer import TimeSformer, compiled
from videoadapt.runtime.machine import now, one_thread, pick_device
from videoadapt.training.forecast import LinearTime, Passes
from videoadapt.training.freeze import freeze, set_training_mode
from videoadapt.training.optim import make_optimizer
from videoadapt.training.pass_time import PassTime, time_pass

_MATRIX = 512  # side of the matrices of `bf16_is_fast`: a third of a second where bf16 is emulated
_CALLS = 3  # the best of so many, or their median


@dataclass(frozen=True)
class Round:
    """One round of measurements; passes by point."""

    few: Mapping[str, PassTime]  # times with the smaller batch
    many: Mapping[str, PassTime]  # times with the larger batch
    optimizer_s: float


class Stopwatch:
    """Times the passes and the optimizer of a config's model.

    Args:
        config: Gives the model, the losses, the optimizer, the device and the precision.
        sizes: Numbers of clips of the smaller and the larger batch.
    """

    def __init__(self, config: Config, sizes: tuple[int, int]) -> None:
        self.config, self.sizes, self.device = config, sizes, pick_device(config.run.device)
        self.model = TimeSformer(config.model).to(self.device)
        freeze(self.model, config.train.freeze)
        set_training_mode(self.model, config.train.freeze)
        self.model.activation_checkpointing = config.train.activation_checkpointing
        self._forward = compiled(self.model) if config.train.compiles else self.model
        self._optimizer = make_optimizer(self.model.named_parameters(), config.train)

    def measure(self) -> Round:
        """Measures one round. The first round also compiles and fills caches, so callers should drop it."""
        few, many = (
            {point: time_pass(self._forward, point, clips, self.config) for point in self.config.model.points}
            for clips in self.sizes
        )
        begin = now(self.device)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_grad or float("inf"))
        self._optimizer.step()
        end = now(self.device)
        self._optimizer.zero_grad(set_to_none=True)
        return Round(few, many, end - begin)


class Speed(NamedTuple):
    """A speed of this machine, and how much slower it is at present."""

    macs_per_s: float  # if nothing else runs
    slowdown: float  # the present time / the time if nothing else runs; 1 on a GPU, where it is not known


class WorkTime(NamedTuple):
    """Seconds of some work."""

    idle: float  # if nothing else runs
    now: float  # as the machine is at present


def training_speed(config: Config, clips: int) -> Speed:
    """Returns the speed of training on this machine: MACs of forward and backward passes over all points.

    Args:
        config: Gives the model, the device and the precision. A model of few blocks is as fast as a deep one.
        clips: Clips of a pass.
    """
    stopwatch = Stopwatch(config, (clips, clips + 1))
    seconds = time_of(stopwatch.measure, stopwatch.device)
    macs = 3 * (2 * clips + 1) * sum(point_macs(config.model).values())  # the backward pass: twice the forward pass
    return Speed(macs / seconds.idle, max(1.0, seconds.now / seconds.idle))


def time_of(work: Callable[[], object], device: torch.device) -> WorkTime:
    """Returns the seconds of a call of a function, from several calls.

    On a CPU the idle time is the CPU time of one thread, divided by the number of threads. That of all threads would
    follow the load: on a busy machine each waits for the others, and waiting counts as CPU time (docs/log.md). It is
    the best of several calls, because other programs only make a call slower; the present time is the median.
    """
    work()  # the warm-up
    present = []
    for _ in range(_CALLS):
        begin = now(device)
        work()
        present.append(now(device) - begin)
    if device.type != "cpu":
        return WorkTime(min(present), min(present))
    threads = torch.get_num_threads()
    with one_thread():
        idle = min(_cpu_seconds(work) for _ in range(_CALLS)) / threads
    return WorkTime(idle, statistics.median(present))


def bf16_is_fast(device: torch.device) -> bool:
    """Returns whether products of matrices are faster in bf16 than in fp32. CPUs without bf16 emulate it, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(_MATRIX, _MATRIX, dtype=dtype)
        matrix @ matrix  # the warm-up
        seconds[dtype] = min(_cpu_seconds(partial(torch.matmul, matrix, matrix)) for _ in range(_CALLS))
    return seconds[torch.bfloat16] < seconds[torch.float32]


def _cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def fitted(rounds: Sequence[Round], sizes: tuple[int, int]) -> tuple[dict[str, Passes], float]:
    """Fits times per clip to measured rounds.

    Args:
        rounds: Rounds of one `Stopwatch`, without its first one.
        sizes: The batch sizes of that stopwatch.

    Returns:
        The passes by point, fitted to the medians over rounds, and the median seconds of the optimizer.
    """

    def line(few: Sequence[float], many: Sequence[float]) -> LinearTime:
        return LinearTime.through((sizes[0], statistics.median(few)), (sizes[1], statistics.median(many)))

    passes = {
        point: Passes(
            line([r.few[point].forward_s for r in rounds], [r.many[point].forward_s for r in rounds]),
            line([r.few[point].backward_s for r in rounds], [r.many[point].backward_s for r in rounds]),
        )
        for point in rounds[0].few
    }
    return passes, statistics.median(r.optimizer_s for r in rounds)
