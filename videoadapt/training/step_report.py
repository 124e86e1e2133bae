"""The sums of a step on their way from the device to the host, which reads them a step later.

On a GPU, `train_step` only queues work. If the host read a loss at once, it would wait until the GPU is idle, and the
GPU would then wait for the host to queue the next step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videoadapt.data.clips.datasets import Failure
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError
from videoadapt.runtime.ranks import all_gather, rank
from videoadapt.training.state import State, Tally

_LISTED_ROWS = 5  # clips with a bad loss that a message names; a whole batch would fill the screen

Gather = Callable[[Any], list[Any]]  # the values of all ranks from that of this rank


@dataclass(frozen=True)
class StepReport:
    """What a step has found. The numbers may still be on their way.

    Attributes:
        step: Number of the step, from 0.
        tallies: The losses of this rank's clips, by drawn point.
        sums: Over all ranks, float64, on the host: loss, right clips and clips of each point; clips that could not be
            read; how many ranks have received each stop signal; the norm of the gradient.
        arrived: Recorded behind the copy of `sums` on a GPU; None on a CPU.
        lr: The highest learning rate of the step.
        failures: The clips of this rank that could not be read; empty on ranks that do not train the costliest point.
    """

    step: int
    tallies: Mapping[str, Tally]
    sums: Tensor
    arrived: torch.cuda.Event | None
    lr: float
    failures: list[Failure]

    @property
    def stop_flags(self) -> list[float]:
        """How many ranks had received each stop signal; known after `read`."""
        flags: list[float] = self.sums[3 * len(self.tallies) + 1 : -1].tolist()
        return flags

    def read(self, state: State, *, alone: bool = False) -> dict[str, float]:
        """Waits for the numbers and returns them. All ranks call it together.

        Args:
            state: Counts the clips that could not be read; rank 0 lists those of all ranks.
            alone: Only this rank calls it, and lists and names its own clips.

        Returns:
            `loss/POINT` and `top1/POINT` of each drawn point with a clip, means over the clips of all ranks;
            `grad_norm`; `lr`.

        Raises:
            RunError: A loss or the gradient was not finite. The step changed nothing.
        """
        gather: Gather = (lambda own: [own]) if alone else all_gather
        if self.arrived is not None:
            self.arrived.synchronize()
        points = self.sums[: 3 * len(self.tallies)].view(-1, 3)
        skipped, grad_norm = int(self.sums[points.numel()]), float(self.sums[-1])
        if not points.isfinite().all():  # sums over ranks: all of them stop at the same step
            raise RunError(self._bad_clips(state.manifest, gather))
        if not math.isfinite(grad_norm):
            raise RunError(
                f"step {self.step}: the gradient is not finite, although the losses are; nothing was changed by this "
                "step. Lower train.lr, or set run.precision=fp32"
            )
        state.skipped += skipped
        if skipped:
            failures = [failure for of_rank in gather(self.failures) for failure in of_rank]
            if rank() == 0:  # one writer: on NFS, lines that several nodes append overwrite one another
                state.list_skipped(self.step, failures)
        loss, correct, clips = points.T.tolist()
        # All clips of a point may have failed.
        values = {f"loss/{p}": value / n for p, value, n in zip(self.tallies, loss, clips, strict=True) if n}
        values |= {f"top1/{p}": value / n for p, value, n in zip(self.tallies, correct, clips, strict=True) if n}
        return values | {"grad_norm": grad_norm, "lr": self.lr}

    def _bad_clips(self, manifest: Manifest, gather: Gather) -> str:
        """Returns which losses are not finite, the same on all ranks: any of them may be the one that prints it."""
        found = [
            (point, rows)
            for of_rank in gather({point: tally.bad_rows() for point, tally in self.tallies.items()})
            for point, rows in of_rank.items()
            if rows
        ]
        first = next(point for point in self.tallies if point in dict(found))  # costliest first, as they are trained
        rows = sorted({row for point, of_rank in found if point == first for row in of_rank})[:_LISTED_ROWS]
        videos = ", ".join(manifest.row(row).video for row in rows)
        return (
            f"step {self.step}, point {first}: the loss is not finite on the clips of manifest rows {rows} ({videos}); "
            "nothing was changed by this step. Lower train.lr, or set train.clip_grad"
        )


class Reports:
    """The reports that were not read yet: none on a CPU, that of the latest step on a GPU."""

    def __init__(self, device: torch.device, take: Callable[[StepReport, bool], bool]) -> None:
        """Creates an empty queue.

        Args:
            device: The device of the model.
            take: Reads a report, alone or together with all ranks; returns whether training stops.
        """
        self._late = 1 if device.type == "cuda" else 0  # steps
        self._take = take
        self._waiting: deque[StepReport] = deque()

    def add(self, report: StepReport) -> bool:
        """Adds the report of a step that was queued just now, and takes those that are due.

        Returns:
            Whether training stops.
        """
        self._waiting.append(report)
        return self._take_until(self._late)

    def take_all(self, *, alone: bool = False) -> bool:
        """Takes all reports, so that the state is that of the latest step. Returns whether training stops."""
        return self._take_until(0, alone=alone)

    def _take_until(self, left: int, *, alone: bool = False) -> bool:
        stops = False
        while len(self._waiting) > left:
            stops |= self._take(self._waiting.popleft(), alone)
        return stops
