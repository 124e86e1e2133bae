"""Which rank trains which points on which clips (ReViT, section 3.4). Pure arithmetic, without processes.

Each group of ranks trains some token lengths on the whole global batch, split evenly over its ranks. A single rank that
trains all points is a plan with one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.errors import ConfigError, plural
from videoadapt.training.draws import point_probabilities


@dataclass(frozen=True)
class Group:
    """Ranks that train the same points."""

    points: tuple[str, ...]  # costliest first
    ranks: range  # consecutive

    def positions(self, rank: int, clips: int, *, pairs: bool = False) -> range:
        """Returns the positions, in 0 to `clips` - 1, of the clips that a rank trains; see `split_evenly`."""
        return split_evenly(clips, len(self.ranks), pairs=pairs)[rank - self.ranks.start]


@dataclass(frozen=True)
class GroupPlan:
    """The groups of all ranks, in the order of their ranks. The first group has the costliest point, the teacher."""

    groups: tuple[Group, ...]

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.groups[-1].ranks.stop

    def group(self, rank: int) -> Group:
        """Returns the group of a rank."""
        return next(group for group in self.groups if rank in group.ranks)

    def __str__(self) -> str:
        return "; ".join(f"{', '.join(group.points)}: {plural(len(group.ranks), 'rank')}" for group in self.groups)


def split_evenly(clips: int, ranks: int, *, pairs: bool = False) -> list[range]:
    """Splits the positions 0 to `clips` - 1 into one consecutive range per rank.

    Args:
        clips: Number of positions.
        ranks: Number of ranges.
        pairs: Whether the positions 2i and 2i + 1 stay together, since their clips are mixed with each other.

    Returns:
        The ranges. Their lengths differ by at most 1, with `pairs` by at most 2; a range may be empty.
    """
    size = 2 if pairs else 1
    units = -(-clips // size)  # rounded up: the last pair may have one clip
    edges = [min(size * (units * rank // ranks), clips) for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


def make_plan(config: Config, ranks: int, costs: Mapping[str, float]) -> GroupPlan:
    """Returns the plan of `parallel.groups`.

    Args:
        config: The config.
        ranks: Number of ranks of the job.
        costs: Cost of each point in any unit, such as MACs; used by `parallel.groups: auto` only.

    Raises:
        ConfigError: The groups need another number of ranks, or a rank would have no clip.
    """
    groups, points = config.parallel.groups, config.model.points
    if groups is None:
        plan = GroupPlan((Group(points, range(ranks)),))
    elif groups == "auto":
        probabilities = point_probabilities(config)
        plan = _balanced(points, ranks, {point: probabilities[point] * costs[point] for point in points})
    else:
        plan = consecutive_groups([(points_of(key, points), count) for key, count in groups.items()], points)
        if plan.ranks != ranks:
            raise ConfigError(
                f"parallel.groups: {groups} needs {plural(plan.ranks, 'rank')}, but this job has {ranks}; start "
                f"{plan.ranks}, or set parallel.groups=auto"
            )
    _require_clips_for_all(plan, config)
    return plan


def _require_clips_for_all(plan: GroupPlan, config: Config) -> None:
    """Raises ConfigError if a rank would have no clip in a micro-batch."""
    largest = max(len(group.ranks) for group in plan.groups)
    clips = config.train.micro_batch
    units = clips // 2 if config.data.mixes else clips  # pairs are not split
    if largest > units:
        raise ConfigError(
            f"train.batch: {plural(config.train.batch, 'clip')} in {plural(config.train.accumulate, 'micro-batch')} "
            f"leave nothing for some of the {largest} ranks of a group"
            f"{' (mixup and cutmix need two clips each)' if config.data.mixes else ''}; "
            "raise train.batch, or lower train.accumulate"
        )


def points_of(key: str, points: Sequence[str]) -> tuple[str, ...]:
    """Returns the points, in the order of `points`, that a key of `parallel.groups` means.

    A key names one length (`14`) or several (`10+7`); all keeps of a length belong to it.
    """
    lengths = {int(length) for length in key.split("+")}
    return tuple(point for point in points if Point.parse(point).length in lengths)


def consecutive_groups(sized: Iterable[tuple[tuple[str, ...], int]], points: Sequence[str]) -> GroupPlan:
    """Returns a plan whose groups have consecutive ranks, the teacher's group first.

    Args:
        sized: The points and the number of ranks of each group, in any order.
        points: All points, costliest first.
    """
    ordered = sorted(sized, key=lambda group: points.index(group[0][0]))
    groups, first = [], 0
    for members, count in ordered:
        groups.append(Group(members, range(first, first + count)))
        first += count
    return GroupPlan(tuple(groups))


def _balanced(points: Sequence[str], ranks: int, costs: Mapping[str, float]) -> GroupPlan:
    """Returns a plan with one group per length, or fewer if there are fewer ranks.

    All keeps of a length are in one group, since the length with all tokens teaches them.
    """
    lengths = list(dict.fromkeys(Point.parse(point).length for point in points))
    sets = [tuple(point for point in points if Point.parse(point).length == length) for length in lengths]
    load = {group: sum(costs[point] for point in group) for group in sets}
    while len(sets) > ranks:  # merge the two cheapest
        *sets, second, last = sorted(sets, key=lambda group: -load[group])
        merged = tuple(point for point in points if point in second + last)
        load[merged] = load[second] + load[last]
        sets.append(merged)
    return consecutive_groups(zip(sets, even_counts([load[group] for group in sets], ranks), strict=True), points)


def even_counts(loads: Sequence[float], ranks: int) -> list[int]:
    """Returns how many ranks each group gets, at least one.

    Every further rank goes to the group that has the highest load per rank at that moment.

    Args:
        loads: The cost of each group.
        ranks: All ranks; at least as many as groups.
    """
    counts = [1] * len(loads)
    for _ in range(ranks - len(loads)):
        counts[max(range(len(loads)), key=lambda group: loads[group] / counts[group])] += 1
    return counts
