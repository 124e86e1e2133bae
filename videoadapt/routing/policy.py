"""Policies: rules that give each clip its operating point, or each video its points and views.

A policy is one class in this module. It decides step by step: a step runs some views of a unit at one point, and a unit
is a clip or a video. `Policy.next` is a pure function of a few facts about each unit. It may be called on any units
together: `routing.decide.decide` calls it on all of them in rounds, a queue may call it on those that have just run.
Points are numbered as in `model.points`: 0 is the costliest, the last is the cheapest.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from videoadapt.config.cascade import MEASURES, CascadeSpec, Measure, parse_cascade_spec, parse_leap_spec
from videoadapt.config.cost import point_macs
from videoadapt.config.points import canonical
from videoadapt.config.sections import AssignConfig, ModelConfig
from videoadapt.errors import CheckpointError, UserError, few, plural
from videoadapt.model.checkpoint import Checkpoint, find_checkpoint, require_same, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner, assigner_checkpoints, restore_assigner
from videoadapt.routing.label_inputs import (
    label_summary_path,
    outcomes_path,
    read_label_summary,
    read_outcomes,
    require_same_label_inputs,
)
from videoadapt.routing.label_rules import (
    Bools,
    Choice,
    Floats,
    cheapest_sufficient,
    confidence_matrix,
    fit_threshold,
    last_true,
    right_matrix,
)
from videoadapt.routing.leap_rules import FEATURES, Logistic, answer_features, price_for, worth_most
from videoadapt.routing.policy_file import SUFFIX, PolicyFile, is_policy_file
from videoadapt.runtime.console import say
from videoadapt.runtime.inputs import Inputs

_DECIMAL = re.compile(r"\d{0,2}\.?\d{1,20}(e-?\d{1,2})?")
NO_STEP = -1  # stands for: the unit has run no step yet, or it ends here
Unit = Literal["clip", "video"]
Need = Literal["assigner", "confidence", "pixels", "truth", "population"]
# Fields of `assign` that only fitting uses. A loaded assigner may have been fitted with other values.
FITTING = ("epochs", "batch", "lr", "weight_decay", "loss", "mu", "select", "tolerance")


class Step(NamedTuple):
    """One run of the model: the views `start` to `stop` of a unit at one point.

    The answer of a unit after a step is the mean over its views 0 to `stop` at this point. A step with `start` above 0
    continues the step that ran the views before at the same point; a step with `start` 0 begins a new mean.

    Attributes:
        point: Number of the point.
        start: The first view, in the order in which views run (`config.views.view_order`).
        stop: The view after the last one.
    """

    point: int
    start: int
    stop: int


@dataclass(frozen=True)
class Evidence:
    """The facts about some units that a policy may read; None if a fact is not known.

    Attributes:
        count: Number of units: clips, or videos, by `Policy.unit`.
        points: The points of the model, costliest first.
        assigned: The assigner's probability that a point is the clip's label, `(units, points)`.
        right: Whether the model is right on the clip at a point, `(units, points)`.
        confidence: The model's confidence in the unit's answer after its last step, by measure, `(units,)`. NaN before
            the first step, and where an answer is NaN.
        views: Views of a unit: the crops of a clip, or all views of a video.
        draws: A number in [0, 1) for each clip, by its pixels, `(units,)`; see `pixel_draws`.
    """

    count: int
    points: tuple[str, ...]
    assigned: Floats | None = None
    right: Bools | None = None
    confidence: Mapping[Measure, Floats] = field(default_factory=dict)
    views: int = 1
    draws: Floats | None = None

    def take(self, rows: Choice) -> Evidence:
        """Returns the evidence on some of the units, in the order of `rows`."""
        return replace(
            self,
            count=len(rows),
            assigned=None if self.assigned is None else self.assigned[rows],
            right=None if self.right is None else self.right[rows],
            confidence={measure: values[rows] for measure, values in self.confidence.items()},
            draws=None if self.draws is None else self.draws[rows],
        )


class Policy(ABC):
    """A rule that gives each unit its steps. A subclass defines `name` and `next`; the rest has defaults.

    With the defaults, a unit is a clip, and the steps are the points: step i runs all crops of the clip at point i.

    Attributes:
        unit: What the rule decides about: a `clip` with all its crops, or a `video` with all its views. A rule about
            videos has no assigner.
        needs: The evidence that the rule reads. `assigner`, `confidence` and `pixels` come from the model and the clip.
            `truth` is only known in an evaluation. `population`: the choice for a clip depends on the other clips.
        assigner: The network whose probabilities the rule reads, and whose cost every clip pays.
        imitates: Name of the policy whose mix of points this one copies. An evaluation reports their difference.
    """

    unit: Unit = "clip"
    needs: frozenset[Need] = frozenset()
    assigner: Assigner | None = None
    imitates: str | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in tables and JSON, different for each policy of an evaluation."""

    @abstractmethod
    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Chooses the step that each unit runs next, or ends the unit. Units do not influence each other.

        Args:
            evidence: The known facts about the units.
            last: Number of the step that each unit ran last, `(units,)`; `NO_STEP` before the first.

        Returns:
            Number of the next step of each unit, `(units,)`; `NO_STEP` ends the unit with the answer of its last step.
        """

    def steps(self, points: tuple[str, ...], views: int) -> tuple[Step, ...]:
        """Returns all steps that a unit may run; `next` returns their numbers.

        Args:
            points: The points of the model.
            views: Views of a unit.
        """
        return tuple(Step(number, 0, views) for number in range(len(points)))

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

    def written(self) -> str:
        """Returns the policy as text with all its numbers: a threshold that was fitted stands in place of `cost=`."""
        return self.name

    def shifted(self, by: float) -> Policy:
        """Returns the policy with thresholds, or a price, that differ by a small number."""
        return self

    def largest_cost(self, costs: Sequence[int], points: tuple[str, ...]) -> int:
        """Returns the cost of a unit that runs all that the policy allows.

        Args:
            costs: The cost of each of its steps.
            points: The points of the model.
        """
        return sum(costs)


class OnePointPolicy(Policy):
    """A policy that chooses one point for each clip before the model runs."""

    @abstractmethod
    def choose(self, evidence: Evidence) -> Choice:
        """Returns the number of the point of each clip, `(clips,)`."""

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Returns the chosen points, then `NO_STEP`."""
        if (last == NO_STEP).all():  # in rounds: all clips run their only point in the first round
            return self.choose(evidence)
        return np.where(last == NO_STEP, self.choose(evidence), NO_STEP)  # a queue may mix new clips and others

    def largest_cost(self, costs: Sequence[int], points: tuple[str, ...]) -> int:
        """Returns the cost of the costliest point."""
        return max(costs)


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
        return np.full(evidence.count, _numbers(self, (self.point,), evidence.points)[0])

    def check(self, model: TimeSformer) -> None:
        """Raises `UserError` if the model does not have the point."""
        _numbers(self, (self.point,), model.config.points)

    def largest_cost(self, costs: Sequence[int], points: tuple[str, ...]) -> int:
        """Returns the cost of the point."""
        return costs[points.index(self.point)]


@dataclass(frozen=True)
class Mixture(OnePointPolicy):
    """Two points: a fraction of all clips at the second one, the rest at the first one.

    Which clips these are depends on their pixels alone, as if drawn at random. A clip therefore gets the same point in
    every batch and every run.

    Attributes:
        points: The two points.
        fraction: The fraction of the clips at the second point.
    """

    points: tuple[str, str]
    fraction: float
    needs = frozenset({"pixels"})

    @property
    def name(self) -> str:
        """`mixture:14,7:0.3`."""
        return f"mixture:{','.join(self.points)}:{self.fraction:g}"

    def choose(self, evidence: Evidence) -> Choice:
        """Returns the second point for clips whose draw is below the fraction."""
        assert evidence.draws is not None, "`decide` checks that the evidence in `needs` is present"
        first, second = _numbers(self, self.points, evidence.points)
        return np.where(evidence.draws < self.fraction, second, first)

    def check(self, model: TimeSformer) -> None:
        """Raises `UserError` if the model does not have one of the points."""
        _numbers(self, self.points, model.config.points)

    def written(self) -> str:
        """Returns the name with all digits of the fraction."""
        return f"mixture:{','.join(self.points)}:{_decimal(self.fraction)}"


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
        text: The name.
    """

    assigner: Assigner = field()  # `field` hides the default None of the base class
    points: tuple[str, ...]
    threshold: float = 0.5
    weights: str | None = None
    inputs: Mapping[str, Any] | None = field(default=None, compare=False)
    text: str = "assigned"
    needs = frozenset({"assigner"})

    @property
    def name(self) -> str:
        """`assigned`, or `assigned:0.7` with a threshold other than the fitted one."""
        return self.text

    def at(self, threshold: float) -> Assigned:
        """Returns the same policy with another threshold, which becomes part of the name."""
        return replace(self, threshold=threshold, text=f"assigned:{threshold:g}")

    def written(self) -> str:
        """Returns the name with all digits of a threshold other than the fitted one."""
        return self.name if self.name == "assigned" else f"assigned:{_decimal(self.threshold)}"

    def shifted(self, by: float) -> Assigned:
        """Returns the same policy with another threshold."""
        return self.at(self.threshold + by)

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
            found = few(differences, separator="; ")
            say(f"policy assigned: its assigner was fitted to labels of other inputs: {found}")

    def _check_points(self, points: tuple[str, ...]) -> None:
        if self.points != points:
            raise CheckpointError(
                f"policy assigned: its assigner was fitted for the points {few(self.points)}, the model has "
                f"{few(points)}; run `label` and `assign` again"
            )


@dataclass(frozen=True)
class Cascade(Policy):
    """Early exit: steps run one after the other until the confidence of an answer is high enough (SuperViT, Fig. 2).

    A cascade over points decides about clips: a step runs all crops of a clip at the next point. A cascade over views
    decides about videos. It runs the centre view at each point in turn, and then, at the last point, the further views
    one by one; see `config.views.view_order`. The answer is then the mean over the views that ran at the last point.

    A unit ends at the first step whose confidence is at least the threshold. The last step has no threshold: every unit
    that reaches it ends there. A NaN confidence is below every threshold, so the unit goes on to the next step. A unit
    pays for every step that it has run.

    Attributes:
        points: The points in the order in which they run.
        thresholds: One for each point but the last; with `views`, one for each point. The threshold of the last point
            is then that of each view there.
        measure: How confidence is measured; see `label_rules.confidence`.
        text: The text that the cascade was parsed from; it becomes the name.
        views: Whether the cascade goes over views, too.
    """

    points: tuple[str, ...]
    thresholds: tuple[float, ...]
    measure: Measure = "probability"
    text: str = field(default="", compare=False)
    views: bool = False
    needs = frozenset({"confidence"})

    def __post_init__(self) -> None:
        wanted = len(self.points) - (not self.views)
        if len(self.thresholds) != wanted:
            but = "" if self.views else " but the last"
            raise UserError(
                f"cascade {self.points}: expected {plural(wanted, 'threshold')}, one for each point{but}, got "
                f"{len(self.thresholds)}"
            )

    @property
    def name(self) -> str:
        """`cascade:` and the parsed text; without a text, the points, exact thresholds and measure."""
        over = "views:" if self.views else ""
        written = f"{','.join(self.points)}:{over}{','.join(map(str, self.thresholds))}:{self.measure}"
        return f"cascade:{self.text or written}"

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        """`video` for a cascade over views, otherwise `clip`."""
        return "video" if self.views else "clip"

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Returns the step after the last one for units whose confidence is too low."""
        final = len(self.steps(evidence.points, evidence.views)) - 1
        limits = np.array([*self.thresholds, np.inf])  # the last entry: before the first step no unit is sure
        # `>=` is False for NaN. `<` would be False as well, and would end the unit without a usable answer.
        sure = evidence.confidence[self.measure] >= limits[np.minimum(last, len(self.thresholds) - 1)]
        return np.where((last == final) | sure, NO_STEP, last + 1)  # `NO_STEP` + 1 is the first step

    def steps(self, points: tuple[str, ...], views: int) -> tuple[Step, ...]:
        """Returns the steps in the order in which they run."""
        numbers = _numbers(self, self.points, points)
        first = [Step(number, 0, 1 if self.views else views) for number in numbers]
        return (*first, *(Step(numbers[-1], view, view + 1) for view in range(1, views) if self.views))

    def check(self, model: TimeSformer) -> None:
        """Raises `UserError` if the model does not have one of the points."""
        _numbers(self, self.points, model.config.points)

    def record(self) -> Mapping[str, object]:
        """Returns the thresholds. The name does not contain fitted thresholds."""
        return {"thresholds": self.thresholds}

    def written(self) -> str:
        """Returns the points, all digits of the thresholds, and the measure."""
        over = "views:" if self.views else ""
        return f"cascade:{','.join(self.points)}:{over}{','.join(map(_decimal, self.thresholds))}:{self.measure}"

    def shifted(self, by: float) -> Cascade:
        """Returns the same cascade with other thresholds."""
        return replace(self, thresholds=tuple(threshold + by for threshold in self.thresholds))


@dataclass(frozen=True)
class Leap(Policy):
    """One point for every clip, and then at most one other: that whose answer is worth its cost.

    How sure the first point is tells, by regressions on labelled clips, how probable it is that each point is right. A
    clip ends at the first point, or leaps to the point with the largest probability minus `price` times its cost. A
    cascade passes every point between, and knows only whether the present one is sure (cascade routing, arXiv
    2410.10347, with one step). A clip with a NaN answer leaps to the costliest point.

    Attributes:
        first: The point that every clip runs.
        points: The points that the regressions were fitted for, costliest first.
        costs: MACs of the points, as fractions of the costliest one's.
        chances: The regressions, on `answer_features`.
        price: Of the costliest point's MACs, in probability of a right answer.
        text: What follows `leap:` in the name.
    """

    first: str
    points: tuple[str, ...]
    costs: tuple[float, ...]
    chances: Logistic
    price: float
    text: str = field(default="", compare=False)
    needs = frozenset({"confidence"})

    @classmethod
    def fit(cls, first: str, model: ModelConfig, confidence: Mapping[Measure, Floats], right: Bools) -> Leap:
        """Fits the regressions. The leap has the price 0; see `at`.

        Args:
            first: The point that every clip runs.
            model: The model's config.
            confidence: The confidence of the first point on labelled clips, by measure, `(clips,)`.
            right: Whether each point is right on these, `(clips, points)`.

        Raises:
            UserError: There is no clip whose answer is a number.
        """
        macs = point_macs(model)
        costs = tuple(macs[point] / macs[model.points[0]] for point in model.points)
        return cls(first, model.points, costs, Logistic.fit(answer_features(confidence), right), 0.0)

    @classmethod
    def from_json(cls, name: str, numbers: Any) -> Leap:
        """Returns the leap of a file: that whose `to_json` gave the numbers, to the bit.

        Args:
            name: Its name, such as `leap:7:cost=0.5`.
            numbers: Any content of a file.

        Raises:
            ValueError: The numbers are no leap's.
        """
        try:
            points, costs = tuple(map(str, numbers["points"])), tuple(map(float, numbers["costs"]))
            chances, price = Logistic.from_json(numbers), float(numbers["price"])
            leap = cls(str(numbers["first"]), points, costs, chances, price, name.partition(":")[2])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"the numbers of {name} are no leap's: {error}") from None
        if not len(points) == len(costs) == len(chances.weights) or leap.first not in points:
            raise ValueError(f"the numbers of {name} are no leap's: expected a cost and a regression for each point")
        if len(chances.mean) != FEATURES:
            raise ValueError(f"the numbers of {name} are no leap's: expected {FEATURES} features")
        return leap

    def to_json(self) -> dict[str, Any]:
        """Returns all its numbers, for a file."""
        own: dict[str, Any] = {"first": self.first, "points": self.points, "costs": self.costs, "price": self.price}
        return own | asdict(self.chances)

    @property
    def name(self) -> str:
        """`leap:` and the parsed text; without a text, the first point and the price."""
        return f"leap:{self.text or f'{self.first}:price={self.price:g}'}"

    def at(self, price: float, text: str = "") -> Leap:
        """Returns the same leap with another price, and what follows `leap:` in its name."""
        return replace(self, price=price, text=text)

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Returns the first point, then the point that is worth most, if it is another one."""
        (first,) = _numbers(self, (self.first,), evidence.points)
        if (last == NO_STEP).all():  # in rounds: there is no answer yet
            return np.full(evidence.count, first)
        chances = self.chances(answer_features(evidence.confidence))
        best = worth_most(chances, np.array(self.costs), first, self.price)
        after = np.where((last == first) & (best != first), best, NO_STEP)
        return np.where(last == NO_STEP, first, after)

    def check(self, model: TimeSformer) -> None:
        """Raises `UserError` if the model has other points."""
        if self.points != model.config.points:
            raise UserError(
                f"policy {self.name}: was fitted for the points {few(self.points)}, the model has "
                f"{few(model.config.points)}"
            )

    def record(self) -> Mapping[str, object]:
        """Returns the price. A name with `cost=` does not contain it."""
        return {"price": self.price}

    def written(self) -> str:
        """Returns the first point and the price. The regressions stand beside the text, see `to_json`."""
        return f"leap:{self.first}:price={self.price!r}"

    def shifted(self, by: float) -> Leap:
        """Returns the same leap with another price."""
        return self.at(self.price + by)

    def largest_cost(self, costs: Sequence[int], points: tuple[str, ...]) -> int:
        """Returns the cost of the first point and of the costliest other one."""
        first = points.index(self.first)
        return costs[first] + max((*costs[:first], *costs[first + 1 :]))


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
        edges = np.rint(np.cumsum(self.mix) / np.sum(self.mix) * evidence.count).astype(np.int64)
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


def _decimal(value: float) -> str:
    return np.format_float_positional(value, trim="-")  # all digits: the text of a policy has no exponents


def _numbers(policy: Policy, wanted: Sequence[str], points: Sequence[str]) -> list[int]:
    """Returns the numbers of a policy's points, by their order in the model."""
    missing = [point for point in wanted if point not in points]
    if missing:
        raise UserError(
            f"policy {policy.name}: the model has no point {missing[0]}; this model has the points {few(points)}"
        )
    return [points.index(point) for point in wanted]


def mix_of(choice: Choice, points: int) -> tuple[float, ...]:
    """Returns the fraction of the clips at each point.

    Args:
        choice: Number of each clip's point, `(clips,)`; -1 for a clip that did not run, which is at no point.
        points: Number of points.
    """
    return tuple(np.bincount(choice[choice >= 0], minlength=points) / max(len(choice), 1))  # zeros without clips


def parse_policy(
    text: str, assigned: Assigned | None, model: ModelConfig, run: Path | None = None, weights: nn.Module | None = None
) -> Policy:
    """Parses the policies that need no truth.

    These are `assigned` or `assigned:THRESHOLD`, `fixed:POINT`, `mixture:POINT,POINT:FRACTION`, `cascade:...` (see
    `parse_cascade`), `leap:...` (see `parse_leap`), or the file that `calibrate` wrote.

    Args:
        text: The policy as a user writes it, or the path of a file.
        assigned: The policy that the text `assigned` means; None if there is no assigner.
        model: The model's config.
        run: As in `parse_cascade`.
        weights: As in `parse_cascade`. The file of a policy is compared with them too.

    Raises:
        UserError: The text is none of these, or names a point that the model does not have.
        CheckpointError: The file is of other weights.
    """
    if is_policy_file(text):
        path = Path(text)
        file = PolicyFile.read(path)
        text = file.text_for(path, weights, assigned.assigner if assigned else None)
        if text.startswith("leap:"):
            return _leap_of_file(path, file, model)
    kind, _, point = text.partition(":")
    if kind == "fixed" and canonical(point) in model.points:
        return Fixed(canonical(point))
    if kind == "cascade":
        return parse_cascade(point, model, run, weights)
    if kind == "leap":
        return parse_leap(point, model, run, weights)
    if kind == "mixture" and (mixture := _parse_mixture(point, model.points)):
        return mixture
    if kind == "assigned" and (not point or _is_fraction(point)):
        if assigned is not None:
            return assigned.at(float(point)) if point else assigned
        raise UserError(
            f"policy assigned: {run or 'the run'} has no assigner; run `videoadapt label` and `videoadapt assign` first"
        )
    raise UserError(
        f"policy {text!r}: expected assigned, cascade:POINTS:[views:]THRESHOLDS, leap:POINT:cost=0.4, fixed:POINT, "
        f"mixture:POINT,POINT:FRACTION or a file of `calibrate` ({SUFFIX}), and the model has the points "
        f"{few(model.points)}"
    )


def needs_assigner(text: str) -> bool:
    """Returns whether the policy of a text, or of a file, reads an assigner."""
    written = PolicyFile.read(Path(text)).policy if is_policy_file(text) else text
    return written.partition(":")[0] == "assigned"


def _parse_mixture(text: str, known: Sequence[str]) -> Mixture | None:
    """Returns the mixture of `POINT,POINT:FRACTION`; None if the text has another form."""
    listed, _, fraction = text.partition(":")
    points = [canonical(point) for point in listed.split(",")]
    if len(points) != 2 or not set(points) <= set(known) or not _is_fraction(fraction):  # noqa: PLR2004
        return None
    return Mixture((points[0], points[1]), float(fraction))


def _is_fraction(text: str) -> bool:
    return bool(_DECIMAL.fullmatch(text)) and 0 <= float(text) <= 1


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
    return Cascade(spec.points, thresholds, spec.measure, text, spec.views)


def _fitted_threshold(
    spec: CascadeSpec, fraction: float, model: ModelConfig, run: Path | None, weights: nn.Module | None
) -> float:
    table = _label_table(f"cascade: cost={fraction:g}", run, weights)
    macs = point_macs(model)
    costs = np.array([macs[point] / macs[model.points[0]] for point in spec.points])  # fractions of the costliest
    return fit_threshold(confidence_matrix(table, spec.points, spec.measure), costs, fraction)


def parse_leap(text: str, model: ModelConfig, run: Path | None, weights: nn.Module | None = None) -> Leap:
    """Parses a leap, and fits it to the label table of a run.

    Args:
        text: `POINT:cost=C`, where C is the mean cost of a clip as a fraction of the costliest point's, or
            `POINT:price=P`; see `Leap`.
        model: The model's config.
        run: The run folder; None if there is none.
        weights: The model. A label table of other weights is refused. None: the table is not checked.

    Raises:
        UserError: The text is wrong, or there is no label table.
    """
    spec = parse_leap_spec(text, model.points)
    table = _label_table(f"leap:{text}", run, weights)
    _, right = right_matrix(table, model.points, source=read_label_summary(run or Path())["source"])
    confidence = {measure: confidence_matrix(table, (spec.first,), measure)[:, 0] for measure in MEASURES}
    leap, price = Leap.fit(spec.first, model, confidence, right), spec.price
    if spec.cost is not None:
        chances, first = leap.chances(answer_features(confidence)), model.points.index(spec.first)
        price = price_for(chances, np.array(leap.costs), first, spec.cost)
    assert price is not None, "a spec has a cost or a price"
    return leap.at(price, text)


def _leap_of_file(path: Path, file: PolicyFile, model: ModelConfig) -> Leap:
    try:
        leap = Leap.from_json(file.policy, file.leap)
    except ValueError as error:
        raise UserError(f"{path}: {error}; make it with `videoadapt calibrate`") from None
    if leap.points != tuple(model.points):
        raise UserError(f"{path}: is of points {', '.join(leap.points)}, the model has {', '.join(model.points)}")
    return leap


def _label_table(what: str, run: Path | None, weights: nn.Module | None) -> pd.DataFrame:
    path = outcomes_path(run or Path())
    if run is None or not path.exists():
        raise UserError(f"{what} is fitted on a label table, but {path} does not exist; run `label` first")
    if weights is not None:  # confidences of another model would give another cost
        require_labels_of_model(weights, run)
    return read_outcomes(run)


def require_labels_of_model(model: nn.Module, run: Path) -> None:
    """Checks that the label table of a run was made by these weights. Does nothing if the run has no label table.

    Raises:
        UserError: The table was made by other weights.
    """
    if label_summary_path(run).exists():
        require_same_label_inputs(run, Inputs(None, weights_digest(model), {}))
