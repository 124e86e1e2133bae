"""Policies: rules that give each clip its operating point, as pure functions of the evidence on the clips.

Points are numbered as in `model.points`: 0 is the costliest, the last the cheapest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from videoadapt.assigner import Assigner
from videoadapt.checkpoint import load_assigner
from videoadapt.errors import UserError
from videoadapt.labels import Bools, Choice, Floats, cheapest_sufficient, last_true


@dataclass(frozen=True)
class Evidence:
    """What a policy may look at: for `clips` clips and `points` points, each array `(clips, points)` or absent.

    `assigned` are the assigner's probabilities that a point is the clip's label; `right` says whether the model is
    right on the clip at a point, which only the oracle may know.
    """

    clips: int
    points: tuple[str, ...]
    assigned: Floats | None = None
    right: Bools | None = None


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


def parse_policy(text: str, assigned: Assigned | None, points: Sequence[str]) -> Policy:
    """`assigned` or `fixed:POINT`, the policies that can be used on clips without truth."""
    kind, _, point = text.partition(":")
    if kind == "fixed" and point in points:
        return Fixed(point)
    if kind == "assigned" and not point and assigned is not None:
        return assigned
    known = [*(f"fixed:{p}" for p in points), *(["assigned"] if assigned else [])]
    hint = "" if assigned else " (assigned needs an assigner: `videoadapt assign CONFIG`)"
    raise UserError(f"policy {text!r}: expected one of {', '.join(known)}{hint}")
