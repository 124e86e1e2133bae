"""Decides which steps each unit runs, one round after the other, and adds up what they cost.

`rounds` is the only place where a policy acts. `decide` feeds it stored answers, `Router` feeds it the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.config.cost import point_macs
from videoadapt.config.sections import ModelConfig
from videoadapt.config.views import clip_order
from videoadapt.errors import UserError
from videoadapt.routing.assigner import assigner_macs
from videoadapt.routing.label_rules import Bools, Choice, Floats
from videoadapt.routing.policy import NO_STEP, Evidence, Policy, Step

# Runs a step on some units (row numbers) and returns the confidences of their answers by measure, `(rows,)`
RunStep = Callable[[Choice, Step], Mapping[Measure, Floats]]


@dataclass(frozen=True)
class Decision:
    """What a policy decided on some units.

    Attributes:
        steps: The steps that a unit may run, `Policy.steps`.
        end: Number of the step where each unit ends, `(units,)`.
        ran: Which steps each unit ran, `(units, steps)`.
    """

    steps: tuple[Step, ...]
    end: Choice
    ran: Bools

    @property
    def points(self) -> Choice:
        """Number of the point where each unit ends, `(units,)`."""
        return np.array([step.point for step in self.steps])[self.end]

    @property
    def stops(self) -> Choice:
        """How many views each unit's answer is the mean of, `(units,)`."""
        return np.array([step.stop for step in self.steps])[self.end]


class Request(NamedTuple):
    """Units that must run a step in this round."""

    rows: Choice  # row numbers of the units
    step: Step


def decide(policy: Policy, evidence: Evidence, run: RunStep) -> Decision:
    """Gives each unit its steps, one round after the other, until the policy ends every unit.

    Args:
        policy: The rule.
        evidence: As in `rounds`.
        run: Runs a step on units. It is called once for each step of a round, in the order of the steps.

    Returns:
        The decision.

    Raises:
        UserError: As in `rounds`.
        ValueError: As in `rounds`.
    """
    generator = rounds(policy, evidence)
    try:
        requests = next(generator)
        while True:
            requests = generator.send([run(rows, step) for rows, step in requests])
    except StopIteration as end:
        decision: Decision = end.value
        return decision


def rounds(
    policy: Policy, evidence: Evidence
) -> Generator[list[Request], Sequence[Mapping[Measure, Floats]], Decision]:
    """Yields, round after round, the steps that units must run, until the policy ends every unit.

    A generator, so that its user may run the requests of several groups of units in the same batches.

    Args:
        policy: The rule.
        evidence: The known facts before the model runs. `confidence` is ignored: the policy sees the confidence of
            answers that the unit has paid for.

    Yields:
        The requests of a round, in the order of the steps. The caller sends the confidences of the units' answers by
        measure, `(rows,)`, for each request.

    Returns:
        The decision.

    Raises:
        UserError: The policy needs the truth, and `evidence` does not have it.
        ValueError: The policy breaks its own rules: it ends a unit before its first step, runs a step twice on a unit,
            or continues a mean over views that the unit has not run.
    """
    _require_evidence(policy, evidence)
    steps = policy.steps(evidence.points, evidence.views)
    measures = MEASURES if "confidence" in policy.needs else ()
    seen = {measure: np.full(evidence.count, np.nan) for measure in measures}  # after the last step of each unit
    ran = np.zeros((evidence.count, len(steps)), dtype=bool)
    last = np.full(evidence.count, NO_STEP)
    active = np.arange(evidence.count)  # rows of the units that have not ended
    while True:
        following = policy.next(replace(evidence, confidence=seen).take(active), last[active])  # (active units,)
        if ((following == NO_STEP) & (last[active] == NO_STEP)).any():
            raise ValueError(f"policy {policy.name}: ends a unit before its first step")
        goes_on = following != NO_STEP
        active, following = active[goes_on], following[goes_on]
        if not len(active):
            return Decision(steps, last, ran)
        if ran[active, following].any():  # without this check a wrong policy would run for ever
            raise ValueError(f"policy {policy.name}: runs a step twice on a unit")
        requests = []
        for number in np.unique(following).tolist():
            rows = active[following == number]  # all units of a step at once, so that their batches are full
            _require_continued(policy, steps, number, last[rows])
            requests.append(Request(rows, steps[number]))
        for (rows, _), found in zip(requests, (yield requests), strict=True):
            for measure, values in seen.items():
                values[rows] = found[measure]
        ran[active, following] = True
        last[active] = following


def _require_evidence(policy: Policy, evidence: Evidence) -> None:
    if "truth" in policy.needs and evidence.right is None:
        raise UserError(f"policy {policy.name}: needs the true classes, which only `videoadapt evaluate` knows")
    if "assigner" in policy.needs and evidence.assigned is None:
        raise ValueError(f"policy {policy.name}: needs the assigner's probabilities of the clips")
    if "pixels" in policy.needs and evidence.draws is None:
        raise UserError(
            f"policy {policy.name}: an older version made the scores of these clips, without draws by their pixels; "
            "remove the folder scores/ of the run, and run this again"
        )


def _require_continued(policy: Policy, steps: tuple[Step, ...], number: int, last: Choice) -> None:
    """Checks that the units of a step which continues a mean ran the step before it."""
    point, start, _ = steps[number]
    if start and any(before < 0 or steps[before][::2] != (point, start) for before in np.unique(last).tolist()):
        raise ValueError(f"policy {policy.name}: step {number} continues after view {start}, which has not run")


def views_run(policy: Policy, decision: Decision, points: int, *, clips: int, crops: int) -> npt.NDArray[np.int64]:
    """Returns how many views of each clip ran at each point. All costs of policies follow from this.

    Args:
        policy: The policy that decided.
        decision: Its decision.
        points: Number of points of the model.
        clips: Clips of a video.
        crops: Crops of a clip.

    Returns:
        `(clips of all units, points)`. For a policy about videos, the clips of the first video come first.
    """
    videos = policy.unit == "video"
    # The clip of each view of a unit, in the order in which they run.
    clip_of = clip_order(clips, crops) if videos else [0] * crops
    ran = np.zeros((len(decision.end), clips if videos else 1, points), np.int64)
    for number, (point, start, stop) in enumerate(decision.steps):
        for clip, count in zip(*np.unique(clip_of[start:stop], return_counts=True), strict=True):
            ran[:, clip, point] += count * decision.ran[:, number]
    return ran.reshape(-1, points)


def clip_macs(policy: Policy, ran: npt.NDArray[np.int64], model: ModelConfig) -> tuple[npt.NDArray[np.int64], int]:
    """Returns the MACs of each clip.

    Args:
        policy: The policy that decided.
        ran: How many views of each clip ran at each point, from `views_run`, `(clips, points)`.
        model: The model's config.

    Returns:
        The MACs of each clip, `(clips,)`: all views that ran, at all points, and the assigner once. Then the MACs of
        the assigner alone, 0 for a policy without one.
    """
    assigner = assigner_macs(policy.assigner.config, len(model.points)) if policy.assigner is not None else 0
    return ran @ np.array(list(point_macs(model).values())) + assigner, assigner


def clip_ends(policy: Policy, decision: Decision, *, clips: int, crops: int) -> Choice:
    """Returns the number of the point where each clip ends, `(clips of all units,)`; -1 for a clip that did not run.

    For a policy about videos it is the point of the clip's last view. See `views_run` for the arguments.
    """
    if policy.unit == "clip":
        return decision.points
    clip_of = clip_order(clips, crops)
    ends = np.full((len(decision.end), clips), -1)
    for number, (point, start, stop) in enumerate(decision.steps):  # a later step overwrites an earlier one
        for clip in np.unique(clip_of[start:stop]):
            ends[decision.ran[:, number], clip] = point
    return ends.reshape(-1)
