"""Which points a step trains: all of them (ReViT), or a few that are drawn for each step (SuperViT)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.runtime.seeds import seed_of


def possible_draws(points: Sequence[str], rule: Literal["all", "sampled"]) -> dict[tuple[str, ...], float]:
    """Returns the sets of points that a step may train, with their probabilities.

    `sampled` draws four points (SuperViT): the longest length with all tokens, the same at one of its
    lower keeps, another length with all tokens, and the same at one of its lower keeps. All other lengths are equally
    likely, and so are the keeps of a length. A length without lower keeps gives one point.

    Args:
        points: All points of the model, costliest first.
        rule: `train.draw`.

    Returns:
        The probability of each set, which is a tuple of points, costliest first. The probabilities add up to 1.
    """
    if rule == "all":
        return {tuple(points): 1.0}
    longest, *others = sorted({Point.parse(point).length for point in points}, reverse=True)
    firsts = _with_each_keep(points, longest)
    seconds = {
        pair: 1 / len(others) / len(pairs) for n in others for pairs in [_with_each_keep(points, n)] for pair in pairs
    }
    return {
        # Filtering `points` keeps their order: costliest first.
        tuple(point for point in points if point in first + second): probability / len(firsts)
        for first in firsts
        for second, probability in (seconds or {(): 1.0}).items()  # a model may have one length only
    }


def _with_each_keep(points: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """Returns pairs of a length with all tokens and each lower keep; without lower keeps, the length alone."""
    whole = str(Point(length))
    lower = [point for point in points if point != whole and Point.parse(point).length == length]
    return [(whole, point) for point in lower] or [(whole,)]


def drawn_points(config: Config, step: int) -> tuple[str, ...]:
    """Returns the points of a step, costliest first.

    They depend on `run.seed` and the step only, so that every rank and every resumed run draws the same.
    """
    draws = possible_draws(config.model.points, config.train.draw)
    generator = random.Random(seed_of("draw", config.run.seed, step))
    return generator.choices(list(draws), list(draws.values()))[0]


def point_probabilities(config: Config) -> dict[str, float]:
    """Returns, for each point, the probability that a step trains it."""
    draws = possible_draws(config.model.points, config.train.draw)
    return {point: sum(p for draw, p in draws.items() if point in draw) for point in config.model.points}


def teacher_of(point: str, costliest: str) -> str | None:
    """Returns the point whose logits teach another point, or None for the costliest point.

    A point that drops tokens learns from its length with all tokens (SuperViT). A length with all tokens learns from
    the costliest point (ReViT).
    """
    parsed = Point.parse(point)
    if parsed.keep < 1:
        return str(Point(parsed.length))
    return None if point == costliest else costliest
