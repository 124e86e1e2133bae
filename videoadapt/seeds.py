"""Seeds: what is drawn at random depends on what it is drawn for, and on nothing else."""

from __future__ import annotations

import hashlib


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on `parts` alone: not on the process, not on the machine."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
