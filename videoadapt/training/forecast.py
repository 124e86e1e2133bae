"""Predicts the time of a training step in a layout of ranks from the times of single passes.

The prediction is arithmetic and measures nothing. The time of a pass grows linearly with the number of clips. The
slowest rank decides, students wait for the teacher's logits, and gradients are summed in a ring all-reduce. The model
ignores decoding, the latency of messages, and ranks that slow each other down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.training.draws import possible_draws
from videoadapt.training.groups import Group, GroupPlan, consecutive_groups, even_counts, split_evenly

# DistributedDataParallel sends gradients in buckets of this size while the backward pass still runs.
# Only the last bucket has no computation left to overlap with.
_BUCKET_BYTES = 25 << 20
_LEAST_GAIN = 0.02  # of a step: the costliest point last takes more memory, and forecasts have errors
SUMMED_BYTES = {"fp32": 4, "bf16": 2}  # of a gradient, by `parallel.sums`
_FLOAT_BYTES = 4  # logits travel as float32


@dataclass(frozen=True)
class LinearTime:
    """Seconds of a pass: a fixed cost, and a cost for each clip."""

    fixed_s: float
    per_clip_s: float

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> LinearTime:
        """Returns the line through two measurements.

        Args:
            few: Number of clips and seconds of the smaller batch.
            many: Number of clips and seconds of the larger batch.

        Returns:
            The line, with both costs at least 0: noise can make the slope or the intercept of the exact line negative.
        """
        slope = max((many[1] - few[1]) / (many[0] - few[0]), 0.0)
        fixed = few[1] - slope * few[0]
        # Without a fixed cost the line goes through the origin and the larger batch, which is the less noisy point.
        return cls(fixed, slope) if fixed >= 0.0 else cls(0.0, many[1] / many[0])

    def seconds(self, clips: int) -> float:
        """Returns the seconds of a pass over `clips` clips."""
        return self.fixed_s + self.per_clip_s * clips


@dataclass(frozen=True)
class Passes:
    """A forward and a backward pass at one point."""

    forward: LinearTime
    backward: LinearTime

    def seconds(self, clips: int) -> float:
        """Returns the seconds of both passes over `clips` clips."""
        return self.forward.seconds(clips) + self.backward.seconds(clips)


@dataclass(frozen=True)
class StepWork:
    """The work of one optimizer step, the same in every layout of ranks."""

    passes: Mapping[str, Passes]  # by point, costliest first
    draws: Mapping[tuple[str, ...], float]  # the points that a step may train, with their probabilities
    optimizer_s: float
    gradient_bytes: int  # all gradients of the model
    logits_bytes: int  # the teacher's logits on one clip
    clips: int  # clips of the global batch
    micro_batches: int  # `train.accumulate`
    pairs: bool  # whether mixup or cutmix mixes clips in pairs, which then stay on one rank

    @classmethod
    def of(cls, config: Config, passes: Mapping[str, Passes], optimizer_s: float, parameters: int) -> StepWork:
        """Returns the work of a step of `train.batch` clips.

        Args:
            config: The config.
            passes: The times of the passes, by point, costliest first.
            optimizer_s: Seconds of the optimizer.
            parameters: The number of learnt values.
        """
        return cls(
            passes,
            possible_draws(config.model.points, config.train.draw),
            optimizer_s,
            gradient_bytes=SUMMED_BYTES[config.parallel.sums] * parameters,
            logits_bytes=_FLOAT_BYTES * config.model.num_classes,
            clips=config.train.batch,
            micro_batches=config.train.accumulate,
            pairs=config.data.mixes,
        )

    @property
    def clips_per_micro_batch(self) -> int:
        """Clips of one micro-batch, summed over all ranks of a group."""
        return self.clips // self.micro_batches


@dataclass(frozen=True)
class Network:
    """The connection between ranks."""

    bytes_per_s: float
    overlaps: bool  # False on CPUs: the cores that compute also send, so that sending cannot overlap with computing


@dataclass(frozen=True)
class Forecast:
    """The predicted step in one layout, the mean over all draws."""

    plan: GroupPlan
    step_s: float
    passes_s: float  # until the slowest rank has its gradients
    communication_s: float  # added to the step by summing the gradients
    utilisation: float  # fraction of the ranks' time that passes take, in (0, 1]
    costliest_last: bool = False  # whether the backward pass at the costliest point of each group comes last


@dataclass(frozen=True)
class _StepTimes:
    """Seconds of a step with one draw; the first three as in `Forecast`."""

    step_s: float
    passes_s: float
    communication_s: float
    busy_s: float  # passes, summed over all ranks


def forecast(plan: GroupPlan, work: StepWork, network: Network, *, costliest_last: bool = False) -> Forecast:
    """Predicts the time of a step of `work` by the ranks of `plan`.

    Args:
        plan: The groups of all ranks.
        work: The work of a step.
        network: The connection between ranks.
        costliest_last: Whether the backward pass at the costliest point of each group comes last, not that at its
            cheapest point.
    """
    steps = [
        (probability, _step(plan, draw, work, network, 0 if costliest_last else -1))
        for draw, probability in work.draws.items()
    ]
    step_s = sum(p * step.step_s for p, step in steps)
    return Forecast(
        plan,
        step_s,
        passes_s=sum(p * step.passes_s for p, step in steps),
        communication_s=sum(p * step.communication_s for p, step in steps),
        utilisation=sum(p * step.busy_s for p, step in steps) / (plan.ranks * step_s),
        costliest_last=costliest_last,
    )


def best_order(plan: GroupPlan, work: StepWork, network: Network) -> Forecast:
    """Returns the forecast with the order of backward passes that `parallel.overlap: auto` chooses.

    The costliest point comes last if that makes a step shorter by at least 2 %. Otherwise the cheapest one does.
    """
    usual, other = (forecast(plan, work, network, costliest_last=last) for last in (False, True))
    return other if other.step_s <= (1 - _LEAST_GAIN) * usual.step_s else usual


def _step(plan: GroupPlan, draw: tuple[str, ...], work: StepWork, network: Network, last: int) -> _StepTimes:
    """Times a step that trains only the points of `draw`; `last` is the index of the last backward pass's point."""
    plan = GroupPlan(tuple(_only_drawn(group, draw) for group in plan.groups))
    clips_per_rank = {
        group: _ranks_by_clips(work.clips_per_micro_batch, len(group.ranks), work.pairs) for group in plan.groups
    }
    # The rank with the most clips is the slowest of its group, and the others wait for it in the all-reduce.
    most_clips = {group: max(clips) for group, clips in clips_per_rank.items()}
    logits_at = _logits_arrive_at(plan, most_clips[plan.groups[0]], work, network)
    gradients_at = {
        group: _gradients_ready_at(group, clips, work, None if group is plan.groups[0] else logits_at)
        for group, clips in most_clips.items()
    }
    last_backward_at = [
        gradients_at[group] - work.passes[group.points[last]].backward.seconds(most_clips[group])
        for group in plan.groups
        if group.points  # no point of the group may be drawn; its ranks then join the all-reduce with zeros
    ]
    passes_s = max(gradients_at.values())

    # A ring all-reduce sends 2 (n - 1) / n of the bytes from each rank to the next.
    reduce_s = 2 * (plan.ranks - 1) / plan.ranks * work.gradient_bytes / network.bytes_per_s
    last_bucket_s = reduce_s * min(1.0, _BUCKET_BYTES / work.gradient_bytes)
    # With overlap the all-reduce starts when all ranks run their last backward pass,
    # and its last bucket starts when all of them have finished it.
    if network.overlaps:
        reduced_at = max(passes_s + last_bucket_s, max(last_backward_at) + reduce_s)
    else:
        reduced_at = passes_s + reduce_s
    busy_s = sum(
        work.micro_batches * ranks * _micro_batch_s(group, clips, work)
        for group in plan.groups
        for clips, ranks in clips_per_rank[group].items()
    )
    return _StepTimes(reduced_at + work.optimizer_s, passes_s, reduced_at - passes_s, busy_s)


def _only_drawn(group: Group, draw: tuple[str, ...]) -> Group:
    return Group(tuple(point for point in group.points if point in draw), group.ranks)


@cache  # thousands of layouts of thousands of ranks have groups of the same sizes
def _ranks_by_clips(clips: int, ranks: int, pairs: bool) -> Counter[int]:
    """Returns the number of a group's ranks by the clips that they get of a micro-batch."""
    return Counter(len(positions) for positions in split_evenly(clips, ranks, pairs=pairs))


def _micro_batch_s(group: Group, clips: int, work: StepWork) -> float:
    return sum(work.passes[point].seconds(clips) for point in group.points)


def _logits_arrive_at(plan: GroupPlan, teacher_clips: int, work: StepWork, network: Network) -> list[float]:
    """Returns, by micro-batch, the seconds after which the students have the teacher's logits."""
    teachers = plan.groups[0]
    # A single group has its teacher on every rank and sends no logits.
    sending_s = work.clips_per_micro_batch * work.logits_bytes / network.bytes_per_s if len(plan.groups) > 1 else 0.0
    forward_s = work.passes[teachers.points[0]].forward.seconds(teacher_clips)
    micro_batch_s = _micro_batch_s(teachers, teacher_clips, work)
    # Teachers do not wait: the forward pass of micro-batch i starts as soon as micro-batch i - 1 is done.
    return [number * micro_batch_s + forward_s + sending_s for number in range(work.micro_batches)]


def _gradients_ready_at(group: Group, clips: int, work: StepWork, logits_at: Sequence[float] | None) -> float:
    """Returns the seconds after which a rank has its gradients; `logits_at` is None for teachers."""
    if not group.points:
        return 0.0
    forward_s = work.passes[group.points[0]].forward.seconds(clips)
    rest_s, now_s = _micro_batch_s(group, clips, work) - forward_s, 0.0
    for number in range(work.micro_batches):
        # The first forward pass of a student runs while the logits travel; everything after it needs them.
        now_s = max(now_s + forward_s, logits_at[number] if logits_at else 0.0) + rest_s
    return now_s


def layouts(work: StepWork, ranks: int) -> list[GroupPlan]:
    """Returns the layouts of `ranks` ranks that are worth a forecast.

    The first layout has no groups. For each way to partition the lengths into groups, the ranks are spread by load,
    as `parallel.groups: auto` does for one group per length. Each spread with one rank moved from one group to another
    is included too, because the load ignores waiting and communication.

    Returns:
        Different plans without a rank that has no clip; empty if every plan has such a rank.
    """
    points = tuple(work.passes)
    plans = {GroupPlan((Group(points, range(ranks)),)): None}  # a dict removes duplicates and keeps the order
    lengths = list(dict.fromkeys(Point.parse(point).length for point in points))
    for partition in _partitions(lengths):
        if not 1 < len(partition) <= ranks:
            continue
        groups = [tuple(point for point in points if Point.parse(point).length in members) for members in partition]
        loads = [_expected_s(group, work) for group in groups]
        for counts in _with_neighbours(even_counts(loads, ranks)):
            plans[consecutive_groups(zip(groups, counts, strict=True), points)] = None
    # Mixed clips stay in pairs, so that a rank needs at least one whole pair.
    units = work.clips_per_micro_batch // 2 if work.pairs else work.clips_per_micro_batch
    return [plan for plan in plans if max(len(group.ranks) for group in plan.groups) <= units]


def _expected_s(points: Sequence[str], work: StepWork) -> float:
    """Returns the seconds of one rank for all passes at some points, the mean over draws."""
    return sum(
        probability * work.passes[point].seconds(work.clips_per_micro_batch)
        for draw, probability in work.draws.items()
        for point in points
        if point in draw
    )


def _with_neighbours(counts: list[int]) -> Iterator[list[int]]:
    """Yields `counts`, then each variant with one rank moved from one group to another."""
    yield counts
    for source, count in enumerate(counts):
        for target in range(len(counts)):
            if source != target and count > 1:  # every group keeps at least one rank
                yield [n - (i == source) + (i == target) for i, n in enumerate(counts)]


def _partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Yields all ways to partition `items` into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in _partitions(rest):
        yield [[first], *groups]
        for number, group in enumerate(groups):
            yield [*groups[:number], [first, *group], *groups[number + 1 :]]


def groups_setting(plan: GroupPlan) -> str:
    """Returns the value of `parallel.groups` for a plan, as in a YAML file: `{14: 2, 10+7: 1}`, or `null`."""
    if len(plan.groups) == 1:
        return "null"
    keys = ["+".join(dict.fromkeys(str(Point.parse(p).length) for p in group.points)) for group in plan.groups]
    return "{" + ", ".join(f"{key}: {len(g.ranks)}" for key, g in zip(keys, plan.groups, strict=True)) + "}"
