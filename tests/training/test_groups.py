"""Plans: every clip is trained at every point exactly once in every layout."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videoadapt.config.load import Config, make_config
from videoadapt.errors import ConfigError
from videoadapt.training.groups import make_plan, points_of, split_evenly

POINTS = ("14", "10", "7")
COSTS = {"14": 196.0, "10": 99.0, "7": 48.0}


def config(groups: object = None, batch: int = 64, accumulate: int = 1, **data: float) -> Config:
    train = {"batch": batch, "accumulate": accumulate}
    return make_config({"parallel": {"groups": groups}, "train": train, "data": data})


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, int], int]:
    """Draws groups of lengths with any number of ranks, and the total of ranks."""
    group_of = [draw(st.integers(0, 2)) for _ in POINTS]
    sets = ["+".join(p for p, g in zip(POINTS, group_of, strict=True) if g == number) for number in set(group_of)]
    groups = {key: draw(st.integers(1, 5)) for key in sets}
    return groups, sum(groups.values())


@given(layouts(), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(5, 40))
def test_every_clip_is_trained_at_every_point_once(
    layout: tuple[dict[str, int], int], accumulate: int, mixes: bool, units: int
) -> None:
    groups, ranks = layout
    made = config(groups, batch=2 * units * accumulate, accumulate=accumulate, mixup=0.2 if mixes else 0.0)
    plan = make_plan(made, ranks, COSTS)
    assert plan.ranks == ranks
    assert plan.groups[0].points[0] == "14"  # the teacher's group is the first
    trained: Counter[tuple[str, int]] = Counter()
    for rank in range(ranks):
        group = plan.group(rank)
        assert rank in group.ranks
        positions = group.positions(rank, 2 * units, pairs=mixes)
        assert len(positions) > 0
        assert not mixes or positions.start % 2 == positions.stop % 2 == 0  # pairs stay together
        trained.update((point, clip) for point in group.points for clip in positions)
    assert trained == Counter({(point, clip): 1 for point in POINTS for clip in range(2 * units)})


@given(st.integers(0, 200), st.integers(1, 17), st.booleans())
def test_ranges_are_consecutive_and_as_even_as_possible(clips: int, ranks: int, pairs: bool) -> None:
    ranges = split_evenly(clips, ranks, pairs=pairs)
    assert [position for each in ranges for position in each] == list(range(clips))
    sizes = [len(each) for each in ranges]
    assert max(sizes) - min(sizes) <= (2 if pairs else 1)


def test_without_groups_every_rank_trains_every_point() -> None:
    plan = make_plan(config(), 3, COSTS)
    assert [(group.points, list(group.ranks)) for group in plan.groups] == [(POINTS, [0, 1, 2])]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, {POINTS: 1}),
        (2, {("14",): 1, ("10", "7"): 1}),
        (3, {("14",): 1, ("10",): 1, ("7",): 1}),
        (4, {("14",): 2, ("10",): 1, ("7",): 1}),
        (7, {("14",): 4, ("10",): 2, ("7",): 1}),  # ReViT's own ratio
    ],
)
def test_auto_gives_ranks_to_the_slowest_group(ranks: int, expected: dict[tuple[str, ...], int]) -> None:
    plan = make_plan(config("auto"), ranks, COSTS)
    assert {group.points: len(group.ranks) for group in plan.groups} == expected


def test_groups_are_ordered_by_cost_for_every_order_in_the_config() -> None:
    plan = make_plan(config({"7": 1, "14": 2, "10": 1}), 4, COSTS)
    assert [(group.points, list(group.ranks)) for group in plan.groups] == [
        (("14",), [0, 1]),
        (("10",), [2]),
        (("7",), [3]),
    ]
    assert str(plan) == "14: 2 ranks; 10: 1 rank; 7: 1 rank"
    assert points_of("10+7", POINTS) == ("10", "7")


GRID = {"14": 4.6, "12": 3.3, "14@0.7": 3.0, "14@0.5": 2.3, "12@0.5": 1.7}


def test_keeps_are_in_the_group_of_their_length() -> None:
    """Costs do not matter: 14@0.5 is cheaper than 12, but in the group of 14."""
    grid = {"model": {"points": list(GRID)}}
    expected = [("14", "14@0.7", "14@0.5"), ("12", "12@0.5")]
    for groups in ("auto", {"12": 1, "14": 1}):
        plan = make_plan(make_config(grid | {"parallel": {"groups": groups}}), 2, GRID)
        assert [group.points for group in plan.groups] == expected
    with pytest.raises(ConfigError, match=r"expected each length .*\(14, 12\) once.*points with keep < 1"):
        make_config(grid | {"parallel": {"groups": {"14": 1, "14@0.5": 1, "12": 1}}})


def test_auto_balances_the_expected_cost_of_draws() -> None:
    """With `sampled`, every step trains 14, and a third of the steps train each of the other lengths."""
    costs = {"14": 4.0, "12": 3.0, "10": 2.0, "8": 1.0}
    for draw, ranks in (("all", [2, 2, 1, 1]), ("sampled", [3, 1, 1, 1])):
        made = make_config({"model": {"points": list(costs)}, "parallel": {"groups": "auto"}, "train": {"draw": draw}})
        assert [len(group.ranks) for group in make_plan(made, 6, costs).groups] == ranks


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.groups: .*each length of model.points \(14, 10, 7\) once"):
        config({"14": 1, "10": 1})
    with pytest.raises(ConfigError, match="once"):
        config({"14": 1, "10+7": 1, "7": 1})
    with pytest.raises(ConfigError, match=r"parallel\.groups"):
        config({"14": 0, "10": 1, "7": 1})
    with pytest.raises(ConfigError, match="needs 4 ranks, but this job has 3"):
        make_plan(config({"14": 2, "10": 1, "7": 1}), 3, COSTS)
    with pytest.raises(ConfigError, match="leave nothing for some of the 3 ranks of a group"):
        make_plan(config(batch=2), 3, COSTS)
    with pytest.raises(ConfigError, match="two clips each"):
        make_plan(config(batch=4, mixup=0.5), 3, COSTS)
    with pytest.raises(ConfigError, match="odd number"):
        config(batch=6, accumulate=2, mixup=0.5)
