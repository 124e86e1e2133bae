"""Which points a step trains: all of them (ReViT), or some that are drawn anew for each step (SuperViT)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.runtime.seeds import seed_of


def possible_draws(points: Sequence[str], rule: Literal["all", "sampled"]) -> dict[tuple[str, ...], float]:
    """The sets of points that a step may train, costliest first, with their probabilities.

    `sampled`: the longest length at keep 1 and at one of its lower keeps, and another length at keep 1 and at one of
    its lower keeps; lengths have equal chances, and so have the keeps of one. A length without lower keeps comes alone.
    """
    if rule == "all":
        return {tuple(points): 1.0}
    longest, *others = sorted({Point.parse(point).length for point in points}, reverse=True)
    firsts = _with_each_keep(points, longest)
    seconds = {
        pair: 1 / len(others) / len(pairs) for n in others for pairs in [_with_each_keep(points, n)] for pair in pairs
    }
    return {
        tuple(point for point in points if point in first + second): chance / len(firsts)
        for first in firsts
        for second, chance in (seconds or {(): 1.0}).items()
    }


def _with_each_keep(points: Sequence[str], length: int) -> list[tuple[str, ...]]:
    whole = str(Point(length))
    lower = [point for point in points if point != whole and Point.parse(point).length == length]
    return [(whole, point) for point in lower] or [(whole,)]


def drawn_points(config: Config, step: int) -> tuple[str, ...]:
    """The points of a step, costliest first: they depend on `run.seed` and the step alone, so every rank knows them."""
    draws = possible_draws(config.model.points, config.train.draw)
    chosen = random.Random(seed_of("draw", config.run.seed, step))
    return chosen.choices(list(draws), list(draws.values()))[0]


def point_shares(config: Config) -> dict[str, float]:
    """In which share of the steps each point is trained."""
    draws = possible_draws(config.model.points, config.train.draw)
    return {point: sum(chance for draw, chance in draws.items() if point in draw) for point in config.model.points}


def teacher_of(point: str, costliest: str) -> str | None:
    """The point whose answers another learns: its length's at keep 1 (SuperViT), of these the costliest's (ReViT)."""
    parsed = Point.parse(point)
    if parsed.keep < 1:
        return str(Point(parsed.length))
    return None if point == costliest else costliest
