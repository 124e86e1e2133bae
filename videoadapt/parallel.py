"""The ranks of a job: who am I of how many, and waiting for one another.

One process alone is rank 0 of 1: code that asks for its rank needs no second path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from videoadapt.errors import RunError
from videoadapt.groups import GroupPlan

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)  # for the slowest rank; the launcher ends the job at once where one dies


@contextmanager
def ranks() -> Iterator[None]:
    """While entered, this process is one of the ranks that torchrun started (`WORLD_SIZE`), or the only one.

    Raises `RunError` where the ranks cannot meet.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    try:
        # Host tensors by gloo, those of a GPU by NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:  # ValueError: variables of the launcher are missing
        raise RunError(f"the {os.environ['WORLD_SIZE']} ranks (WORLD_SIZE) cannot meet: {error}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def first_rank_first(action: Callable[[], T]) -> T:
    """Rank 0 does it, then the others, which find on the disk what it has made."""
    if rank() == 0:
        result = action()
    wait_for_all()
    return result if rank() == 0 else action()


def summed(values: Tensor) -> Tensor:
    """The sum of a small host tensor over all ranks, the same to the bit on each."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def spread_gradients(model: nn.Module) -> nn.Module:
    """The model in torch's `DistributedDataParallel`, which **sums** gradients over all ranks while they are computed.

    Not every rank uses every parameter; one that no rank has used in a step keeps no gradient. Alone, the model itself.
    """
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )
    wrapped.register_comm_hook(None, _sum)
    return wrapped


def _sum(state, bucket):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001 - DDP refuses annotations in text
    # DDP's own hook divides by the number of ranks, with the precision of a float32.
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def gradients_apart(model: nn.Module) -> AbstractContextManager[None]:
    """While entered, backward passes add to this rank's gradients alone; the next one outside sums them all."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


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
