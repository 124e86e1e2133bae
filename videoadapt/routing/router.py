"""Runs policies: decides which points each clip runs, in full batches, and computes the cost of each clip.

`decide` is the only place where a policy acts. `evaluate` feeds it stored answers, `predict` feeds it the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.config.cost import point_macs
from videoadapt.config.sections import Average, ModelConfig
from videoadapt.data.clips.views import preprocess
from videoadapt.errors import UserError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner, assigner_macs
from videoadapt.routing.label_rules import Bools, Choice, Floats, average_views, confidences
from videoadapt.routing.policy import NO_POINT, Evidence, Policy

# Runs some clips (row numbers) at one point (its number) and returns their confidences by measure, `(rows,)`
RunPoint = Callable[[Choice, int], Mapping[Measure, Floats]]


def decide(policy: Policy, evidence: Evidence, run: RunPoint) -> Choice:
    """Gives each clip its points, one round after the other, until the policy ends every clip.

    Args:
        policy: The rule.
        evidence: The known facts before the model runs. `confidence` is ignored: the policy sees the confidence
            of a clip only at the points that the clip has run.
        run: Runs clips at a point. It is called once for each point of a round, costliest first.

    Returns:
        Number of the point where each clip ends, `(clips,)`.

    Raises:
        UserError: The policy needs the truth, and `evidence` does not have it.
        ValueError: The policy breaks its own rules: it ends a clip before its first point, runs a point twice on a
            clip, or runs other points than `visits` returns.
    """
    _require_evidence(policy, evidence)
    shape = (evidence.clips, len(evidence.points))
    # NaN where a clip has not run a point: a policy cannot read answers that it has not paid for.
    seen = {measure: np.full(shape, np.nan) for measure in MEASURES} if "confidence" in policy.needs else {}
    ran = np.zeros(shape, dtype=bool)
    last = np.full(evidence.clips, NO_POINT)
    active = np.arange(evidence.clips)  # rows of the clips that have not ended
    while len(active):
        following = policy.next(replace(evidence, confidence=seen).take(active), last[active])  # (active clips,)
        if ((following == NO_POINT) & (last[active] == NO_POINT)).any():
            raise ValueError(f"policy {policy.name}: ends a clip before its first point")
        goes_on = following != NO_POINT
        active, following = active[goes_on], following[goes_on]
        if ran[active, following].any():  # without this check a wrong policy would run for ever
            raise ValueError(f"policy {policy.name}: runs a point twice on a clip")
        for number in np.unique(following).tolist():
            rows = active[following == number]  # all clips of a point at once, so that their batches are full
            confidences_here = run(rows, number)
            for measure, values in seen.items():
                values[rows, number] = confidences_here[measure]
        ran[active, following] = True
        last[active] = following
    _require_visits(policy, evidence.points, last, ran)
    return last


def _require_evidence(policy: Policy, evidence: Evidence) -> None:
    if "truth" in policy.needs and evidence.right is None:
        raise UserError(f"policy {policy.name}: needs the true classes, which only `videoadapt evaluate` knows")
    if "assigner" in policy.needs and evidence.assigned is None:
        raise ValueError(f"policy {policy.name}: needs the assigner's probabilities of the clips")


def _require_visits(policy: Policy, points: tuple[str, ...], ended: Choice, ran: Bools) -> None:
    """Checks that `visits` names exactly the points that ran, since costs are sums over `visits`."""
    for number in np.unique(ended).tolist():
        visited = np.isin(points, policy.visits(points[number]))  # (points,)
        if (ran[ended == number] != visited).any():
            raise ValueError(f"policy {policy.name}: `visits` does not name the points that its clips ran")


def clip_macs(policy: Policy, ended: Choice, model: ModelConfig, *, crops: int) -> tuple[npt.NDArray[np.int64], int]:
    """Returns the MACs of each clip, given the point where it ends. All costs of policies come from here.

    Args:
        policy: The policy that decided.
        ended: Number of the point where each clip ends, `(clips,)`.
        model: The model's config.
        crops: Crops of a clip; the model runs on each, the assigner once on the clip.

    Returns:
        The MACs of each clip, `(clips,)`: all crops at all points that it has run, and the assigner. Then the MACs of
        the assigner alone, 0 for a policy without one.
    """
    macs, points = point_macs(model), model.points
    ends, inverse = np.unique(ended, return_inverse=True)  # (different ends,), (clips,)
    # The cost depends on the end only, so it is computed once for each end and not once for each clip.
    macs_by_end = [crops * sum(macs[point] for point in policy.visits(points[end])) for end in ends.tolist()]
    assigner = assigner_macs(policy.assigner.config, len(points)) if policy.assigner is not None else 0
    return np.array(macs_by_end, dtype=np.int64)[inverse] + assigner, assigner


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
