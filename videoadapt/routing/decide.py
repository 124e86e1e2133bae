"""Decides which points each clip runs, one round after the other, and computes the cost of each clip.

`decide` is the only place where a policy acts. `evaluate` feeds it stored answers, `predict` feeds it the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.config.cost import point_macs
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError
from videoadapt.routing.assigner import assigner_macs
from videoadapt.routing.label_rules import Bools, Choice, Floats
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
