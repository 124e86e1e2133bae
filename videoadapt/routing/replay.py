"""Replays policies on stored scores, without the model: their decisions, and for many policies right or wrong and cost.

`replay` runs thousands of policies in seconds. It decides with `decide` and adds up costs with `clip_macs`, as
`evaluate` and `predict` do, so a replayed policy gives the results that it gives there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from videoadapt.config.cascade import Measure
from videoadapt.config.load import Config
from videoadapt.config.sections import Average
from videoadapt.config.views import clip_order
from videoadapt.routing.decide import Decision, clip_macs, decide, views_run
from videoadapt.routing.label_rules import Bools, Choice, Floats, predictions, probabilities_of_mean, values_to_average
from videoadapt.routing.policy import Evidence, Policy, Step
from videoadapt.routing.scores import Scored, Scores, ViewScores, view_scores


@dataclass(frozen=True)
class Replay:
    """The results of policies on scored videos.

    Attributes:
        rows: Manifest row of each video, `(videos,)`, ascending.
        right: Whether the answer of each policy to each video is right, `(policies, videos)`. The answer is the best
            class of the mean over the views that ran; a NaN answer is wrong.
        macs: MACs of each policy for each video, `(policies, videos)`: every view that ran, and the assigner.
    """

    rows: Choice
    right: Bools
    macs: npt.NDArray[np.int64]


def replay(policies: Sequence[Policy], scores: Scores, config: Config) -> Replay:
    """Applies policies, cascades over views among them, to scored videos without running the model.

    The logits are read once for all policies, one shard in memory at a time. Policies of one family mostly end a video
    in the same few ways, and each different way is computed once: 2,000 thresholds cost little more than 20.

    Args:
        policies: The policies. `Fixed(point)` among them gives the reference of that point.
        scores: Result of `score`.
        config: The run's config: points, crops and `evaluate.average`.

    Raises:
        UserError, ValueError: As in `decide`.

    Example:
        >>> found = replay([Fixed("14"), *(Cascade(("7", "14"), (t,)) for t in thresholds)], scores, config)
        >>> loss = found.right[0] & ~found.right[1:]  # costliest point right, policy wrong: (thresholds, videos)
    """
    rows, clips, stored = np.unique(scores.rows), scores.clips_per_video, StoredAnswers(scores, config)
    shape = len(policies), len(rows)
    right, macs = np.zeros(shape, dtype=bool), np.empty(shape, np.int64)
    ends: dict[int, npt.NDArray[np.int8]] = {}  # of policies about clips: number of the point where each clip ends
    for number, policy in enumerate(policies):
        decision = stored.decide(policy)
        ran = views_run(policy, decision, len(config.model.points), clips=clips, crops=config.evaluate.spatial_crops)
        macs[number] = clip_macs(policy, ran, config.model)[0].reshape(-1, clips).sum(1)
        if policy.unit == "clip":
            ends[number] = decision.points.astype(np.int8).reshape(-1, clips)
        else:
            right[number] = stored.views.right[np.arange(len(rows)), decision.stops - 1, decision.points]
    if ends:
        right[list(ends)] = _right(np.stack(list(ends.values())), scores, config.evaluate.average)
    return Replay(rows, right, macs)


class StoredAnswers:
    """Feeds `decide` with the scores of videos.

    Args:
        scores: The scores.
        config: The run's config.
    """

    def __init__(self, scores: Scores, config: Config) -> None:
        self._scores, self._config = scores, config

    @cached_property
    def views(self) -> ViewScores:
        """The scores view by view; read when a policy about videos first needs them."""
        return view_scores(self._scores, self._config.evaluate.average)

    def decide(self, policy: Policy) -> Decision:
        """Returns the decision of a policy on all scored clips or videos, in their order."""
        scores, points = self._scores, self._config.model.points
        crops = self._config.evaluate.spatial_crops
        if policy.unit == "video":
            clips = scores.clips_per_video
            return decide(policy, Evidence(len(scores.rows) // clips, points, views=clips * crops), self._of_videos)
        evidence = Evidence(len(scores.rows), points, scores.assigned, scores.right, views=crops, draws=scores.draws)
        return decide(policy, evidence, self._of_clips)

    def _of_clips(self, rows: Choice, step: Step) -> Mapping[Measure, Floats]:
        return {measure: values[rows, step.point] for measure, values in self._scores.confidence.items()}

    def _of_videos(self, rows: Choice, step: Step) -> Mapping[Measure, Floats]:
        return {measure: values[rows, step.stop - 1, step.point] for measure, values in self.views.confidence.items()}


def points_in_answer(policy: Policy, decision: Decision, *, clips: int, crops: int) -> npt.NDArray[np.int64]:
    """Returns the point at which each view of a video counts in the answer to the video; -1 if it does not.

    Args:
        policy: The policy that decided.
        decision: Its decision.
        clips: Clips of a video.
        crops: Crops of a clip.

    Returns:
        `(videos, views)`, the views in the order in which they run.
    """
    if policy.unit == "clip":
        return decision.points.reshape(-1, clips)[:, clip_order(clips, crops)]
    return np.where(np.arange(clips * crops) < decision.stops[:, None], decision.points[:, None], -1)


def answers(shard: Scored, videos: Choice, points: npt.NDArray[np.int64], average: Average) -> Floats:
    """Returns the probabilities of answers to videos.

    Args:
        shard: The scores.
        videos: Number of each answer's video within the shard, `(answers,)`.
        points: The points of its views, `(answers, views)`, from `points_in_answer`.
        average: How views are averaged.

    Returns:
        `(answers, classes)`. An answer of all views at one point equals `running_answers` to the bit.
    """
    values = values_to_average(shard.by_video(), average)  # (videos, views, points, classes)
    total = np.zeros((len(videos), values.shape[-1]))
    for view, of_view in enumerate(points.T):  # one after the other, as `running_answers` adds them
        total += np.where(of_view[:, None] >= 0, values[videos, view, of_view], 0.0)
    return probabilities_of_mean(total / (points >= 0).sum(1, keepdims=True), average)


def _right(ends: npt.NDArray[np.int8], scores: Scores, average: Average) -> Bools:
    """Returns where policies about clips are right, `(policies, videos)`, from the point where each clip ends."""
    right, first = np.empty(ends.shape[:2], dtype=bool), 0
    clips = ends.shape[2]
    for shard in scores.shards():  # a shard holds whole videos
        here = ends[:, first : first + len(shard.rows) // clips]  # (policies, videos of the shard, clips)
        number = np.broadcast_to(np.arange(here.shape[1])[:, None], (*here.shape[:2], 1))
        # Each different way to end a video, once: the number of the video, then the ends of its clips.
        ways, inverse = np.unique(
            np.concatenate([number, here], axis=2).reshape(-1, 1 + clips), axis=0, return_inverse=True
        )
        clip_of = clip_order(clips, shard.logits.shape[1])
        found = predictions(answers(shard, ways[:, 0], ways[:, 1:][:, clip_of], average))
        right[:, first : first + here.shape[1]] = (found == shard.truth[::clips][ways[:, 0]])[inverse].reshape(
            here.shape[:2]
        )
        first += here.shape[1]
    return right
