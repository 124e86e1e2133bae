"""Chains of points for early exit, as they are written: `8@0.5,14@0.7:0.6` or `8@0.5,14@0.7:cost=0.4:margin`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from videoadapt.config.points import Point
from videoadapt.errors import ConfigError

Measure = Literal["probability", "margin", "entropy"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

_THRESHOLDS = re.compile(r"cost=(\d*\.?\d+)|(\d*\.?\d+(?:,\d*\.?\d+)*)")


@dataclass(frozen=True)
class Chain:
    """`points` in the order in which they run, with a threshold for each but the last, or a cost to fit one to."""

    points: tuple[str, ...]
    thresholds: tuple[float, ...]  # empty where `cost` is given
    cost: float | None  # share of the costliest point's
    measure: Measure

    @classmethod
    def parse(cls, text: str, known: Sequence[str]) -> Chain:
        """`POINTS:THRESHOLDS[:MEASURE]` with `known` points; one threshold serves all. Raises `ConfigError`."""
        listed, _, rest = text.partition(":")
        wanted, _, measure = rest.partition(":")
        measure = measure or "probability"
        points = tuple(str(Point.parse(point)) for point in listed.split(","))
        given = _THRESHOLDS.fullmatch(wanted)
        thresholds = [float(value) for value in given[2].split(",")] if given and given[2] else []
        different = set(points) <= set(known) and len(set(points)) == len(points) > 1
        if given is None or not different or measure not in MEASURES or max(thresholds, default=0.0) > 1.0:
            raise ConfigError(
                f"cascade {text!r}: expected POINT,POINT,...:THRESHOLDS[:MEASURE] with different points of this model "
                f"({', '.join(known)}), thresholds from 0 to 1 such as 0.6, or cost=0.4, and a measure of "
                f"{', '.join(MEASURES)}"
            )
        if thresholds and len(thresholds) not in (1, len(points) - 1):
            raise ConfigError(f"cascade {text!r}: expected 1 threshold or {len(points) - 1}, got {len(thresholds)}")
        repeated = thresholds * (len(points) - 1) if len(thresholds) == 1 else thresholds
        return cls(points, tuple(repeated), float(given[1]) if given[1] else None, measure)
