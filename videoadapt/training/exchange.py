"""Transfers between ranks: decoded clips (`ClipExchange`), teacher logits (`TeacherLogits`), checkpoints.

Gradients and BatchNorm statistics are summed over ranks in `ddp.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import Clip, Failure
from videoadapt.data.clips.token_labels import MAP_BYTES, LabelMap
from videoadapt.data.index.manifest import Manifest
from videoadapt.model.checkpoint import Checkpoint
from videoadapt.runtime.ranks import broadcast_result, broadcast_tensors, new_group, rank
from videoadapt.training.groups import GroupPlan, split_evenly
from videoadapt.training.throughput import DeviceClock

FoundCheckpoint = TypeVar("FoundCheckpoint", bound=Checkpoint | None)


class ClipExchange:
    """Sends each clip from the one rank that decodes it to all ranks that train it (`parallel.decode: shared`).

    Every group trains all clips of a step. Without the exchange, k groups decode each clip k times.

    A clip travels as one row of bytes: its frames, its label map if the config has label maps, and a 1. A clip that
    cannot be read travels as the error message and a 0. Labels and paths are not sent, since each rank has the
    manifest.

    Attributes:
        read: Positions, in a step of all ranks, of the clips that this rank decodes.
    """

    def __init__(self, manifest: Manifest, config: Config, plan: GroupPlan, *, pin: bool = False) -> None:
        """Creates a process group for the clips. All ranks must call it together.

        Args:
            manifest: The videos.
            config: Gives the batch size and the size of a clip.
            plan: The groups of all ranks.
            pin: Whether received clips lie in pinned memory, from where copies to a GPU are faster.
        """
        model, train = config.model, config.train
        self._manifest, self._pin = manifest, pin
        self._shape = (3, model.num_frames, model.size, model.size)  # (C, T, S, S)
        has_maps = config.data.token_labels is not None
        self._field_bytes = [math.prod(self._shape), MAP_BYTES if has_maps else 0, 1]  # frames, label map, 1 or 0
        self._row_bytes = sum(self._field_bytes)
        reads = split_evenly(train.batch, plan.ranks)  # by rank
        trains = [_trained_positions(plan, r, config) for r in range(plan.ranks)]  # by rank
        self.read, self._train = reads[rank()], trains[rank()]
        # For each receiving rank, the positions that this rank sends to it; for each sending rank, how many it sends.
        self._sent = [[position for position in positions if position in self.read] for positions in trains]
        self._received = [sum(position in positions for position in self._train) for positions in reads]
        # gloo also where ranks have GPUs: workers deliver clips in host memory, and NCCL needs the same order of
        # operations on all ranks, which clips and gradients of different lengths do not have. This group is separate,
        # since clips travel while gradients are summed.
        self._group = new_group(config.parallel.step_s, backend="gloo")

    def exchanged(self, clips: Iterator[Clip | Failure], steps: Iterable[np.ndarray]) -> Iterator[Clip | Failure]:
        """Yields the clips that this rank trains, in order of position, step after step.

        The clips of a step travel while the step before it is trained.

        Args:
            clips: The clips that this rank decodes, in order of position, step after step.
            steps: For each step, the manifest rows of its clips, (train.batch,) int64.
        """
        started = ((rows, *self._send(islice(clips, len(self.read)))) for rows in steps)
        # Pairs of neighbours: the transfer of the next step starts before the clips of this step are yielded.
        for transfer, _ in pairwise(chain(started, [None])):
            assert transfer is not None, "None is only the last element, which is never first in a pair"
            rows, received, work = transfer
            work.wait()
            yield from map(self._unpack, received, rows[self._train].tolist())

    def _send(self, clips: Iterable[Clip | Failure]) -> tuple[Tensor, dist.Work]:
        """Starts the transfer of one step. Returns the (clips, bytes) tensor that it fills, and its handle."""
        by_position = dict(zip(self.read, clips, strict=True))
        sent = torch.empty((sum(map(len, self._sent)), self._row_bytes), dtype=torch.uint8)
        for row, position in zip(sent, chain.from_iterable(self._sent), strict=True):
            _pack(row, by_position[position])
        received = torch.empty((len(self._train), self._row_bytes), dtype=torch.uint8, pin_memory=self._pin)
        # Ranks read consecutive positions, so rows in the order of their senders are in the order of positions.
        work = dist.all_to_all_single(
            received, sent, self._received, list(map(len, self._sent)), group=self._group, async_op=True
        )
        return received, work

    def _unpack(self, row: Tensor, video: int) -> Clip | Failure:
        known = self._manifest.row(video)
        if not row[-1]:
            # The cut at the end of the row may split a UTF-8 character, which `ignore` drops.
            return Failure(video, known.path, bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore"))
        frames, label_map, _ = row.split(self._field_bytes)
        tokens = LabelMap.from_bytes(label_map.numpy().tobytes()) if len(label_map) else None
        return Clip(frames.view(self._shape), known.label, video, tokens)  # (C * T * S * S,) to (C, T, S, S)


def _trained_positions(plan: GroupPlan, rank: int, config: Config) -> list[int]:
    """Returns the positions, in a step, of the clips that a rank trains, one micro-batch after the other."""
    clips = config.train.micro_batch
    positions = plan.group(rank).positions(rank, clips, pairs=config.data.mixes)
    starts = range(0, clips * config.train.accumulate, clips)
    return [start + position for start in starts for position in positions]


def _pack(row: Tensor, item: Clip | Failure) -> None:
    if isinstance(item, Clip):
        frames = item.frames.flatten()  # (C, T, S, S) to (C * T * S * S,)
        row[: len(frames)] = frames
        if item.tokens is not None:
            row[len(frames) : -1] = _as_tensor(item.tokens.to_bytes())
        row[-1] = 1
    else:
        cause = item.cause.encode()[: len(row) - 1]
        row.zero_()
        row[: len(cause)] = _as_tensor(cause)


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)  # a bytearray, since torch warns of read-only memory


class TeacherLogits:
    """Sends the logits of the costliest point from the group that trains it to the ranks of all other groups.

    For each micro-batch, a rank of the first group calls `send`; every other rank calls `start`, computes a forward
    pass while the logits travel, and calls `receive`.

    Attributes:
        waits: The time that this rank has waited in `receive`.
    """

    def __init__(self, config: Config, plan: GroupPlan, dtype: torch.dtype, device: torch.device) -> None:
        """Creates a process group for the logits. All ranks must call it together.

        Args:
            config: Gives the number of classes and the size of a micro-batch.
            plan: The groups of all ranks; the first group has the teacher.
            dtype: Type of the logits on all ranks.
            device: Where this rank has its model.
        """
        self.classes, self.dtype, self.device = config.model.num_classes, dtype, device
        self.waits = DeviceClock(device)
        teachers = plan.groups[0]
        clips, pairs = config.train.micro_batch, config.data.mixes
        # For each rank of the teacher's group: the positions, in a micro-batch, whose logits the rank sends.
        self._positions = [teachers.positions(number, clips, pairs=pairs) for number in teachers.ranks]
        self._ranks = plan.ranks
        # A separate group: the order of gradients differs from rank to rank, but all ranks must call the collectives
        # of one group in the same order.
        self._group = new_group(config.parallel.step_s)
        self._transfer: tuple[Tensor, dist.Work] | None = None

    def start(self) -> None:
        """Starts to receive the logits of a micro-batch. A rank of another group calls it before its forward pass."""
        self._gather(None)

    def send(self, logits: Tensor, positions: Tensor) -> None:
        """Sends this rank's logits of a micro-batch. A rank of the teacher's group calls it.

        Args:
            logits: (B, classes); rows after the first `len(positions)` belong to no clip and are not sent.
            positions: The positions of the clips in the micro-batch, (B,) int64 on the host. A clip of this rank
                that cannot be read has no position here; its row is sent as NaN.
        """
        all_positions = self._positions[rank()]  # the teacher's group has the first ranks
        local = logits.new_full((len(all_positions), logits.shape[1]), float("nan"))
        local[positions - all_positions.start] = logits[: len(positions)]
        self._gather(local)

    def receive(self, positions: Tensor, clips: int) -> Tensor:
        """Waits for the logits of a micro-batch. A rank of another group calls it after `start`.

        Args:
            positions: The positions of this rank's clips in the micro-batch, (B,) int64 on the host.
            clips: The number of rows to return; at least B.

        Returns:
            The teacher's logits on this rank's clips, (clips, classes). A row is NaN if the teacher could not read
            the clip, and if it belongs to no clip.
        """
        assert self._transfer is not None, "`start` comes first"
        rows, work = self._transfer
        started = self.waits.start()
        work.wait()
        self.waits.stop(started)
        parts = [rows[number, : len(positions)] for number, positions in enumerate(self._positions)]
        micro_batch = torch.cat(parts)  # (clips of the micro-batch, classes)
        found = micro_batch.new_full((clips, micro_batch.shape[1]), float("nan"))
        found[: len(positions)] = micro_batch[positions.to(micro_batch.device)]
        return found

    def _gather(self, local: Tensor | None) -> None:
        """Starts one all-gather, which every rank takes part in; `local` are the logits of this rank, if any.

        All ranks send equally much, as an all-gather requires: the ranks of other groups send rows without meaning.
        """
        own = torch.zeros(max(map(len, self._positions)), self.classes, dtype=self.dtype, device=self.device)
        if local is not None:
            own[: len(local)] = local
        rows = own.new_empty(self._ranks, *own.shape)  # (ranks, clips, classes)
        self._transfer = rows, dist.all_gather_into_tensor(rows.view(-1, self.classes), own, self._group, async_op=True)


def broadcast_checkpoint(find: Callable[[], FoundCheckpoint]) -> FoundCheckpoint:
    """Returns, on every rank, the checkpoint that rank 0 finds and reads; None if it finds none.

    The other ranks do not open the file: dozens of them would wait for one disk, and might see an older file.

    Args:
        find: Called on rank 0 alone.
    """
    found: Checkpoint | None = find() if rank() == 0 else None

    def described() -> tuple[Path, dict[str, Any], list[tuple[str, torch.dtype, torch.Size]]] | None:
        if found is None:
            return None
        return found.path, found.meta, [(name, each.dtype, each.shape) for name, each in found.tensors.items()]

    description = broadcast_result(described)
    if description is not None and found is None:
        path, meta, tensors = description
        found = Checkpoint(path, {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in tensors}, meta)
    if found is not None:
        broadcast_tensors(found.tensors.values())
    return cast(FoundCheckpoint, found)
