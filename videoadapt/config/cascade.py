"""Parses cascades as users write them: `8@0.5,14@0.7:0.6` or `8@0.5,14@0.7:cost=0.4:margin`.

The parsed text is data only. `routing.policy.Cascade` is the policy that runs it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from videoadapt.config.points import Point
from videoadapt.errors import ConfigError, few

Measure = Literal["probability", "margin", "entropy"]  # measure of the confidence in the top class
MEASURES: tuple[Measure, ...] = get_args(Measure)

_NUMBER = r"\d*\.?\d+"
_THRESHOLDS = re.compile(rf"cost=(?P<cost>{_NUMBER})|(?P<list>{_NUMBER}(?:,{_NUMBER})*)")


@dataclass(frozen=True)
class CascadeSpec:
    """The fields of a cascade's text."""

    points: tuple[str, ...]  # two or more, in the order in which they run
    thresholds: tuple[float, ...]  # one for each point but the last; empty if `cost` is given
    cost: float | None  # mean cost to fit a threshold to, as a fraction of the costliest point's cost
    measure: Measure


def parse_cascade_spec(text: str, known: Sequence[str]) -> CascadeSpec:
    """Parses `POINT,POINT,...:THRESHOLDS[:MEASURE]`.

    Args:
        text: THRESHOLDS is one number for all points, one number for each point but the last (comma-separated), or
            `cost=NUMBER`. MEASURE is one of `MEASURES`; the default is `probability`.
        known: The points of the model, as `model.points` lists them.

    Raises:
        ConfigError: The text has another form, a point is not in `known` or appears twice, a threshold is above 1, or
            the number of thresholds does not match the number of points.
    """
    listed, _, rest = text.partition(":")
    threshold_text, _, measure_text = rest.partition(":")
    measure = measure_text or "probability"
    points = tuple(str(Point.parse(point)) for point in listed.split(","))
    match = _THRESHOLDS.fullmatch(threshold_text)
    thresholds = [float(value) for value in match["list"].split(",")] if match and match["list"] else []
    valid_points = set(points) <= set(known) and len(set(points)) == len(points) > 1
    if match is None or not valid_points or measure not in MEASURES or max(thresholds, default=0.0) > 1.0:
        raise ConfigError(
            f"cascade {text!r}: expected POINT,POINT,...:THRESHOLDS[:MEASURE] with different points of this model "
            f"({few(known)}), thresholds from 0 to 1 such as 0.6, or cost=0.4, and a measure of "
            f"{', '.join(MEASURES)}"
        )
    if thresholds and len(thresholds) not in (1, len(points) - 1):
        raise ConfigError(f"cascade {text!r}: expected 1 threshold or {len(points) - 1}, got {len(thresholds)}")
    if len(thresholds) == 1:
        thresholds *= len(points) - 1  # one number applies to every point but the last
    return CascadeSpec(points, tuple(thresholds), float(match["cost"]) if match["cost"] else None, measure)
