"""Runs the model at the steps that a policy chooses, in full batches, with results in the order of the units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from videoadapt.config.cascade import Measure
from videoadapt.config.sections import Average
from videoadapt.data.clips.views import preprocess
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.decide import Decision, decide
from videoadapt.routing.label_rules import Bools, Choice, Floats, average_views, confidences, running_answers
from videoadapt.routing.policy import Evidence, Policy, Step, Unit


@dataclass(frozen=True)
class Routed:
    """The decision, and the logits of each unit's views at its last point, `(units, views, classes)`.

    Of a unit, the first `decision.stops` views are its answer. The others did not run at this point; what stands in
    their place means nothing.
    """

    decision: Decision
    logits: Floats

    @property
    def choice(self) -> Choice:
        """Number of the point where each unit ends, `(units,)`."""
        return self.decision.points


def route(  # noqa: PLR0913 - settings, by name
    model: TimeSformer,
    views: Tensor,
    policy: Policy,
    *,
    batch: int,
    thumbnails: Tensor | None = None,
    right: Bools | None = None,
    average: Average = "probabilities",
) -> Routed:
    """Runs each unit at the steps that the policy chooses; units of one step share batches.

    Args:
        model: The model, in eval mode.
        views: uint8 `(units, views, C, T, S, S)`: the crops of clips, or all views of videos, by `policy.unit`. Those
            of videos lie in the order in which they run (`config.views.view_order`).
        policy: The rule.
        batch: Views of a forward pass. The results are the same as if each unit ran alone.
        thumbnails: uint8 `(clips, C, A, s, s)`, for a policy with an assigner.
        right: `(clips, points)`, for a policy that needs the truth.
        average: How the views of a unit are averaged, for a policy that needs its confidence.

    Returns:
        The decision and float32 logits, in the order of `views`.

    Raises:
        UserError: As in `decide`.
        ValueError: The policy has an assigner and there are no thumbnails, or as in `decide`.
    """
    units, count = views.shape[:2]
    assigned = None
    if policy.assigner is not None:
        if thumbnails is None:
            raise ValueError(f"policy {policy.name}: needs the clips' thumbnails")
        assigned = assign_probabilities(policy.assigner, thumbnails)
    logits = np.empty((units, count, model.config.num_classes), np.float32)

    def run(rows: Choice, step: Step) -> Mapping[Measure, Floats]:
        flat = views[torch.from_numpy(rows), step.start : step.stop].flatten(0, 1)  # (rows * views, C, T, S, S)
        view_scores = view_logits(model, flat, model.config.points[step.point], batch=batch)
        # A later point of a unit overwrites the logits of an earlier one, so the logits of its last point remain.
        logits[rows, step.start : step.stop] = view_scores.unflatten(0, (len(rows), -1)).numpy()
        if "confidence" not in policy.needs:
            return {}
        return confidences(unit_probabilities(logits[rows, : step.stop], policy.unit, average))

    evidence = Evidence(units, model.config.points, assigned, right, views=count)
    return Routed(decide(policy, evidence, run), logits)


def unit_probabilities(logits: Floats, unit: Unit, average: Average) -> Floats:
    """Returns the probabilities of units from the views that have run: `(units, views, classes)` to `(units, classes)`.

    In float64. Stored and fresh logits pass through the same functions, so that equal logits give equal confidences.
    """
    return clip_probabilities(logits, average) if unit == "clip" else running_answers(logits, average)[:, -1]


def clip_probabilities(logits: Floats, average: Average) -> Floats:
    """Returns the probabilities of clips: `(clips, crops, ..., classes)` to `(clips, ..., classes)`.

    In float64. Stored and fresh logits both pass through here, so that equal logits give equal confidences.
    """
    return average_views(logits, 1, average)


@torch.inference_mode()
def view_logits(model: TimeSformer, views: Tensor, point: str, *, batch: int) -> Tensor:
    """Runs views at one point.

    Args:
        model: The model, in eval mode, of any precision and on any device.
        views: uint8 `(V, C, T, S, S)`.
        point: The point.
        batch: Views of a forward pass.

    Returns:
        Float32 logits on the CPU, `(V, classes)`.
    """
    outputs = [model(preprocess(model, micro_batch), point).float() for micro_batch in views.split(batch)]
    return torch.cat(outputs).cpu()


def assign_probabilities(assigner: Assigner, thumbnails: Tensor) -> Floats:
    """Returns the assigner's label probabilities, float64 `(clips, points)`.

    Args:
        assigner: The assigner, in eval mode and on any device.
        thumbnails: uint8 `(clips, C, A, s, s)`, A frames of each clip.
    """
    return assigner.probabilities(thumbnails.to(assigner.head.weight.device)).cpu().double().numpy()
