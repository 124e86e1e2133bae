"""The forecast of a step: properties that hold for all times of passes, and examples computed by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, make_config
from videoadapt.performance.plan import analytic_passes, reason_for, recommended, work_of
from videoadapt.training.draws import possible_draws
from videoadapt.training.forecast import (
    Forecast,
    LinearTime,
    Network,
    Passes,
    StepWork,
    best_order,
    forecast,
    groups_setting,
    layouts,
)
from videoadapt.training.groups import GroupPlan, make_plan

POINTS = ("14", "10", "7")
NO_NETWORK = Network(1e30, overlaps=False)  # so fast that sending takes no time
NANOSECOND = 1e-9
lines = st.builds(LinearTime, st.floats(0, 0.1), st.floats(1e-4, 0.1))
networks = st.builds(Network, st.floats(1e6, 1e12), st.booleans())


@st.composite
def works(draw: st.DrawFn) -> StepWork:
    micro_batches = draw(st.sampled_from([1, 2]))
    return StepWork(
        passes={point: Passes(draw(lines), draw(lines)) for point in POINTS},
        draws=possible_draws(POINTS, draw(st.sampled_from(["all", "sampled"]))),
        optimizer_s=draw(st.floats(0, 0.1)),
        gradient_bytes=draw(st.integers(1, 10**9)),
        logits_bytes=draw(st.integers(1, 10_000)),
        clips=2 * micro_batches * draw(st.integers(4, 32)),
        micro_batches=micro_batches,
        pairs=draw(st.booleans()),
    )


def simple(forward_s: Sequence[float], backward_s: Sequence[float], **changes: object) -> StepWork:
    """Passes that take the same time for any number of clips; nothing else takes time."""
    passes = {
        p: Passes(LinearTime(f, 0), LinearTime(b, 0)) for p, f, b in zip(POINTS, forward_s, backward_s, strict=False)
    }
    work = StepWork(
        passes,
        possible_draws(POINTS, "all"),
        0.0,
        gradient_bytes=1,
        logits_bytes=1,
        clips=8,
        micro_batches=1,
        pairs=False,
    )
    return replace(work, **changes)  # type: ignore[arg-type]


def timesformer_b(**sections: dict) -> Config:
    return make_config(sections)  # the defaults are TimeSformer-B at 14, 10 and 7


def planned(config: Config, ranks: int, groups: object) -> GroupPlan:
    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update={"groups": groups})})
    return make_plan(changed, ranks, {point: float(macs) for point, macs in point_macs(config.model).items()})


@given(works(), networks, st.integers(1, 8), st.floats(1.0, 100.0))
def test_a_faster_network_never_makes_a_step_slower(
    work: StepWork, network: Network, ranks: int, factor: float
) -> None:
    faster = replace(network, bytes_per_s=network.bytes_per_s * factor)
    for plan in layouts(work, ranks):
        assert forecast(plan, work, faster).step_s <= forecast(plan, work, network).step_s + NANOSECOND


def drawn_s(work: StepWork, clips: int) -> float:
    """Seconds of the passes of a step on one rank with `clips` clips in a micro-batch, the mean over draws."""
    draws = work.draws.items()
    return work.micro_batches * sum(
        chance * work.passes[point].seconds(clips) for draw, chance in draws for point in draw
    )


@given(works(), networks, st.integers(1, 8))
def test_properties_of_every_layout(work: StepWork, network: Network, ranks: int) -> None:
    plans = layouts(work, ranks)
    assert len(set(plans)) == len(plans)
    alone, fixed = drawn_s(work, work.clips_per_micro_batch), drawn_s(work, 0)
    for plan in plans:
        assert plan.ranks == ranks
        assert sorted(point for group in plan.groups for point in group.points) == sorted(POINTS)
        found = forecast(plan, work, network)
        assert 0 < found.utilisation <= 1 + NANOSECOND
        assert found.communication_s >= 0
        # Lower bound: the passes of one rank, divided evenly over all ranks.
        assert found.passes_s >= fixed / ranks + (alone - fixed) / ranks - NANOSECOND
        separate = forecast(plan, work, replace(network, overlaps=False))
        assert found.step_s <= separate.step_s + NANOSECOND


@given(works(), networks)
def test_one_rank_is_the_sequential_step(work: StepWork, network: Network) -> None:
    (plan,) = layouts(work, 1)
    found = forecast(plan, work, network)
    passes_s = drawn_s(work, work.clips_per_micro_batch)
    assert found.step_s == pytest.approx(passes_s + work.optimizer_s)
    assert found.communication_s == 0
    assert found.utilisation == pytest.approx(passes_s / found.step_s)


@given(works(), st.integers(3, 8))
def test_layouts_include_the_plan_of_auto(work: StepWork, ranks: int) -> None:
    work = replace(work, clips=64, micro_batches=1, pairs=False, draws=possible_draws(POINTS, "all"))
    costs = {point: each.seconds(work.clips) for point, each in work.passes.items()}
    assert make_plan(make_config({"parallel": {"groups": "auto"}}), ranks, costs) in layouts(work, ranks)


def test_three_equal_gpus_one_per_length_are_58_percent_utilised() -> None:
    """ReViT's layout, by analytic cost: (195.8 + 98.6 + 48.1) / (3 x 195.8)."""
    config = timesformer_b(plan={"macs_per_s": 1e14})
    work = work_of(config, analytic_passes(config), 0.0)
    found = forecast(planned(config, 3, {"14": 1, "10": 1, "7": 1}), work, NO_NETWORK)
    assert found.utilisation == pytest.approx(0.583, abs=0.001)
    alone, together = (forecast(planned(config, n, None), work, NO_NETWORK) for n in (1, 3))
    assert alone.step_s / found.step_s == pytest.approx(
        1.75, abs=0.005
    )  # a sequential step costs 1.75 steps at length 14
    assert together.utilisation == pytest.approx(64 / 66)  # 64 clips do not divide by 3
    seven = forecast(planned(config, 7, {"14": 4, "10": 2, "7": 1}), work, NO_NETWORK)
    assert seven.utilisation > 0.95


def test_a_sampled_step_takes_the_mean_over_draws() -> None:
    work = replace(simple([10, 4, 2], [20, 8, 4]), draws=possible_draws(POINTS, "sampled"))
    (together,) = layouts(work, 1)
    assert forecast(together, work, NO_NETWORK).step_s == pytest.approx((42 + 36) / 2)
    grouped = make_plan(make_config({"parallel": {"groups": {"14": 1, "10": 1, "7": 1}}}), 3, {})
    found = forecast(grouped, work, NO_NETWORK)
    assert found.step_s == pytest.approx(30)  # a group without a drawn point waits
    assert found.utilisation == pytest.approx((42 + 36) / 2 / (3 * 30))


def test_students_wait_for_the_teachers_logits() -> None:
    plan = make_plan(make_config({"parallel": {"groups": {"14": 1, "10+7": 1}}}), 2, {})
    work = simple([10, 1, 1], [1, 5, 1])
    assert forecast(plan, work, NO_NETWORK).step_s == pytest.approx(10 + 5 + 1 + 1)  # not 8: the first forward waits
    twice = replace(work, micro_batches=2)
    assert forecast(plan, twice, NO_NETWORK).step_s == pytest.approx(
        11 + 10 + 5 + 1 + 1
    )  # the teacher does not wait between micro-batches
    slow = Network(8 / 3, overlaps=False)  # 8 clips of 1 byte take 3 s, the gradients' byte 0.375 s
    assert forecast(plan, work, slow).step_s == pytest.approx(10 + 3 + 7 + 0.375)


def test_the_all_reduce_overlaps_with_the_last_backward_pass() -> None:
    plan = make_plan(make_config({}), 2, {})
    work = simple([1, 1, 1], [1, 1, 4], gradient_bytes=250 << 20)

    def step_s(reduce_s: float, overlaps: bool) -> float:
        return forecast(plan, work, Network(work.gradient_bytes / reduce_s, overlaps)).step_s

    assert step_s(3, overlaps=False) == pytest.approx(9 + 3)
    assert step_s(3, overlaps=True) == pytest.approx(9 + 0.3)  # the last of ten buckets remains
    assert step_s(30, overlaps=True) == pytest.approx(9 - 4 + 30)


@pytest.mark.parametrize(
    ("groups", "reduce_s", "overlaps", "step_s", "costliest_last"),
    [
        (None, 0, True, 14, False),  # nothing to hide
        (None, 1, True, 14, False),  # the backward pass at 7 hides it
        (None, 2, True, 14, True),  # 1 s less than 15
        (None, 6, True, 14, True),  # the longest sum that the backward pass at 14 hides
        (None, 9, True, 14 + 9 - 6, True),
        (None, 9, False, 14 + 9, False),  # cores that compute cannot send
        (None, 1000, True, 14 - 1 + 1000, False),  # saves 5 s, less than 2 %
        ({"14": 1, "10+7": 1}, 3, True, 3 + 6, False),  # 14 is alone, and its backward pass hides it
        ({"14+7": 1, "10": 1}, 3, True, 3 + 6 + 1 + 1, True),  # 10 has ended by then; 2 s less
    ],
)
def test_the_costliest_point_comes_last_if_its_backward_pass_hides_more(
    groups: object, reduce_s: float, overlaps: bool, step_s: float, costliest_last: bool
) -> None:
    plan = make_plan(make_config({"parallel": {"groups": groups}}), 2, {})
    work = simple([3, 1, 1], [6, 2, 1], gradient_bytes=10**12)  # so large that the last bucket takes no time
    found = best_order(plan, work, Network(work.gradient_bytes / max(reduce_s, NANOSECOND), overlaps))
    assert found.step_s == pytest.approx(step_s, rel=1e-3)
    assert found.costliest_last is costliest_last


def test_every_rank_of_a_layout_has_a_clip() -> None:
    work = simple([1, 1, 1], [1, 1, 1], clips=2)
    assert all(len(group.ranks) <= 2 for plan in layouts(work, 4) for group in plan.groups)
    assert layouts(work, 7) == []
    assert layouts(replace(work, pairs=True), 2) != layouts(work, 2)


def test_one_length_has_nothing_to_group() -> None:
    work = replace(simple([1], [1]), passes={"14": Passes(LinearTime(1, 1), LinearTime(1, 1))})
    assert [len(plan.groups) for plan in layouts(work, 4)] == [1]


def test_groups_setting_is_a_valid_value_of_parallel_groups() -> None:
    work = simple([2, 1, 1], [2, 1, 1], clips=64)
    for plan in layouts(work, 5):
        text = groups_setting(plan)
        groups = None if text == "null" else dict(group.split(": ") for group in text.strip("{}").split(", "))
        assert make_plan(make_config({"parallel": {"groups": groups}}), 5, {}) == plan


def test_lines_pass_through_their_measurements_and_have_no_negative_cost() -> None:
    line = LinearTime.through((2, 5.0), (4, 9.0))
    assert (line.fixed_s, line.per_clip_s) == (1.0, 2.0)
    assert LinearTime.through((2, 5.0), (4, 4.0)) == LinearTime(5.0, 0.0)
    assert LinearTime.through((2, 1.0), (4, 9.0)) == LinearTime(0.0, 2.25)


def made(step_s: float, groups: dict[str, int] | None, ranks: int = 3) -> Forecast:
    plan = make_plan(make_config({"parallel": {"groups": groups}}), ranks, {})
    return Forecast(plan, step_s, step_s, 0.0, 0.5)


@pytest.mark.parametrize(
    ("plain_s", "grouped_s", "groups", "message"),
    [
        (1.0, 1.5, "null", "plain data parallelism over all points beats groups by 50%: the best groups"),
        (1.0, 0.99, "null", "as fast as the best groups, {14: 1, 10: 1, 7: 1}, within 2%"),
        (1.5, 1.0, "{14: 1, 10: 1, 7: 1}", "beat every rank training every point by 50%"),
    ],
)
def test_recommendation_and_reason(plain_s: float, grouped_s: float, groups: str, message: str) -> None:
    both = [made(plain_s, None), made(grouped_s, {"14": 1, "10": 1, "7": 1})]
    best = recommended(both)
    assert groups_setting(best.plan) == groups
    assert re.search(message, reason_for(best, both))
    assert "no other kind of layout" in reason_for(best, [best])
