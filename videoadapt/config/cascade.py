"""Parses cascades and leaps as users write them.

Cascades: `8@0.5,14@0.7:0.6`, `8@0.5,14@0.7:cost=0.4:margin` or `14:views:0.9`. Leaps: `7:cost=0.5` or `7:price=0.05`.

The parsed text is data only. `routing.policy.Cascade` and `Leap` are the policies that run it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from videoadapt.config.points import Point, canonical
from videoadapt.errors import ConfigError, few

Measure = Literal["probability", "margin", "entropy"]  # measure of the confidence in the top class
MEASURES: tuple[Measure, ...] = get_args(Measure)
NEVER = 2.0  # a threshold that no confidence reaches; `cost=` gives it where the cost pays for all points

_NUMBER = r"\d*\.?\d+"
_LEAP = re.compile(rf"(?P<point>[^:]+):(?P<kind>cost|price)=(?P<value>{_NUMBER})")
_THRESHOLDS = re.compile(rf"cost=(?P<cost>{_NUMBER})|(?P<list>{_NUMBER}(?:,{_NUMBER})*)")


@dataclass(frozen=True)
class CascadeSpec:
    """The fields of a cascade's text."""

    points: tuple[str, ...]  # in the order in which they run; two or more, or one with `views`
    thresholds: tuple[float, ...]  # one for each point but the last, or for each with `views`; empty with `cost`
    cost: float | None  # mean cost to fit a threshold to, as a fraction of the costliest point's cost
    measure: Measure
    views: bool = False  # whether it goes over the views of a video, too


def parse_cascade_spec(text: str, known: Sequence[str], views: int | None = None) -> CascadeSpec:
    """Parses `POINT,POINT,...:[views:]THRESHOLDS[:MEASURE]`.

    Args:
        text: With `views:`, the cascade goes over the views of a video, too, and one point is enough. THRESHOLDS is one
            number for all points, one number for each point but the last (for each point with `views:`;
            comma-separated), or `cost=NUMBER` (not with `views:`). MEASURE is one of `MEASURES`; the default is
            `probability`.
        known: The points of the model, as `model.points` lists them.
        views: Views of a video; None if they are not known.

    Raises:
        ConfigError: The text has another form, a point is not in `known` or appears twice, a threshold is above 1 and
            not `NEVER`, the number of thresholds does not match the number of points, or a video has a single view.
    """
    listed, _, rest = text.partition(":")
    over_views = rest.startswith("views:")
    threshold_text, _, measure_text = rest.removeprefix("views:").partition(":")
    measure = measure_text or "probability"
    points = tuple(str(Point.parse(point)) for point in listed.split(","))
    match = _THRESHOLDS.fullmatch(threshold_text)
    thresholds = [float(value) for value in match["list"].split(",")] if match and match["list"] else []
    valid_points = set(points) <= set(known) and len(set(points)) == len(points) > (not over_views)
    if match is None or not valid_points or measure not in MEASURES or any(1.0 < t != NEVER for t in thresholds):
        raise ConfigError(
            f"cascade {text!r}: expected POINT,POINT,...:THRESHOLDS[:MEASURE] with different points of this model "
            f"({few(known)}), thresholds from 0 to 1 such as 0.6, or cost=0.4, and a measure of "
            f"{', '.join(MEASURES)}; over views POINT,...:views:THRESHOLDS[:MEASURE]"
        )
    if over_views and match["cost"]:
        raise ConfigError(
            f"cascade {text!r}: cost= is fitted on the label table, which has no single views; give thresholds"
        )
    if over_views and views == 1:
        raise ConfigError(
            f"cascade {text!r}: goes over the views of a video, which has one; raise evaluate.temporal_views or "
            "evaluate.spatial_crops"
        )
    wanted = len(points) - (not over_views)
    if thresholds and len(thresholds) not in (1, wanted):
        raise ConfigError(f"cascade {text!r}: expected 1 threshold or {wanted}, got {len(thresholds)}")
    if len(thresholds) == 1:
        thresholds *= wanted  # one number applies to every point that has a threshold
    cost = float(match["cost"]) if match["cost"] else None
    return CascadeSpec(points, tuple(thresholds), cost, measure, over_views)


@dataclass(frozen=True)
class LeapSpec:
    """A parsed leap.

    Attributes:
        first: The point that every clip runs.
        cost: The mean cost of a clip, as a fraction of the costliest point's; None if the price is given.
        price: Of the costliest point's MACs, in probability of a right answer; None if the cost is given.
    """

    first: str
    cost: float | None
    price: float | None


def parse_leap_spec(text: str, known: Sequence[str]) -> LeapSpec:
    """Parses `POINT:cost=FRACTION` or `POINT:price=NUMBER`.

    Args:
        text: The leap as a user writes it.
        known: The points of the model.

    Raises:
        ConfigError: The text has another form, or the point is not in `known`, or the only one there.
    """
    match = _LEAP.fullmatch(text)
    if match is None or canonical(match["point"]) not in known or len(known) == 1:
        raise ConfigError(
            f"leap {text!r}: expected POINT:cost=0.4 or POINT:price=0.05, and a model of several points; this one has "
            f"{few(known)}"
        )
    value = float(match["value"])
    is_cost = match["kind"] == "cost"
    return LeapSpec(canonical(match["point"]), value if is_cost else None, None if is_cost else value)
