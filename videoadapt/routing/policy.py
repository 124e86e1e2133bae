"""Policies: rules that give each clip its operating point, as pure functions of the evidence on the clips.

Points are numbered as in `model.points`: 0 is the costliest, the last the cheapest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from videoadapt.config.cascade import CascadeSpec, Measure, parse_cascade_spec
from videoadapt.config.cost import point_macs
from videoadapt.config.points import canonical
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError
from videoadapt.routing.assigner import Assigner, load_assigner
from videoadapt.routing.label_rules import (
    Bools,
    Choice,
    Floats,
    cheapest_sufficient,
    confidence_matrix,
    last_true,
)


@dataclass(frozen=True)
class Evidence:
    """What a policy may look at: for `clips` clips and `points` points, each array `(clips, points)` or absent.

    `assigned` are the assigner's probabilities that a point is the clip's label; `right` says whether the model is
    right on the clip at a point, which only the oracle may know. `confidence`, by measure, is how sure the model is at
    a point; a cascade looks at those that it has run.
    """

    clips: int
    points: tuple[str, ...]
    assigned: Floats | None = None
    right: Bools | None = None
    confidence: Mapping[Measure, Floats] | None = None


class Policy(Protocol):
    """A rule that gives each clip its point."""

    @property
    def name(self) -> str:
        """The name in tables and JSON."""

    @property
    def assigner(self) -> Assigner | None:
        """The network whose probabilities the policy needs, and whose cost it pays."""

    def choose(self, evidence: Evidence) -> Choice:
        """The number of the point of each clip, `(clips,)`."""


@dataclass(frozen=True)
class Fixed:
    """Every clip at one point."""

    point: str
    assigner = None

    @property
    def name(self) -> str:
        """`fixed:14`."""
        return f"fixed:{self.point}"

    def choose(self, evidence: Evidence) -> Choice:
        """The same point for all."""
        if self.point not in evidence.points:
            raise UserError(f"policy {self.name}: this model has the points {', '.join(evidence.points)}")
        return np.full(evidence.clips, evidence.points.index(self.point))


@dataclass(frozen=True)
class Assigned:
    """The cheapest point that suffices with a probability of at least `threshold`, by the assigner.

    A point suffices where the label is that point or a cheaper one, so the probabilities add up from the cheapest.
    """

    assigner: Assigner
    points: tuple[str, ...]  # that the assigner was fitted for
    threshold: float = 0.5
    name = "assigned"

    @classmethod
    def load(cls, source: str | Path) -> Assigned:
        """The policy of a run folder or of an assigner's checkpoint. Raises `CheckpointError`."""
        return cls(*load_assigner(source))

    def choose(self, evidence: Evidence) -> Choice:
        """By the assigner's probabilities."""
        if evidence.points != self.points:
            known, here = ", ".join(self.points), ", ".join(evidence.points)
            raise UserError(f"policy assigned: its assigner was fitted for the points {known}; this model has {here}")
        assert evidence.assigned is not None, "whoever gathers the evidence runs the assigner"
        return cheapest_sufficient(evidence.assigned, self.threshold)


@dataclass(frozen=True)
class Cascade:
    """Early exit: the points of a chain run one after the other, until an answer is sure enough (SuperViT, Fig. 2).

    An answer whose confidence is at least its point's threshold stays; the last point needs none. A clip pays for all
    the points that it ran (`cost_of_ending_at`).
    """

    chain: tuple[str, ...]
    thresholds: tuple[float, ...]
    measure: Measure = "probability"
    text: str = field(default="", compare=False)
    assigner = None

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.chain) - 1:
            raise UserError(
                f"cascade {self.chain}: expected {len(self.chain) - 1} thresholds, one for each point but the last, "
                f"got {len(self.thresholds)}"
            )

    @property
    def name(self) -> str:
        """`cascade:` and the text that it was made from, or else its points, exact thresholds and measure."""
        written = f"{','.join(self.chain)}:{','.join(map(str, self.thresholds))}:{self.measure}"
        return f"cascade:{self.text or written}"

    def choose(self, evidence: Evidence) -> Choice:
        """The point where each clip ends."""
        assert evidence.confidence is not None, "whoever gathers the evidence knows the model's answers"
        numbers = np.array([evidence.points.index(point) for point in self.chain])
        sure = evidence.confidence[self.measure][:, numbers[:-1]] >= np.array(self.thresholds)
        ends = np.column_stack([sure, np.ones(evidence.clips, dtype=bool)]).argmax(1)
        return numbers[ends]


def cost_of_ending_at(policy: Policy, points: Sequence[str], costs: Floats) -> Floats:
    """What a clip costs whose answer is that of each point, `(points,)`: a cascade has paid for those before, too."""
    paid = costs.copy()
    if isinstance(policy, Cascade):
        numbers = [list(points).index(point) for point in policy.chain]
        paid[numbers] = np.cumsum(costs[numbers])
    return paid


def fit_threshold(confidences: Floats, costs: Floats, mean_cost: float) -> float:
    """The highest threshold, one for the whole chain, at which clips cost `mean_cost` or less on average.

    `confidences` are `(clips, points)` and `costs` `(points,)` along the chain; the truth is not needed. A threshold of
    2 is never reached: every clip runs the whole chain. Raises `UserError` where the first point alone costs more.
    """

    def cost(threshold: float) -> float:
        goes_on = np.cumprod(confidences[:, :-1] < threshold, axis=1)  # whether a clip runs each further point
        return float(costs[0] + (goes_on @ costs[1:]).mean())

    if costs[0] > mean_cost:
        raise UserError(f"cascade: its first point alone costs {costs[0]:.3g}, which is more than {mean_cost:g}")
    candidates = np.unique(np.append(confidences[:, :-1], [0.0, 2.0]))
    return float(candidates[bisect_right(candidates, mean_cost, key=cost) - 1])


def parse_cascade(text: str, model: ModelConfig, run: Path | None) -> Cascade:
    """A cascade from what `parse_cascade_spec` reads. Raises `UserError`.

    Where a cost is given, the threshold is fitted on the label table of the folder `run`, such that one of its clips
    costs this share of the costliest point on average.
    """
    chain = parse_cascade_spec(text, model.points)
    thresholds = chain.thresholds
    if chain.cost is not None:
        thresholds = (_fitted(chain, chain.cost, model, run),) * (len(chain.points) - 1)
    return Cascade(chain.points, thresholds, chain.measure, text)


def _fitted(chain: CascadeSpec, share: float, model: ModelConfig, run: Path | None) -> float:
    path = (run or Path()) / "labels" / "outcomes.parquet"
    if run is None or not path.exists():
        raise UserError(
            f"cascade: cost={share:g} is fitted on a label table, and {path} is not there; run `label` first"
        )
    macs = point_macs(model)
    costs = np.array([macs[point] / macs[model.points[0]] for point in chain.points])
    return fit_threshold(confidence_matrix(pd.read_parquet(path), chain.points, chain.measure), costs, share)


@dataclass(frozen=True)
class Random:
    """Points drawn without looking: exactly the given mix (share of each point, costliest first), in random order."""

    mix: tuple[float, ...]
    seed: int = 0
    name = "random"
    assigner = None

    def choose(self, evidence: Evidence) -> Choice:
        """A shuffled list with the shares of the mix, rounded so that they add up."""
        edges = np.rint(np.cumsum(self.mix) / np.sum(self.mix) * evidence.clips).astype(np.int64)
        counts = np.diff(edges, prepend=0)
        return np.random.default_rng(self.seed).permutation(np.repeat(np.arange(len(self.mix)), counts))


@dataclass(frozen=True)
class Oracle:
    """The cheapest point at which the model is right; the cheapest of all where none is."""

    name = "oracle"
    assigner = None

    def choose(self, evidence: Evidence) -> Choice:
        """By the truth, so for reports alone."""
        if evidence.right is None:
            raise UserError("policy oracle: needs to know the truth; it exists in `videoadapt evaluate` alone")
        return last_true(evidence.right)


def mix_of(choice: Choice, points: int) -> tuple[float, ...]:
    """The share of the clips at each point."""
    return tuple(np.bincount(choice, minlength=points) / max(len(choice), 1))


def parse_policy(text: str, assigned: Assigned | None, model: ModelConfig, run: Path | None = None) -> Policy:
    """`assigned`, `fixed:POINT` or `cascade:...` (see `parse_cascade`): the policies for clips without truth."""
    kind, _, point = text.partition(":")
    if kind == "fixed" and canonical(point) in model.points:
        return Fixed(canonical(point))
    if kind == "cascade":
        return parse_cascade(point, model, run)
    if kind == "assigned" and not point and assigned is not None:
        return assigned
    known = [*(f"fixed:{p}" for p in model.points), "cascade:POINTS:THRESHOLDS", *(["assigned"] if assigned else [])]
    hint = "" if assigned else " (assigned needs an assigner: `videoadapt assign CONFIG`)"
    raise UserError(f"policy {text!r}: expected one of {', '.join(known)}{hint}")
