"""Seeds are the same wherever they are made."""

from __future__ import annotations

from videoadapt.runtime.seeds import seed_of


def test_seeds_are_the_same_everywhere_and_differ_by_any_part() -> None:
    assert seed_of("start", 0, 3, "a.mp4") == 8_203_763_905_338_369_795  # b2sum -l 64, halved
    assert len({seed_of(*parts) for parts in [(1, 23), (12, 3), ("1", "2", "3"), (123,)]}) == 4
