"""How long a step would take in a layout of ranks, as arithmetic alone: times of passes in, time of the step out.

A pass over more clips takes longer along a straight line. The slowest rank decides, the students wait for the
teacher's logits, and the gradients are summed in a ring. What the model leaves out: decoding, latency of messages,
and ranks that slow each other down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from videoadapt.config.points import Point
from videoadapt.training.groups import Group, GroupPlan, consecutive_groups, even_counts, split_evenly

_BUCKET_BYTES = 25 << 20  # in which DistributedDataParallel sends gradients: the last one is there when nothing is left


@dataclass(frozen=True)
class LinearTime:
    """Seconds of a pass: so many whatever it computes, and so many for each clip."""

    fixed_s: float
    per_clip_s: float

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> LinearTime:
        """The line through two measurements (clips, seconds); a part that noise would make negative is 0."""
        slope = max((many[1] - few[1]) / (many[0] - few[0]), 0.0)
        fixed = few[1] - slope * few[0]
        return cls(fixed, slope) if fixed >= 0.0 else cls(0.0, many[1] / many[0])

    def seconds(self, clips: int) -> float:
        """Of a pass over so many clips."""
        return self.fixed_s + self.per_clip_s * clips


@dataclass(frozen=True)
class Passes:
    """A forward and a backward pass at one point."""

    forward: LinearTime
    backward: LinearTime

    def seconds(self, clips: int) -> float:
        """Of both."""
        return self.forward.seconds(clips) + self.backward.seconds(clips)


@dataclass(frozen=True)
class StepWork:
    """What every step has to do, whatever the layout.

    `parts` is `train.accumulate`, and `pairs` whether clips are mixed in pairs. `logits_bytes` are those of one clip.
    """

    passes: Mapping[str, Passes]  # by point, costliest first
    draws: Mapping[tuple[str, ...], float]  # the points that a step may train, with their probabilities
    optimizer_s: float
    gradient_bytes: int
    logits_bytes: int
    clips: int
    parts: int
    pairs: bool

    @property
    def clips_of_part(self) -> int:
        """Clips that are run at once, over all ranks of a group."""
        return self.clips // self.parts


@dataclass(frozen=True)
class Network:
    """What is between the ranks. Where the ranks' own cores do the sending, nothing overlaps with computing."""

    bytes_per_s: float
    overlaps: bool


@dataclass(frozen=True)
class Forecast:
    """A step in one layout, the mean over what may be drawn.

    `utilisation` is the share of the ranks' time that passes take, in (0, 1].
    """

    plan: GroupPlan
    step_s: float
    passes_s: float  # until the slowest rank has its gradients
    communication_s: float  # that the step takes longer for the sum of the gradients
    utilisation: float


def forecast(plan: GroupPlan, work: StepWork, network: Network) -> Forecast:
    """The time of a step of `work` by a plan's ranks."""
    steps = [(chance, _step(plan, draw, work, network)) for draw, chance in work.draws.items()]
    step_s, slowest, communication_s, busy_s = (sum(c * step[i] for c, step in steps) for i in range(4))
    return Forecast(plan, step_s, slowest, communication_s, busy_s / (plan.ranks * step_s))


def _step(
    plan: GroupPlan, draw: tuple[str, ...], work: StepWork, network: Network
) -> tuple[float, float, float, float]:
    """Seconds of a step that trains the points of a draw, as `Forecast` has them, and of all ranks' passes in it."""
    plan = GroupPlan(tuple(_drawn(group, draw) for group in plan.groups))
    shares = {group: _shares(group, work) for group in plan.groups}
    logits_s = work.clips_of_part * work.logits_bytes / network.bytes_per_s if len(plan.groups) > 1 else 0.0
    teachers = plan.groups[0]
    first, part_s = work.passes[teachers.points[0]].forward, _part_s(teachers, max(shares[teachers]), work)
    sent = [part * part_s + first.seconds(max(shares[teachers])) + logits_s for part in range(work.parts)]
    ends = {group: _end(group, max(shares[group]), work, None if group is teachers else sent) for group in plan.groups}
    begins = [ends[g] - work.passes[g.points[-1]].backward.seconds(max(shares[g])) for g in plan.groups if g.points]
    slowest = max(ends.values())

    reduce_s = 2 * (plan.ranks - 1) / plan.ranks * work.gradient_bytes / network.bytes_per_s
    # The sum begins when all ranks are in their last backward pass, and its last bucket when all are through.
    last_s = reduce_s * min(1.0, _BUCKET_BYTES / work.gradient_bytes)
    done = max(slowest + last_s, max(begins) + reduce_s) if network.overlaps else slowest + reduce_s
    step_s = done + work.optimizer_s
    busy_s = sum(work.parts * _part_s(group, clips, work) for group in plan.groups for clips in shares[group])
    return step_s, slowest, done - slowest, busy_s


def _drawn(group: Group, draw: tuple[str, ...]) -> Group:
    return Group(tuple(point for point in group.points if point in draw), group.ranks)


def _expected_s(points: Sequence[str], work: StepWork) -> float:
    """Of the passes at some points in a mean step."""
    return sum(
        chance * work.passes[point].seconds(work.clips_of_part)
        for draw, chance in work.draws.items()
        for point in points
        if point in draw
    )


def _shares(group: Group, work: StepWork) -> list[int]:
    return [len(share) for share in split_evenly(work.clips_of_part, len(group.ranks), pairs=work.pairs)]


def _part_s(group: Group, clips: int, work: StepWork) -> float:
    return sum(work.passes[point].seconds(clips) for point in group.points)


def _end(group: Group, clips: int, work: StepWork, sent: Sequence[float] | None) -> float:
    """When a rank has its gradients; a student's first forward pass runs while it waits for each part's logits."""
    if not group.points:
        return 0.0
    first = work.passes[group.points[0]].forward.seconds(clips)
    rest, now = _part_s(group, clips, work) - first, 0.0
    for part in range(work.parts):
        now = max(now + first, sent[part] if sent else 0.0) + rest
    return now


def layouts(work: StepWork, ranks: int) -> list[GroupPlan]:
    """Plans for so many ranks: no groups, and for each way to group the lengths, the ranks spread by load.

    Besides the even spread (what `auto` does, where each length has a group), each that moves one rank from one group
    to another. Plans in which a rank would have no clip are left out.
    """
    points = tuple(work.passes)
    plans = {GroupPlan((Group(points, range(ranks)),)): None}  # a dict keeps their order
    lengths = list(dict.fromkeys(Point.parse(point).length for point in points))
    for sets in _partitions(lengths):
        if not 1 < len(sets) <= ranks:
            continue
        groups = [tuple(point for point in points if Point.parse(point).length in lengths) for lengths in sets]
        loads = [_expected_s(group, work) for group in groups]
        for counts in _with_neighbours(even_counts(loads, ranks)):
            plans[consecutive_groups(zip(groups, counts, strict=True), points)] = None
    units = work.clips_of_part // 2 if work.pairs else work.clips_of_part
    return [plan for plan in plans if max(len(group.ranks) for group in plan.groups) <= units]


def _with_neighbours(counts: list[int]) -> Iterator[list[int]]:
    yield counts
    for giver, count in enumerate(counts):
        for taker in range(len(counts)):
            if giver != taker and count > 1:
                yield [n - (i == giver) + (i == taker) for i, n in enumerate(counts)]


def _partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in _partitions(rest):
        yield [[first], *groups]
        for number, group in enumerate(groups):
            yield [*groups[:number], [first, *group], *groups[number + 1 :]]


def groups_setting(plan: GroupPlan) -> str:
    """What `parallel.groups` is for a plan: `{14: 2, 10+7: 1}`, or `null`."""
    if len(plan.groups) == 1:
        return "null"
    keys = ["+".join(dict.fromkeys(str(Point.parse(p).length) for p in group.points)) for group in plan.groups]
    return "{" + ", ".join(f"{key}: {len(g.ranks)}" for key, g in zip(keys, plan.groups, strict=True)) + "}"
