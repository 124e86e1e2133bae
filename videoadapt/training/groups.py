"""Who trains what: one group of ranks for each token length (ReViT, section 3.4), as arithmetic alone.

Every group sees the whole global batch, split evenly over its ranks. One rank that owns all points is a plan too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.errors import ConfigError
from videoadapt.training.draws import point_shares


@dataclass(frozen=True)
class Group:
    """The ranks that train some points, costliest point first."""

    points: tuple[str, ...]
    ranks: range

    def positions(self, rank: int, clips: int, *, pairs: bool = False) -> range:
        """The positions, of so many clips, that a rank of the group trains; see `split_evenly`."""
        return split_evenly(clips, len(self.ranks), pairs=pairs)[rank - self.ranks.start]


@dataclass(frozen=True)
class GroupPlan:
    """Groups of consecutive ranks. The first group has the costliest point, which teaches all others."""

    groups: tuple[Group, ...]

    @property
    def ranks(self) -> int:
        """How many ranks the plan needs."""
        return self.groups[-1].ranks.stop

    def group(self, rank: int) -> Group:
        """The group that a rank belongs to."""
        return next(group for group in self.groups if rank in group.ranks)

    def __str__(self) -> str:
        return "; ".join(f"{', '.join(group.points)}: {len(group.ranks)} ranks" for group in self.groups)


def split_evenly(clips: int, ranks: int, *, pairs: bool = False) -> list[range]:
    """The positions 0 to `clips` - 1 in consecutive shares that differ by one clip at most.

    With `pairs`, by two: the clips at 2i and 2i + 1, which are mixed with each other, stay together.
    """
    size = 2 if pairs else 1
    units = -(-clips // size)
    edges = [min(size * (units * rank // ranks), clips) for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def make_plan(config: Config, ranks: int, costs: Mapping[str, float]) -> GroupPlan:
    """The plan of `parallel.groups` for so many ranks; `costs` of the points balance `auto`.

    Raises `ConfigError` where the groups need another number of ranks, or a rank would have no clip.
    """
    groups, points = config.parallel.groups, config.model.points
    if groups is None:
        plan = GroupPlan((Group(points, range(ranks)),))
    elif groups == "auto":
        shares = point_shares(config)
        plan = _balanced(points, ranks, {point: shares[point] * costs[point] for point in points})
    else:
        plan = consecutive_groups([(points_of(key, points), count) for key, count in groups.items()], points)
        if plan.ranks != ranks:
            raise ConfigError(
                f"parallel.groups: {groups} needs {plan.ranks} ranks, but this job has {ranks}; start {plan.ranks}, or "
                "set parallel.groups=auto"
            )
    largest, part = max(len(group.ranks) for group in plan.groups), config.train.batch // config.train.accumulate
    units = part // 2 if config.data.mixes else part
    if largest > units:
        raise ConfigError(
            f"train.batch: {config.train.batch} clips in {config.train.accumulate} parts leave nothing for some of the "
            f"{largest} ranks of a group{' (mixup and cutmix need two clips each)' if config.data.mixes else ''}; "
            "raise train.batch, or lower train.accumulate"
        )
    return plan


def points_of(key: str, points: Sequence[str]) -> tuple[str, ...]:
    """The points of the lengths that a key of `parallel.groups` names: `14`, or several as `10+7`."""
    lengths = {int(length) for length in key.split("+")}
    return tuple(point for point in points if Point.parse(point).length in lengths)


def consecutive_groups(sized: Iterable[tuple[tuple[str, ...], int]], points: Sequence[str]) -> GroupPlan:
    """The plan of groups of points with their numbers of ranks, the teacher's group first; `points` are all of them."""
    ordered = sorted(sized, key=lambda group: points.index(group[0][0]))
    groups, first = [], 0
    for members, count in ordered:
        groups.append(Group(members, range(first, first + count)))
        first += count
    return GroupPlan(tuple(groups))


def _balanced(points: Sequence[str], ranks: int, costs: Mapping[str, float]) -> GroupPlan:
    """A group for each length, ranks given where the slowest group is; with too few ranks, cheap lengths share.

    All keeps of a length are in its group: the length at keep 1 teaches them.
    """
    lengths = list(dict.fromkeys(Point.parse(point).length for point in points))
    sets = [tuple(point for point in points if Point.parse(point).length == length) for length in lengths]
    load = {group: sum(costs[point] for point in group) for group in sets}
    while len(sets) > ranks:
        *sets, second, last = sorted(sets, key=lambda group: -load[group])
        merged = tuple(point for point in points if point in second + last)
        load[merged] = load[second] + load[last]
        sets.append(merged)
    return consecutive_groups(zip(sets, even_counts([load[group] for group in sets], ranks), strict=True), points)


def even_counts(loads: Sequence[float], ranks: int) -> list[int]:
    """Ranks for groups with such loads, one at least: each further one goes to the group that is slowest by then."""
    counts = [1] * len(loads)
    for _ in range(ranks - len(loads)):
        counts[max(range(len(loads)), key=lambda group: loads[group] / counts[group])] += 1
    return counts
