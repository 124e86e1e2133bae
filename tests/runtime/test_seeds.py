"""Seeds do not depend on the process or the machine; the global generators are restored."""

from __future__ import annotations

import pickle
import random

import numpy as np
import torch

from videoadapt.runtime.seeds import seed_of, seeded


def test_a_seed_is_a_known_number_and_depends_on_each_part() -> None:
    assert seed_of("start", 0, 3, "a.mp4") == 8_203_763_905_338_369_795  # b2sum -l 64, halved
    assert len({seed_of(*parts) for parts in [(1, 23), (12, 3), ("1", "2", "3"), (123,)]}) == 4


def test_global_generators_are_seeded_and_then_restored() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def states() -> tuple[str, bytes, str]:
        # In full, because the arrays inside cannot be compared by `==`.
        return repr(random.getstate()), pickle.dumps(np.random.get_state()), repr(torch.get_rng_state().tolist())

    with seeded(7):
        first = draw()
    before = states()
    with seeded(7):
        assert draw() == first
    assert states() == before
    with seeded(8):
        assert all(one != other for one, other in zip(draw(), first, strict=True))
