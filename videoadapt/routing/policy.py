"""Policies: rules that give each clip its operating point.

A policy is one class in this module. `routing.decide.decide` runs every policy, on stored answers and on the model.
Points are numbered as in `model.points`: 0 is the costliest, the last is the cheapest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from videoadapt.config.cascade import CascadeSpec, Measure, parse_cascade_spec
from videoadapt.config.cost import point_macs
from videoadapt.config.points import canonical
from videoadapt.config.sections import AssignConfig, ModelConfig
from videoadapt.errors import CheckpointError, UserError, few, plural
from videoadapt.model.checkpoint import Checkpoint, find_checkpoint, require_same, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner, assigner_checkpoints, restore_assigner
from videoadapt.routing.label_inputs import read_outcomes, require_same_label_inputs
from videoadapt.routing.label_rules import (
    Bools,
    Choice,
    Floats,
    cheapest_sufficient,
    confidence_matrix,
    fit_threshold,
    last_true,
)
from videoadapt.runtime.console import say
from videoadapt.runtime.inputs import Inputs

NO_POINT = -1  # stands for: the clip has run no point yet, or it stops here
Need = Literal["assigner", "confidence", "truth", "population"]
# Fields of `assign` that only fitting uses. A loaded assigner may have been fitted with other values.
FITTING = ("epochs", "batch", "lr", "weight_decay", "loss", "mu", "select", "tolerance")


@dataclass(frozen=True)
class Evidence:
    """The facts about `clips` clips that a policy may read. Every array is `(clips, points)`; None if it is not known.

    Attributes:
        clips: Number of clips.
        points: The points of the model, costliest first.
        assigned: The assigner's probability that a point is the clip's label.
        right: Whether the model is right on the clip at a point.
        confidence: The model's confidence at a point, by measure. NaN at the points that the clip has not run.
    """

    clips: int
    points: tuple[str, ...]
    assigned: Floats | None = None
    right: Bools | None = None
    confidence: Mapping[Measure, Floats] = field(default_factory=dict)

    def take(self, rows: Choice) -> Evidence:
        """Returns the evidence on some of the clips, in the order of `rows`."""
        return Evidence(
            len(rows),
            self.points,
            None if self.assigned is None else self.assigned[rows],
            None if self.right is None else self.right[rows],
            {measure: values[rows] for measure, values in self.confidence.items()},
        )


class Policy(ABC):
    """A rule that gives each clip its point. A subclass defines `name` and `next`; the rest has defaults.

    Attributes:
        needs: The evidence that the rule reads. `assigner` and `confidence` come from the model and the clip alone.
            `truth` is only known in an evaluation. `population`: the choice for a clip depends on the other clips.
        assigner: The network whose probabilities the rule reads, and whose cost every clip pays.
        imitates: Name of the policy whose mix of points this one copies. An evaluation reports their difference.
    """

    needs: frozenset[Need] = frozenset()
    assigner: Assigner | None = None
    imitates: str | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in tables and JSON, different for each policy of an evaluation."""

    @abstractmethod
    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Chooses the point that each clip runs next, or ends the clip.

        Args:
            evidence: The known facts about the clips, with the answers at the points that they have run.
            last: Number of the point that each clip ran last, `(clips,)`; `NO_POINT` before the first.

        Returns:
            Number of the next point of each clip, `(clips,)`; `NO_POINT` ends the clip at its last point.
        """

    def visits(self, point: str) -> tuple[str, ...]:
        """Returns the points that a clip has run when it ends at `point`, in the order in which they ran."""
        return (point,)

    def check(self, model: TimeSformer) -> None:
        """Checks that the policy fits a model, before any clip is read.

        Raises:
            UserError: The policy cannot run on this model.
        """
        if self.assigner is not None and self.assigner.head.out_features != len(model.config.points):
            raise UserError(
                f"policy {self.name}: its assigner knows {plural(self.assigner.head.out_features, 'point')}, the "
                f"model has {len(model.config.points)}: {few(model.config.points)}"
            )

    def record(self) -> Mapping[str, object]:
        """Returns further fields for the policy's row in `evaluate.json`, by key."""
        return {}


class OnePointPolicy(Policy):
    """A policy that chooses one point for each clip before the model runs."""

    @abstractmethod
    def choose(self, evidence: Evidence) -> Choice:
        """Returns the number of the point of each clip, `(clips,)`."""

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Returns the chosen points, then `NO_POINT`."""
        if (last == NO_POINT).all():  # the first round: all clips run their only point in the same round
            return self.choose(evidence)
        return np.full(evidence.clips, NO_POINT)


@dataclass(frozen=True)
class Fixed(OnePointPolicy):
    """Every clip at one point."""

    point: str

    @property
    def name(self) -> str:
        """`fixed:14`."""
        return f"fixed:{self.point}"

    def choose(self, evidence: Evidence) -> Choice:
        """Returns the same point for all clips."""
        return np.full(evidence.clips, _numbers(self, (self.point,), evidence.points)[0])

    def check(self, model: TimeSformer) -> None:
        """Raises `UserError` if the model does not have the point."""
        _numbers(self, (self.point,), model.config.points)


@dataclass(frozen=True)
class Assigned(OnePointPolicy):
    """The cheapest point that suffices with a probability of at least `threshold`, by the assigner.

    A point suffices if the label is that point or a cheaper one, so the probabilities add up from the cheapest.
    A clip with NaN probabilities gets the costliest point.

    Attributes:
        assigner: The network, in eval mode.
        points: The points that the assigner was fitted for, costliest first.
        threshold: Between 0 and 1, or 2 for "always the costliest point".
        weights: `weights_digest` of the model whose labels the assigner was fitted to; None if unknown.
        inputs: What these labels depend on, by `Inputs.to_json`; None if unknown.
    """

    assigner: Assigner = field()  # `field` hides the default None of the base class
    points: tuple[str, ...]
    threshold: float = 0.5
    weights: str | None = None
    inputs: Mapping[str, Any] | None = field(default=None, compare=False)
    name = "assigned"
    needs = frozenset({"assigner"})

    @classmethod
    def load(cls, source: str | Path) -> Assigned:
        """Loads the policy of a run folder or of an assigner's checkpoint file.

        Raises:
            CheckpointError: There is no fitted assigner, or its file cannot be read.
        """
        return cls._of(find_checkpoint(Path(source), assigner_checkpoints))

    @classmethod
    def for_model(cls, run: Path, model: TimeSformer, config: AssignConfig | None = None) -> Assigned | None:
        """Loads the policy of a run for one model: checked with `check`, and on the model's device.

        Args:
            run: The run folder.
            model: The model that the policy gives points to.
            config: Settings that the assigner must have been fitted with, apart from those in `FITTING`. None: any.

        Returns:
            The policy, or None if the run has no assigner.

        Raises:
            CheckpointError: The assigner cannot be read, is of other points, or was fitted with other settings.
        """
        found = assigner_checkpoints(run).latest()
        if found is None:
            return None
        assigned = cls._of(found)
        assigned.check(model)
        if config is not None:
            # Thumbnails are cut by the run's config, and the assigner must see thumbnails as in its fit.
            require_same(run / "assigner", config, found.value("assign", dict), "assign", free=FITTING)
        assigned.assigner.to(model.head.weight.device)
        return assigned

    @classmethod
    def _of(cls, checkpoint: Checkpoint) -> Assigned:
        # `model` is the digest that `label` wrote; without it there is no check of weights.
        meta = checkpoint.meta
        return cls(*restore_assigner(checkpoint), weights=meta.get("model"), inputs=meta.get("inputs"))

    def choose(self, evidence: Evidence) -> Choice:
        """Returns the point of each clip by the assigner's probabilities."""
        self._check_points(evidence.points)
        assert evidence.assigned is not None, "`decide` checks that the evidence in `needs` is present"
        return cheapest_sufficient(evidence.assigned, self.threshold)

    def check(self, model: TimeSformer) -> None:
        """Refuses a model with other points, and warns of a model with other weights.

        Raises:
            CheckpointError: The model has other points.
        """
        self._check_points(model.config.points)
        # Only a warning: the assigner still works, but its choices were fitted to another model's mistakes.
        if self.weights is not None and self.weights != weights_digest(model):
            say(
                "policy assigned: its assigner was fitted to the labels of other weights, or of another run.precision; "
                "run `label` and `assign` again to fit the assigner to this model"
            )

    def say_other_inputs(self, now: Inputs) -> None:
        """Prints how the inputs of its labels differ from the present ones; `check` compares the weights."""
        recorded = self.inputs if isinstance(self.inputs, Mapping) else {}
        differences = replace(now, weights=None).differences(recorded)
        if differences:
            say(f"policy assigned: its assigner was fitted to labels of other inputs: {'; '.join(differences)}")

    def _check_points(self, points: tuple[str, ...]) -> None:
        if self.points != points:
            raise CheckpointError(
                f"policy assigned: its assigner was fitted for the points {few(self.points)}, the model has "
                f"{few(points)}; run `label` and `assign` again"
            )


@dataclass(frozen=True)
class Cascade(Policy):
    """Early exit: points run one after the other until the confidence of an answer is high enough (SuperViT, Fig. 2).

    A clip ends at the first point whose confidence is at least that point's threshold. The last point has no
    threshold: every clip that reaches it ends there. A NaN confidence is below every threshold, so that the clip goes
    on to the next point. A clip pays for every point that it has run.

    Attributes:
        points: The points in the order in which they run.
        thresholds: One for each point but the last.
        measure: How confidence is measured; see `label_rules.confidence`.
        text: The text that the cascade was parsed from; it becomes the name.
    """

    points: tuple[str, ...]
    thresholds: tuple[float, ...]
    measure: Measure = "probability"
    text: str = field(default="", compare=False)
    needs = frozenset({"confidence"})

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.points) - 1:
            raise UserError(
                f"cascade {self.points}: expected {len(self.points) - 1} thresholds, one for each point but the last, "
                f"got {len(self.thresholds)}"
            )

    @property
    def name(self) -> str:
        """`cascade:` and the parsed text; without a text, the points, exact thresholds and measure."""
        written = f"{','.join(self.points)}:{','.join(map(str, self.thresholds))}:{self.measure}"
        return f"cascade:{self.text or written}"

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Returns the first point, then the point after the last one for clips whose confidence is too low."""
        numbers = _numbers(self, self.points, evidence.points)
        following = np.full(evidence.clips, NO_POINT)
        following[last == NO_POINT] = numbers[0]  # the last point of the cascade is in no pair below: clips end there
        for number, after, threshold in zip(numbers, numbers[1:], self.thresholds, strict=False):
            rows = np.flatnonzero(last == number)
            # `>=` is False for NaN. `<` would be False as well, and would end the clip without a usable answer.
            sure = evidence.confidence[self.measure][rows, number] >= threshold
            following[rows] = np.where(sure, NO_POINT, after)
        return following

    def visits(self, point: str) -> tuple[str, ...]:
        """Returns all points up to `point`."""
        return self.points[: self.points.index(point) + 1]

    def check(self, model: TimeSformer) -> None:
        """Raises `UserError` if the model does not have one of the points."""
        _numbers(self, self.points, model.config.points)

    def record(self) -> Mapping[str, object]:
        """Returns the thresholds. The name does not contain fitted thresholds."""
        return {"thresholds": self.thresholds}


@dataclass(frozen=True)
class Random(OnePointPolicy):
    """Points drawn at random: exactly the given mix of points, in random order.

    Attributes:
        mix: Fraction of the clips at each point, costliest first.
        seed: Seed of the order.
        imitates: Name of the policy that the mix comes from.
    """

    mix: tuple[float, ...]
    seed: int = 0
    imitates: str | None = None
    name = "random"
    needs = frozenset({"population"})  # the mix is exact over all clips that are drawn together

    def choose(self, evidence: Evidence) -> Choice:
        """Returns the points in random order; the counts follow the mix, rounded to sum to the number of clips."""
        # Rounding the sums, not the fractions: the counts then add up to all clips.
        edges = np.rint(np.cumsum(self.mix) / np.sum(self.mix) * evidence.clips).astype(np.int64)
        counts = np.diff(edges, prepend=0)  # (points,)
        return np.random.default_rng(self.seed).permutation(np.repeat(np.arange(len(self.mix)), counts))


@dataclass(frozen=True)
class Oracle(OnePointPolicy):
    """The cheapest point at which the model is right, or the cheapest of all if the model is right at none."""

    name = "oracle"
    needs = frozenset({"truth"})

    def choose(self, evidence: Evidence) -> Choice:
        """Returns the point of each clip by the truth."""
        assert evidence.right is not None, "`decide` checks that the evidence in `needs` is present"
        return last_true(evidence.right)


def _numbers(policy: Policy, wanted: Sequence[str], points: Sequence[str]) -> list[int]:
    """Returns the numbers of a policy's points, by their order in the model."""
    missing = [point for point in wanted if point not in points]
    if missing:
        raise UserError(
            f"policy {policy.name}: the model has no point {missing[0]}; this model has the points {few(points)}"
        )
    return [points.index(point) for point in wanted]


def mix_of(choice: Choice, points: int) -> tuple[float, ...]:
    """Returns the fraction of the clips at each point, from the number of each clip's point, `(clips,)`."""
    return tuple(np.bincount(choice, minlength=points) / max(len(choice), 1))  # zeros if there are no clips


def parse_policy(
    text: str, assigned: Assigned | None, model: ModelConfig, run: Path | None = None, weights: nn.Module | None = None
) -> Policy:
    """Parses the policies that need no truth: `assigned`, `fixed:POINT` or `cascade:...` (see `parse_cascade`).

    Args:
        text: The policy as a user writes it.
        assigned: The policy that the text `assigned` means; None if there is no assigner.
        model: The model's config.
        run: As in `parse_cascade`.
        weights: As in `parse_cascade`.

    Raises:
        UserError: The text is none of these, or names a point that the model does not have.
    """
    kind, _, point = text.partition(":")
    if kind == "fixed" and canonical(point) in model.points:
        return Fixed(canonical(point))
    if kind == "cascade":
        return parse_cascade(point, model, run, weights)
    if kind == "assigned" and not point and assigned is not None:
        return assigned
    if text == "assigned":
        raise UserError(
            f"policy assigned: {run or 'the run'} has no assigner; run `videoadapt label` and `videoadapt assign` first"
        )
    raise UserError(
        f"policy {text!r}: expected assigned, cascade:POINTS:THRESHOLDS or fixed:POINT, and the model has the points "
        f"{few(model.points)}"
    )


def parse_cascade(text: str, model: ModelConfig, run: Path | None, weights: nn.Module | None = None) -> Cascade:
    """Parses a cascade, and fits its threshold where the text gives a mean cost instead.

    Args:
        text: The cascade, in the format of `parse_cascade_spec`.
        model: The model's config.
        run: The run folder whose label table a threshold is fitted on; None if there is none. The fitted threshold
            makes the mean cost the wanted fraction of the costliest point's cost.
        weights: The model. A label table of other weights is refused. None: the table is not checked.

    Raises:
        UserError: The text is wrong, or a threshold cannot be fitted.
    """
    spec = parse_cascade_spec(text, model.points)
    thresholds = spec.thresholds
    if spec.cost is not None:
        fitted = _fitted_threshold(spec, spec.cost, model, run, weights)
        thresholds = (fitted,) * (len(spec.points) - 1)  # one threshold serves every point but the last
    return Cascade(spec.points, thresholds, spec.measure, text)


def _fitted_threshold(
    spec: CascadeSpec, fraction: float, model: ModelConfig, run: Path | None, weights: nn.Module | None
) -> float:
    path = (run or Path()) / "labels" / "outcomes.parquet"
    if run is None or not path.exists():
        raise UserError(
            f"cascade: cost={fraction:g} is fitted on a label table, but {path} does not exist; run `label` first"
        )
    if weights is not None:  # confidences of another model would give another cost
        require_labels_of_model(weights, run)
    macs = point_macs(model)
    costs = np.array([macs[point] / macs[model.points[0]] for point in spec.points])  # fractions of the costliest
    return fit_threshold(confidence_matrix(read_outcomes(run), spec.points, spec.measure), costs, fraction)


def require_labels_of_model(model: nn.Module, run: Path) -> None:
    """Checks that the label table of a run was made by these weights. Does nothing if the run has no label table.

    Raises:
        UserError: The table was made by other weights.
    """
    if (run / "labels" / "label.json").exists():
        require_same_label_inputs(run, Inputs(None, weights_digest(model), {}))
