"""The ranks of a job: who am I of how many, and waiting for one another.

One process alone is rank 0 of 1: code that asks for its rank needs no second path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from videoadapt.errors import RunError

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
        dist.init_process_group("gloo", timeout=_PATIENCE)
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
