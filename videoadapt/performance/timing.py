"""Seconds of forward and backward passes at each point, measured on made-up clips on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.model.timesformer import TimeSformer, compiled
from videoadapt.performance.forecast import LinearTime, Passes
from videoadapt.runtime.machine import pick_device
from videoadapt.training import losses
from videoadapt.training.optim import make_optimizer


@dataclass(frozen=True)
class Round:
    """Seconds of forward and backward passes at each point, over few and over many clips, and of the optimizer."""

    few: Mapping[str, tuple[float, float]]
    many: Mapping[str, tuple[float, float]]
    optimizer_s: float


class Stopwatch:
    """A model that is trained on made-up clips to see how long its passes take; `sizes` are few and many clips."""

    def __init__(self, config: Config, sizes: tuple[int, int]) -> None:
        self.config, self.sizes, self.device = config, sizes, pick_device(config.run.device)
        self.model = TimeSformer(config.model).to(self.device).train()
        self.model.activation_checkpointing = config.train.activation_checkpointing
        self._forward = compiled(self.model) if config.train.compile else self.model
        self._optimizer = make_optimizer(self.model.named_parameters(), config.train)

    def measure(self) -> Round:
        """One round; the first one also warms up and does not count."""
        few, many = ({point: self._pass(point, clips) for point in self.config.model.points} for clips in self.sizes)
        before = now(self.device)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_grad or float("inf"))
        self._optimizer.step()
        after = now(self.device)
        self._optimizer.zero_grad(set_to_none=True)
        return Round(few, many, after - before)

    def _pass(self, point: str, clips: int) -> tuple[float, float]:
        model = self.config.model
        frames = torch.randn(clips, 3, model.num_frames, model.size, model.size, device=self.device)
        targets = torch.full((clips, model.num_classes), 1 / model.num_classes, device=self.device)
        teacher = None if point == model.points[0] else targets
        begin = now(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16"):
            heads = self._forward(frames, point, heads=True)
        dropped = Point.parse(point).keep < 1
        dense = None if dropped or heads.dense is None else torch.full_like(heads.dense, 1 / model.num_classes)
        loss = losses.point_loss(heads, targets, teacher, self.config.loss, dropped=dropped, dense=dense).sum()
        middle = now(self.device)
        loss.backward()
        return middle - begin, now(self.device) - middle


def now(device: torch.device) -> float:
    """Seconds on a clock, when a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fitted(rounds: Sequence[Round], sizes: tuple[int, int]) -> tuple[dict[str, Passes], float]:
    """The passes at each point, from medians over rounds, and the optimizer's seconds."""
    passes = {}
    for point in rounds[0].few:
        lines = []
        for part in (0, 1):  # forward, backward
            few = statistics.median(each.few[point][part] for each in rounds)
            many = statistics.median(each.many[point][part] for each in rounds)
            lines.append(LinearTime.through((sizes[0], few), (sizes[1], many)))
        passes[point] = Passes(*lines)
    return passes, statistics.median(each.optimizer_s for each in rounds)
