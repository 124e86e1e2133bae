"""Seeds: a random draw depends on its purpose (seed, epoch, step, clip) and on nothing else."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """Returns a seed in [0, 2^63) that depends on `parts` only, not on the process, the machine or the version.

    Args:
        parts: The purpose of the draw, and the run's seed, epoch, clip and so on.
    """
    # Python's hash() is salted in each process. The separator keeps (1, 23) and (12, 3) apart.
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1  # torch takes signed 64-bit seeds


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and torch (CPU); restores their states at the end.

    It is needed for libraries that draw from the global generators. It does not change the generators of GPUs, because
    drop path uses them.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's limit
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would also seed all GPUs
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
