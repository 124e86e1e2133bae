"""Shared decoding: over all ranks each clip of a step is decoded once, and travels to the ranks that train it.

Every group trains the whole step, so that k groups that decode for themselves decode each clip k times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import Clip, Failure
from videoadapt.data.clips.token_labels import MAP_BYTES, LabelMap
from videoadapt.data.index.manifest import Manifest
from videoadapt.runtime.ranks import rank
from videoadapt.training.groups import GroupPlan, split_evenly


class ClipExchange:
    """Sends the clips that a rank decodes, those at the positions `read` of a step, to the ranks that train them.

    Every rank must make one, and go through its steps with it. A clip is a row of bytes: its frames, its label map if
    the config has maps, and a 1; or the cause of its failure and a 0. Labels and paths stand in the manifest that all
    ranks have. Rows travel from host to host by gloo, also where ranks have GPUs: workers deliver on the host, and on a
    GPU clips and gradients would have to be sent in the same order by all ranks, which the backward passes of different
    lengths do not keep.
    """

    def __init__(self, manifest: Manifest, config: Config, plan: GroupPlan, *, pin: bool = False) -> None:
        model, train = config.model, config.train
        self._manifest, self._pin = manifest, pin
        self._shape = (3, model.num_frames, model.size, model.size)
        maps = config.data.token_labels is not None
        self._parts = [math.prod(self._shape), MAP_BYTES if maps else 0, 1]  # bytes of a row: frames, map, 1 or 0
        self._row_bytes = sum(self._parts)
        reads = split_evenly(train.batch, plan.ranks)
        trains = [_trained(plan, r, config) for r in range(plan.ranks)]
        self.read, self._train = reads[rank()], trains[rank()]  # positions in a step
        self._sent = [[position for position in positions if position in self.read] for positions in trains]
        self._received = [sum(position in positions for position in self._train) for positions in reads]
        self._group = dist.new_group(backend="gloo")  # apart from the gradients, beside which clips travel

    def exchanged(self, clips: Iterator[Clip | Failure], steps: Iterable[np.ndarray]) -> Iterator[Clip | Failure]:
        """This rank's clips of every step, in order, for those that it has read.

        `steps` are the manifest rows of each step, (clips of the step,). The clips of a step travel while the one
        before it is trained, and so are read before.
        """
        sent = ((rows, *self._send(islice(clips, len(self.read)))) for rows in steps)
        for arriving, _ in pairwise(chain(sent, [None])):
            assert arriving is not None, "only the last one of a pair is None"
            rows, received, work = arriving
            work.wait()
            yield from map(self._item, received, rows[self._train].tolist())

    def _send(self, clips: Iterable[Clip | Failure]) -> tuple[Tensor, dist.Work]:
        items = dict(zip(self.read, clips, strict=True))
        sent = torch.empty((sum(map(len, self._sent)), self._row_bytes), dtype=torch.uint8)
        for row, position in zip(sent, chain.from_iterable(self._sent), strict=True):
            _write(row, items[position])
        received = torch.empty((len(self._train), self._row_bytes), dtype=torch.uint8, pin_memory=self._pin)
        # Ranks read consecutive positions, so that rows in the order of their senders are in the order of the step.
        work = dist.all_to_all_single(
            received, sent, self._received, list(map(len, self._sent)), group=self._group, async_op=True
        )
        return received, work

    def _item(self, row: Tensor, video: int) -> Clip | Failure:
        known = self._manifest.row(video)
        if not row[-1]:
            return Failure(video, known.path, bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore"))
        frames, label_map, _ = row.split(self._parts)
        tokens = LabelMap.from_bytes(label_map.numpy().tobytes()) if len(label_map) else None
        return Clip(frames.view(self._shape), known.label, video, tokens)


def _trained(plan: GroupPlan, rank: int, config: Config) -> list[int]:
    """The positions, in a step, of the clips that a rank trains, part by part."""
    parts, clips = config.train.accumulate, config.train.batch // config.train.accumulate
    share = plan.group(rank).positions(rank, clips, pairs=config.data.mixes)
    return [part * clips + position for part in range(parts) for position in share]


def _write(row: Tensor, item: Clip | Failure) -> None:
    if isinstance(item, Clip):
        frames = item.frames.flatten()
        row[: len(frames)] = frames
        if item.tokens is not None:
            row[len(frames) : -1] = _as_tensor(item.tokens.to_bytes())
        row[-1] = 1
    else:
        cause = item.cause.encode()[: len(row) - 1]
        row.zero_()
        row[: len(cause)] = _as_tensor(cause)


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class TeacherExchange:
    """Sends the teacher's logits on the clips of a step's part from its group to the ranks of all others.

    Between `start` and `logits` the transfer goes on beside whatever the rank computes.
    """

    def __init__(self, plan: GroupPlan, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self._teachers, self._classes, self.dtype, self._device = plan.groups[0], classes, dtype, device
        self._group = dist.new_group()  # apart from the gradients, whose order differs from rank to rank
        self._running: list[tuple[range, Tensor, dist.Work]] = []

    def start(self, shares: Sequence[range], own: Tensor | None = None) -> None:
        """Every rank calls it once for each part; `shares` are the teachers' positions in it.

        A teacher gives its `own` logits (clips of its share, classes), NaN for a clip that it could not read.
        """
        self._running = []
        for number, share in zip(self._teachers.ranks, shares, strict=True):
            values = torch.empty(len(share), self._classes, dtype=self.dtype, device=self._device)
            if own is not None and number == rank():
                values.copy_(own)
            self._running.append((share, values, dist.broadcast(values, number, self._group, async_op=True)))

    def logits(self) -> Tensor:
        """The teacher's logits on all clips of the part, (clips, classes), once they are there."""
        for _, _, work in self._running:
            work.wait()
        return torch.cat([values for _, values, _ in self._running])
