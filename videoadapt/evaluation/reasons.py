"""What a policy has read about the clips of one video, and its reason in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from videoadapt.config.cascade import Measure
from videoadapt.config.sections import Average
from videoadapt.config.views import view_order
from videoadapt.errors import plural
from videoadapt.routing.decide import decide
from videoadapt.routing.label_rules import Choice, Floats, confidences, running_answers
from videoadapt.routing.policy import Assigned, Cascade, Evidence, Fixed, Leap, Mixture, Policy, Step
from videoadapt.routing.router import assign_probabilities


@dataclass(frozen=True)
class Look:
    """What a policy has read about a clip, or about a video, at one point.

    Attributes:
        point: The point.
        views: Views whose mean the policy has read; None where it is the whole clip.
        label: The assigner's probability that this point is the clip's label; None without an assigner.
        value: The number that is compared with the threshold: the probability that this point or a cheaper one is the
            label (assigner), or the model's confidence (cascade).
        threshold: None where the policy compares nothing: at the last step of a cascade, and at the costliest point.
    """

    point: str
    views: int | None
    label: float | None
    value: float
    threshold: float | None


def looks_of(
    policy: Policy, points: tuple[str, ...], thumbnails: Tensor, logits: Floats, average: Average
) -> list[tuple[Look, ...]]:
    """Returns what a policy reads about each unit of a video, in the order in which it looks.

    Args:
        policy: The policy.
        points: The points of the model.
        thumbnails: uint8 `(clips, C, A, s, s)`; not used by a policy without an assigner.
        logits: Of all points on all views, `(clips, crops, points, classes)`.
        average: How the views are averaged.
    """
    if isinstance(policy, Assigned):
        return [_looks_at_assigner(policy, points, row) for row in assign_probabilities(policy.assigner, thumbnails)]
    if isinstance(policy, Cascade):
        return _looks_of_cascade(policy, points, logits, average)
    return [()] * (1 if policy.unit == "video" else len(logits))


def _looks_at_assigner(policy: Assigned, points: tuple[str, ...], labels: Floats) -> tuple[Look, ...]:
    suffices = np.cumsum(labels[::-1])[::-1]  # as `cheapest_sufficient` adds them up
    return tuple(
        Look(point, None, float(labels[i]), float(suffices[i]), policy.threshold if i else None)
        for i, point in reversed(list(enumerate(points)))
    )


def _looks_of_cascade(
    policy: Cascade, points: tuple[str, ...], logits: Floats, average: Average
) -> list[tuple[Look, ...]]:
    """Lets the cascade decide once more, on the logits, and writes down what it sees."""
    clips, crops = logits.shape[:2]
    order = view_order(clips, crops) if policy.unit == "video" else view_order(1, crops)
    units = logits.reshape(-1, len(order), *logits.shape[2:])[:, order]  # (units, views, points, classes)
    steps = policy.steps(points, len(order))
    looks: list[list[Look]] = [[] for _ in units]

    def run(rows: Choice, step: Step) -> dict[Measure, Floats]:
        found = confidences(running_answers(units[rows, : step.stop, step.point], average)[:, -1])
        number = steps.index(step)
        last = number == len(steps) - 1
        threshold = None if last else policy.thresholds[min(number, len(policy.thresholds) - 1)]
        views = step.stop if policy.unit == "video" else None
        for row, value in zip(rows, found[policy.measure], strict=True):
            looks[row].append(Look(points[step.point], views, None, float(value), threshold))
        return found

    decide(policy, Evidence(len(units), points, views=len(order)), run)
    return [tuple(seen) for seen in looks]


def reason(policy: Policy, point: str, looks: tuple[Look, ...]) -> str:
    """Returns why a policy ended a unit at a point, in a sentence."""
    if isinstance(policy, Assigned):
        return _reason_of_assigner(policy, point, next(look for look in looks if look.point == point))
    if isinstance(policy, Cascade):
        return "; ".join(_step_in_words(look, policy, last=look is looks[-1]) for look in looks) + "."
    if isinstance(policy, Leap):
        why = "no other point's answer was worth its cost" if point == policy.first else "its answer was worth its cost"
        return f"After {policy.first}, by how sure it was, the clip ended at {point}: {why}."
    if isinstance(policy, Mixture):
        fraction = policy.fraction if point == policy.points[1] else 1 - policy.fraction
        return f"The point is drawn from the pixels of the clip: {point}, as for {fraction:.0%} of all clips."
    return f"The policy runs every clip at {point}." if isinstance(policy, Fixed) else f"The policy chose {point}."


def _reason_of_assigner(policy: Assigned, point: str, look: Look) -> str:
    if policy.threshold > 1:
        return f"The threshold is above 1: `assign` found no saving without loss, so all clips run at {point}."
    if look.threshold is None:
        return (
            f"No cheaper point suffices with a probability of at least {policy.threshold:.3g}, so the clip runs at the "
            f"costliest point, {point}."
        )
    return (
        f"{point} is the cheapest point that suffices with a probability of at least {look.threshold:.3g}: the "
        f"assigner says {look.value:.3f}."
    )


def _step_in_words(look: Look, policy: Cascade, *, last: bool) -> str:
    where = look.point if look.views is None else f"{look.point}, {plural(look.views, 'view')}"
    if look.threshold is None:
        return f"{where}: the last step of the cascade"
    if not last:
        return f"{where}: confidence {look.value:.3f}, less than {look.threshold:.3g}"
    unit = policy.unit
    return f"{where}: confidence {look.value:.3f}, at least {look.threshold:.3g}, so the {unit} ends there"
