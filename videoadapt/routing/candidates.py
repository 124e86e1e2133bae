"""The policies among which a calibration chooses, in orders from the safest to the riskiest.

An order may depend on the label table, whose clips are not in the calibration split, and never on the outcomes of the
calibration. Where there is no label table, orders follow the cost of the points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
import pandas as pd

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.config.sections import ModelConfig
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import plural
from videoadapt.model.checkpoint import weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.decide import clip_macs, decide, views_run
from videoadapt.routing.fit_assigner import SELECTING
from videoadapt.routing.label_inputs import (
    label_inputs,
    label_summary_path,
    outcomes_path,
    read_label_summary,
    read_outcomes,
)
from videoadapt.routing.label_rules import Bools, Choice, Floats, confidence_matrix, right_matrix
from videoadapt.routing.leap_rules import answer_features
from videoadapt.routing.learn_then_test import split_delta
from videoadapt.routing.policy import Assigned, Cascade, Evidence, Fixed, Leap, Mixture, Policy, Step
from videoadapt.runtime.files import read_parquet

FRACTIONS = tuple(number / 20 for number in range(1, 20))  # of a mixture's clips at its cheaper point
# Densest near 1, where a cascade and an assigner begin to save.
THRESHOLDS: tuple[float, ...] = (
    *(0.9999, 0.9998, 0.9995, 0.999, 0.998, 0.995),
    *(number / 200 for number in range(198, 99, -1)),  # 0.99 to 0.5
    *(number / 50 for number in range(24, -1, -1)),  # 0.48 to 0
)
# Of a leap: from 0, where every clip gets the point that is most probably right, to where all stay at the first point.
PRICES = (0.0, *(float(f"{0.002 * 1.08**number:.3g}") for number in range(120)))
_NO_LEAPS = "no leap is tested, since leaps are fitted on it"
_MOST_KNOWN = 5000  # clips of the label table; more would not change the orders
_LONGEST_CASCADE = 3  # points; longer ones pay for more points than they save


@dataclass(frozen=True)
class Order:
    """Policies in the order of their tests, from the safest to the riskiest, and from the costliest to the cheapest.

    Attributes:
        name: What the policies have in common.
        policies: The policies.
        predicted: Cost of the cheapest policy that the calibration will most likely prove, by the label table, as a
            fraction of the costliest point's; 1 if there is none. None if the table does not tell.
    """

    name: str
    policies: tuple[Policy, ...]
    predicted: float | None = None


@dataclass(frozen=True)
class KnownClips:
    """Clips with known outcomes that are not in the calibration split.

    Attributes:
        right: Whether the model is right, `(clips, points)`.
        confidence: Its confidence, by measure, `(clips, points)`.
        assigned: The assigner's probabilities on the clips that chose its threshold, `(selecting, points)`.
        right_assigned: Whether the model is right on these, `(selecting, points)`.
    """

    right: Bools
    confidence: Mapping[Measure, Floats]
    assigned: Floats | None = None
    right_assigned: Bools | None = None

    def outcomes(self, policy: Policy, model: ModelConfig) -> tuple[float, float]:
        """Returns the mean loss of a policy against the costliest point, and its mean cost as a fraction of it."""
        own = policy.assigner is not None and self.right_assigned is not None
        right = self.right_assigned if own and self.right_assigned is not None else self.right
        clips = len(right)
        # Evenly spread draws: a mixture then has exactly its fractions.
        draws = (np.random.default_rng(0).permutation(clips) + 0.5) / max(clips, 1)
        evidence = Evidence(clips, model.points, self.assigned if own else None, right, draws=draws)

        def stored(rows: Choice, step: Step) -> Mapping[Measure, Floats]:
            return {measure: values[rows, step.point] for measure, values in self.confidence.items()}

        decision = decide(policy, evidence, stored)
        costs, _ = clip_macs(policy, views_run(policy, decision, len(model.points), clips=1, crops=1), model)
        lost = right[:, 0] & ~right[np.arange(clips), decision.points]
        return float(lost.mean()), float(costs.mean()) / point_macs(model)[model.points[0]]


def orders_of(
    model: ModelConfig, assigned: Assigned | None, known: KnownClips | None, *, provable: float, views: int
) -> list[Order]:
    """Returns the orders, all policies of which are tested.

    Args:
        model: The model's config.
        assigned: The policy of the run's assigner; None if there is none.
        known: The label table; None if there is none.
        provable: Largest mean loss on the table with which a policy will most likely be proven; see `provable_loss`.
        views: Views of a video.
    """
    points = model.points
    hull = points[:: len(points) - 1] if known is None else _on_hull(known, model)
    words = "the costliest and the cheapest point" if known is None else "mixtures that the label table favours"
    paths = {"fixed points and their mixtures": points, words: hull}
    orders = [Order(name, _mixtures(path)) for name, path in paths.items()]
    if points == hull:
        orders = orders[:1]
    if assigned is not None:
        orders.append(Order("assigned", tuple(assigned.at(threshold) for threshold in THRESHOLDS)))
    orders = [_predicted(order, known, model, provable) for order in orders]
    # One order for the best cascade of the table: each further order would take a part of delta.
    every = known is not None
    cascades = (_predicted(Order("cascade", each), known, model, provable) for each in _cascades(points, every))
    cascade = min(cascades, key=_cost)
    orders.append(cascade)
    if known is not None:
        leaps = [_predicted(Order("leap", each), known, model, provable) for each in _leaps(known, model)]
        orders += [min(leaps, key=_cost)] if leaps else []
    if views > 1:
        first = cascade.policies[0]
        assert isinstance(first, Cascade), "`_cascades` has cascades"
        orders.append(Order("cascade over views", _cascade_order(points[:1], views=True)))
        orders.append(Order("cascade over points and views", _cascade_order(first.points, first.measure, views=True)))
    return orders


def delta_of_orders(orders: Sequence[Order], delta: float) -> list[float]:
    """Returns the part of delta of each order; see `split_delta`.

    An order whose cost the label table cannot predict, such as one over views, counts as the best of the others.
    """
    known = [order.predicted for order in orders if order.predicted is not None]
    least = min(known, default=1.0)
    return split_delta(delta, [least if order.predicted is None else order.predicted for order in orders])


def _mixtures(path: Sequence[str]) -> tuple[Policy, ...]:
    """Returns the mixtures of each two neighbours of a path of points, and the points, from the first to the last."""
    found: list[Policy] = []
    for first, second in pairwise(path):
        found += [Mixture((first, second), fraction) for fraction in FRACTIONS] + [Fixed(second)]
    return tuple(found)


def _on_hull(known: KnownClips, model: ModelConfig) -> tuple[str, ...]:
    """Returns the points that no mixture of two others beats on the label table, costliest first."""
    found = {point: known.outcomes(Fixed(point), model) for point in model.points}
    return upper_hull({point: (cost, -loss) for point, (loss, cost) in found.items()})


def upper_hull(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Returns the names of the points that no random mixture of two others beats, costliest first.

    Args:
        points: Cost and value, such as accuracy, by name; costliest first.
    """
    hull: list[str] = []
    for name, (cost, value) in points.items():
        while len(hull) > 1:
            (first_cost, first_value), (last_cost, last_value) = points[hull[-2]], points[hull[-1]]
            # The last one stays only if it lies above the way past it, to the new point.
            if (last_value - first_value) * (first_cost - cost) > (value - first_value) * (first_cost - last_cost):
                break
            hull.pop()
        hull.append(name)
    return tuple(hull)


def _cascades(points: Sequence[str], every: bool) -> list[tuple[Policy, ...]]:
    """Returns cascades from a cheap point to the costliest; those of the cheapest point alone unless `every`."""
    if not every:
        return [_cascade_order((points[-1], points[0]))]
    sizes = range(2, min(_LONGEST_CASCADE, len(points)) + 1)
    paths = [(*path, points[0]) for size in sizes for path in combinations(points[:0:-1], size - 1)]
    return [_cascade_order(path, measure) for path in paths for measure in MEASURES]


def _cascade_order(path: Sequence[str], measure: Measure = "probability", *, views: bool = False) -> tuple[Policy, ...]:
    suffix = "" if measure == "probability" else f":{measure}"
    count = len(path) - (not views)
    start = f"{','.join(path)}:{'views:' if views else ''}"
    return tuple(Cascade(tuple(path), (t,) * count, measure, f"{start}{t:g}{suffix}", views) for t in THRESHOLDS)


def _leaps(known: KnownClips, model: ModelConfig) -> Iterator[tuple[Policy, ...]]:
    """Yields the leaps from each point but the costliest, fitted on the label table, at prices that save cost there."""
    for number, first in enumerate(model.points[1:], start=1):
        confidence = {measure: values[:, number] for measure, values in known.confidence.items()}
        if not np.isfinite(answer_features(confidence)).all(axis=1).any():
            continue  # all answers of this point are NaN
        leap = Leap.fit(first, model, confidence, known.right)
        leaps = [leap.at(price) for price in PRICES]
        # With many NaN answers, which leap to the costliest point, no price saves.
        if saving := tuple(each for each in leaps if known.outcomes(each, model)[1] < 1):
            yield saving


def _cost(order: Order) -> float:
    return 1.0 if order.predicted is None else order.predicted


def _predicted(order: Order, known: KnownClips | None, model: ModelConfig, provable: float) -> Order:
    """Returns an order with its predicted cost."""
    if known is None or (order.policies[0].assigner is not None and known.assigned is None):
        return order  # an older version of `assign` did not write the assigner's probabilities
    cheapest = 1.0
    for policy in order.policies:
        loss, cost = known.outcomes(policy, model)
        if loss > provable:  # the tests, too, would most likely end here
            break
        cheapest = min(cheapest, cost)
    return replace(order, predicted=cheapest)


def known_clips(
    config: Config, manifest: Manifest, model: TimeSformer, assigned: Assigned | None
) -> tuple[KnownClips | None, str]:
    """Reads the clips that may fix the orders of a calibration: those of the label table.

    Returns:
        The clips, and in words where they come from; None if there is no label table of this model and manifest.
    """
    if not outcomes_path(config.run.dir).exists() or not label_summary_path(config.run.dir).exists():
        return None, f"the cost of the points: the run has no label table; {_NO_LEAPS}"
    now = label_inputs(config, manifest.hash, weights_digest(model))
    summary = read_label_summary(config.run.dir)
    if now.manifest != summary["manifest"] or now.weights != summary["model"]:
        return None, f"the cost of the points: the label table is of other videos or weights; {_NO_LEAPS}"
    table = read_outcomes(config.run.dir)
    clips, right = right_matrix(table, config.model.points, source=summary["source"])
    confidence = {measure: confidence_matrix(table, config.model.points, measure) for measure in MEASURES}
    chosen = np.sort(np.random.default_rng(0).permutation(len(right))[:_MOST_KNOWN])
    probabilities, right_selecting = _selecting(config, clips, right) if assigned is not None else (None, None)
    known = KnownClips(
        right[chosen], {m: values[chosen] for m, values in confidence.items()}, probabilities, right_selecting
    )
    return known, f"the label table of {plural(len(right), 'clip')}"


def _selecting(config: Config, clips: pd.DataFrame, right: Bools) -> tuple[Floats | None, Bools | None]:
    """Returns the assigner's probabilities on the clips that chose its threshold, and where the model is right."""
    path = config.run.dir / "assigner" / SELECTING
    if not path.exists():
        return None, None
    frame = read_parquet(path, "run `assign` again", ["video", "clip", *config.model.points])
    position = {key: number for number, key in enumerate(clips[["video", "clip"]].itertuples(index=False, name=None))}
    rows = [position.get(key, -1) for key in frame[["video", "clip"]].itertuples(index=False, name=None)]
    if -1 in rows:  # of earlier labels
        return None, None
    return frame[list(config.model.points)].to_numpy(np.float64), right[rows]
