"""The report on each policy: accuracies with intervals, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from videoadapt.config.load import Config
from videoadapt.config.sections import Average
from videoadapt.evaluation.against_fixed import AgainstFixed, Measured, against_fixed
from videoadapt.evaluation.intervals import accuracy_interval, class_means, mean_class_interval, paired_difference
from videoadapt.routing.decide import clip_ends, clip_macs, views_run
from videoadapt.routing.label_rules import NO_CLASS, Bools, Choice, Floats, Interval
from videoadapt.routing.policy import Fixed, Policy, mix_of
from videoadapt.routing.replay import StoredAnswers, answers, points_in_answer
from videoadapt.routing.scores import Scores

TOP = 5  # classes kept for each video, and the k of top-k accuracy


@dataclass(frozen=True)
class Population:
    """The videos that an evaluation counts.

    Attributes:
        videos: Name of each listed video.
        truth: Class number of each listed video, `(videos,)`.
        sources: Number of each listed video's source, `(videos,)`. Intervals draw whole sources.
        classes: Names of all classes.
        scored: Positions of the videos with scores, ascending. The other videos failed: they count as wrong, or are
            left out, by `evaluate.failed`.
        failed: Path and cause of each video that failed.
    """

    videos: list[str]
    truth: Choice
    sources: Choice
    classes: tuple[str, ...]
    scored: Choice
    failed: list[dict[str, str]]


@dataclass(frozen=True)
class Outcome:
    """The decisions of one policy on the scored clips, and the best classes of each scored video.

    Attributes:
        policy: The policy.
        choice: Number of the point where each clip ends, `(clips,)`; -1 for a clip that a cascade over views did not
            run.
        best: The best classes of each video, best first, `(scored videos, k)`; k is 5, or the number of classes.
            `NO_CLASS` for a video whose probabilities are NaN.
        p_best: Their probabilities, means over the views of a video that ran.
        ran: How many views of each clip ran at each point, `(clips, points)`.
        macs: MACs of each clip, `(clips,)`: all views that ran, at all points, and the assigner.
        assigner_macs: MACs of the assigner for one clip, 0 without one.
    """

    policy: Policy
    choice: Choice
    best: Choice
    p_best: Floats
    ran: Choice
    macs: Floats
    assigner_macs: int


@dataclass(frozen=True)
class Accuracies:
    """Accuracies of one policy between 0 and 1, and their 95 % intervals. The names are keys of `evaluate.json`."""

    top1: float  # `evaluate.failed` decides how failed videos count
    top1_low: float
    top1_high: float
    top1_failed_wrong: float  # failed videos count as wrong
    top1_readable: float  # failed videos are left out
    mean_class: float
    mean_class_low: float
    mean_class_high: float
    top5: float | None  # None for 5 classes or fewer
    top5_low: float | None
    top5_high: float | None


@dataclass(frozen=True)
class Costs:
    """Mean MACs of one policy. The names are keys of `evaluate.json`."""

    macs_per_view: float
    macs_per_view_without_assigner: float
    macs_per_clip: float
    macs_per_video: float
    macs_per_video_without_assigner: float
    views_per_video: float  # views that ran, counted once for each point


@dataclass(frozen=True)
class PolicyRow:
    """The figures of one policy.

    Attributes:
        accuracies: Accuracies on the videos that count.
        difference_to_costliest: Top-1 minus the top-1 of the fixed costliest point.
        costs: Mean costs.
        macs_saved: 1 minus the mean cost of a clip over that at the fixed costliest point.
        mix: Fraction of the clips that end at each point. A cascade over views does not run all clips: the rest is at
            no point.
        clips_per_s: Measured speed, None if it was not measured.
        record: Further fields that the policy records.
        nan_videos: Videos that were read, and whose probabilities are NaN. They count as wrong.
        pareto: No other policy is cheaper and as accurate, or more accurate and no costlier. The oracle and random
            routing take no part.
        difference_to_random: Top-1 minus the top-1 of random routing with the same mix; None without that policy.
        against_fixed: The policy beside the fixed points; None for these, and for policies that nobody would use.
    """

    accuracies: Accuracies
    difference_to_costliest: Interval
    costs: Costs
    macs_saved: float
    mix: dict[str, float]
    clips_per_s: float | None
    record: Mapping[str, object]
    nan_videos: int = 0
    pareto: bool = False
    difference_to_random: Interval | None = None
    against_fixed: AgainstFixed | None = None

    @property
    def top1(self) -> float:
        """Top-1 accuracy; `accuracies` has its interval."""
        return self.accuracies.top1

    def to_json(self) -> dict[str, object]:
        """Returns the row of `evaluate.json`: accuracies, costs and recorded fields stand beside the others."""
        row = {
            **asdict(self.accuracies),
            "difference_to_costliest": self.difference_to_costliest,
            **asdict(self.costs),
            "macs_saved": self.macs_saved,
            "mix": self.mix,
            "clips_per_s": self.clips_per_s,
            **self.record,
            "nan_videos": self.nan_videos,
            "pareto": self.pareto,
        }
        if self.difference_to_random is not None:
            row["difference_to_random"] = self.difference_to_random
        return row | (asdict(self.against_fixed) if self.against_fixed else {})


def outcomes_of(scores: Scores, policies: Sequence[Policy], config: Config) -> list[Outcome]:
    """Applies each policy to the scored clips.

    Args:
        scores: The scores of all clips at all points.
        policies: The policies, in the order of the result.
        config: The run's config.
    """
    # The same `decide` as on the model, so that an evaluation and a prediction route clips alike.
    stored = StoredAnswers(scores, config)
    decisions = [stored.decide(policy) for policy in policies]
    views = {"clips": scores.clips_per_video, "crops": config.evaluate.spatial_crops}
    counted = [points_in_answer(p, decided, **views) for p, decided in zip(policies, decisions, strict=True)]
    all_best = _best_of_videos(scores, counted, config.evaluate.average)
    outcomes = []
    for policy, decision, best in zip(policies, decisions, all_best, strict=True):
        ran = views_run(policy, decision, len(config.model.points), **views)
        macs, assigner = clip_macs(policy, ran, config.model)
        ends = clip_ends(policy, decision, **views)
        outcomes.append(Outcome(policy, ends, *best, ran, macs.astype(np.float64), assigner))
    return outcomes


def _best_of_videos(scores: Scores, counted: Sequence[Choice], average: Average) -> list[tuple[Choice, Floats]]:
    """Returns, by policy, the best classes of each video and their probabilities, both `(videos, k)`.

    Args:
        scores: The scores.
        counted: By policy, the points of the views in the answers, `(videos, views)`; see `points_in_answer`.
        average: How views are averaged.
    """
    found: list[list[tuple[Choice, Floats]]] = [[] for _ in counted]
    first = 0  # position of the shard's first video among all videos
    for shard in scores.shards():  # read once for all policies; a shard holds whole videos
        videos = np.arange(len(shard.rows) // scores.clips_per_video)
        for parts, points in zip(found, counted, strict=True):
            parts.append(_best(answers(shard, videos, points[first + videos], average)))
        first += len(videos)
    return [
        (np.concatenate(classes), np.concatenate(p)) for classes, p in (zip(*parts, strict=True) for parts in found)
    ]


def _best(probabilities: Floats) -> tuple[Choice, Floats]:
    """Returns the best classes of each video and their probabilities: `(videos, classes)` to twice `(videos, k)`."""
    # A stable sort gives equal probabilities the order of the classes, on every machine.
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    p_best = np.take_along_axis(probabilities, best, axis=1)
    # The order of NaN means nothing: class 0 would be the best.
    return np.where(np.isnan(probabilities).any(1, keepdims=True), NO_CLASS, best), p_best


def policy_rows(
    outcomes: list[Outcome], population: Population, speeds: Mapping[str, float], config: Config
) -> dict[str, PolicyRow]:
    """Computes the figures of each policy.

    Args:
        outcomes: The outcomes of all policies. The first outcome belongs to the fixed costliest point.
        population: The listed videos.
        speeds: Measured clips per second, by policy name.
        config: The run's config.

    Returns:
        The rows by policy name.
    """
    counted = np.arange(len(population.videos)) if config.evaluate.failed == "wrong" else population.scored
    by_name = {outcome.policy.name: outcome for outcome in outcomes}
    # Three fields of a row need all rows, so they are replaced below.
    rows = {
        name: PolicyRow(
            accuracies=_accuracies(outcome, population, counted),
            difference_to_costliest=_difference(outcome, outcomes[0], population, counted),
            costs=_costs(outcome, population, config),
            macs_saved=float(1 - outcome.macs.mean() / outcomes[0].macs.mean()),
            mix=dict(zip(config.model.points, mix_of(outcome.choice, len(config.model.points)), strict=True)),
            clips_per_s=speeds.get(name),
            record=outcome.policy.record(),
            nan_videos=int((outcome.best[:, 0] == NO_CLASS).sum()),
        )
        for name, outcome in by_name.items()
    }
    # The oracle reads the truth, and random routing is a control: nobody would use them on new clips.
    known = [name for name, outcome in by_name.items() if not outcome.policy.needs & {"truth", "population"}]
    front = pareto_front(
        [rows[name].costs.macs_per_video for name in known], [rows[name].accuracies.top1 for name in known]
    )
    for name, on_front in zip(known, front, strict=True):
        rows[name] = replace(rows[name], pareto=on_front)
    measured = {
        name: Measured(name, float(by_name[name].macs.mean()), _video_right(by_name[name], population, 1)[counted])
        for name in known
    }
    fixed = [measured[name] for name in known if isinstance(by_name[name].policy, Fixed)]
    for name in known:
        if not isinstance(by_name[name].policy, Fixed):
            rows[name] = replace(
                rows[name], against_fixed=against_fixed(measured[name], fixed, population.sources[counted])
            )
    for outcome in outcomes:
        imitated = outcome.policy.imitates
        if imitated is not None:
            difference = _difference(by_name[imitated], outcome, population, counted)
            rows[imitated] = replace(rows[imitated], difference_to_random=difference)
    return rows


def pareto_front(costs: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Returns which policies are on the front: none is cheaper and as accurate, or more accurate and no costlier."""
    pairs = list(zip(costs, accuracies, strict=True))
    return [
        not any((c <= cost and a > accuracy) or (c < cost and a >= accuracy) for c, a in pairs)
        for cost, accuracy in pairs
    ]


def _accuracies(outcome: Outcome, population: Population, counted: Choice) -> Accuracies:
    all_right = _video_right(outcome, population, 1)
    right, truth, sources = all_right[counted], population.truth[counted], population.sources[counted]
    low, high = accuracy_interval(right, sources)
    class_low, class_high = mean_class_interval(right, truth, sources)
    top5 = low5 = high5 = None
    if len(population.classes) > TOP:  # with 5 classes or fewer, every answer is among the best 5
        right5 = _video_right(outcome, population, TOP)[counted]
        top5, (low5, high5) = float(right5.mean()), accuracy_interval(right5, sources)
    return Accuracies(
        top1=float(right.mean()),
        top1_low=low,
        top1_high=high,
        top1_failed_wrong=float(all_right.mean()),
        top1_readable=float(all_right[population.scored].mean()),
        mean_class=float(class_means(right, truth).mean()),
        mean_class_low=class_low,
        mean_class_high=class_high,
        top5=top5,
        top5_low=low5,
        top5_high=high5,
    )


def _costs(outcome: Outcome, population: Population, config: Config) -> Costs:
    model = outcome.macs - outcome.assigner_macs  # (clips,): without the assigner
    crops, videos = config.evaluate.spatial_crops, max(len(population.scored), 1)
    return Costs(
        macs_per_view=float(outcome.macs.mean() / crops),
        macs_per_view_without_assigner=float(model.mean() / crops),
        macs_per_clip=float(outcome.macs.mean()),
        macs_per_video=float(outcome.macs.sum() / videos),
        macs_per_video_without_assigner=float(model.sum() / videos),
        views_per_video=float(outcome.ran.sum() / videos),
    )


def _difference(a: Outcome, b: Outcome, population: Population, counted: Choice) -> Interval:
    """Returns the top-1 of a minus the top-1 of b on the same videos, with an interval."""
    if a is b:  # no chance is involved, but the smoothed interval would have a width
        return 0.0, 0.0, 0.0
    ours, theirs = (_video_right(outcome, population, 1)[counted] for outcome in (a, b))
    return paired_difference(ours, theirs, sources=population.sources[counted])


def _video_right(outcome: Outcome, population: Population, top: int) -> Bools:
    """Returns, by listed video, whether the truth is among the `top` best classes; False for a failed video."""
    right = np.zeros(len(population.videos), dtype=bool)
    truth = population.truth[population.scored]
    right[population.scored] = (outcome.best[:, :top] == truth[:, None]).any(1)  # (scored videos,)
    return right
