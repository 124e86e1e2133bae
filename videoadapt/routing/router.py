"""Runs the model at the points that a policy chooses, in full batches, with results in the order of the clips."""

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
from videoadapt.routing.decide import decide
from videoadapt.routing.label_rules import Bools, Choice, Floats, average_views, confidences
from videoadapt.routing.policy import Evidence, Policy


@dataclass(frozen=True)
class Routed:
    """The point where each clip ends, `(clips,)`, and the logits of its views there, `(clips, crops, classes)`."""

    choice: Choice
    logits: Floats


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
    """Runs each clip at the points that the policy chooses; clips of one point share batches.

    Args:
        model: The model, in eval mode.
        views: uint8 `(clips, crops, C, T, S, S)`.
        policy: The rule.
        batch: Views of a forward pass. The results are the same as if each clip ran alone.
        thumbnails: uint8 `(clips, C, A, s, s)`, for a policy with an assigner.
        right: `(clips, points)`, for a policy that needs the truth.
        average: How the crops of a clip are averaged, for a policy that needs its confidence.

    Returns:
        The points and float32 logits of the clips, in the order of `views`.

    Raises:
        UserError: As in `decide`.
        ValueError: The policy has an assigner and there are no thumbnails, or as in `decide`.
    """
    clips, crops = views.shape[:2]
    assigned = None
    if policy.assigner is not None:
        if thumbnails is None:
            raise ValueError(f"policy {policy.name}: needs the clips' thumbnails")
        assigned = assign_probabilities(policy.assigner, thumbnails)
    logits = np.empty((clips, crops, model.config.num_classes), np.float32)

    def run(rows: Choice, number: int) -> Mapping[Measure, Floats]:
        flat = views[torch.from_numpy(rows)].flatten(0, 1)  # (rows * crops, C, T, S, S)
        view_scores = view_logits(model, flat, model.config.points[number], batch=batch)
        # A later point of a clip overwrites the logits of an earlier one, so the logits of its last point remain.
        logits[rows] = view_scores.unflatten(0, (len(rows), crops)).numpy()  # (rows, crops, classes)
        return confidences(clip_probabilities(logits[rows], average)) if "confidence" in policy.needs else {}

    choice = decide(policy, Evidence(clips, model.config.points, assigned, right), run)
    return Routed(choice, logits)


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
