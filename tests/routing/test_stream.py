"""Streams: results in order and equal to those of each clip alone, full batches, bounded waiting, bounded memory."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_router import CLIPS, CONFIG, alone, assigner, model, thumbnails, views

import small_runs as runs
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.clips.datasets import EvalVideos, Failure
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import load_or_index
from videoadapt.data.video.readers import Indices, VideoReader, open_video
from videoadapt.errors import UserError, VideoError
from videoadapt.evaluation.speed_passes import Replayed
from videoadapt.model.batches import batch_sizes
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.arrivals import Arrival
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.leap_rules import Logistic
from videoadapt.routing.policy import Assigned, Cascade, Fixed, Leap, Policy, Random
from videoadapt.routing.queues import Queues
from videoadapt.routing.router import RoutedVideo, Router, _Flow

COST_S = {"4": 1.0, "3": 0.3, "2": 0.1}  # simulated seconds of a view: tenfold between the ends
START_S = 0.2  # of a pass


def items() -> list[ClipViews]:
    return [ClipViews(views()[n][None], thumbnails()[n][None]) for n in range(CLIPS)]


# By the probability of the first point's class: 4 is right nine times in ten, 3 if it is low, 2 if it is high.
SURE = Logistic((0.0,) * 4, (1.0,) * 4, ((0.0, 0, 0, 0, 2.2), (-10.0, 0, 0, 0, 5.0), (20.0, 0, 0, 0, -9.0)))


def routed(router: Router, source: Iterator[object]) -> list[RoutedVideo]:
    return [result for result in router.stream(source) if isinstance(result, RoutedVideo)]  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize(
    "policy",
    [
        Fixed("3"),
        Assigned(assigner(), CONFIG.points, 0.7),
        Cascade(("2", "3", "4"), (0.4, 0.5)),
        Cascade(("2", "4"), (0.5, 0.6), views=True),
        Leap("2", CONFIG.points, (1.0, 0.5, 0.25), SURE, 0.5),
    ],
    ids=lambda policy: policy.name,
)
@pytest.mark.parametrize("max_wait_s", [None, 0.0, 0.02])
def test_a_stream_gives_each_item_the_result_that_it_has_alone(
    policy: Policy, batch: int, max_wait_s: float | None
) -> None:
    found = routed(Router(model(), policy, batch=batch, max_wait_s=max_wait_s), iter(items()))
    assert [result.item.views.data_ptr() for result in found] == [item.views.data_ptr() for item in items()]
    for result, item in zip(found, items(), strict=True):
        by_itself = Router(model(), policy, batch=1).run([item])
        assert np.array_equal(result.decision.ran, by_itself.decision.ran)
        stop = result.decision.stops[0]
        np.testing.assert_allclose(result.logits[:, :stop], by_itself.logits[:, :stop], atol=1e-5)
    ends = {int(result.decision.end[0]) for result in found}
    assert len(ends) > 1 or isinstance(policy, Fixed)


def test_videos_that_cannot_be_read_keep_their_place_and_their_neighbours_full_batches() -> None:
    failed, broken = Failure(3, "a.mp4", "torn"), VideoError("b.mp4: torn")
    given_items: list[object] = [failed, *items()[:2], broken, *items()[2:], failed]
    sizes: list[int] = []
    handle = model().register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    found = list(Router(model(), Fixed("2"), batch=8).stream(given_items))  # type: ignore[arg-type]
    handle.remove()
    assert found[0] is failed and found[3] is broken and found[-1] is failed and len(found) == CLIPS + 3
    logits = np.concatenate([result.logits for result in found if isinstance(result, RoutedVideo)])
    np.testing.assert_allclose(logits, alone()[:, :, 2], atol=1e-5)
    assert sizes == [8, 8, 6]
    assert list(Router(model(), Fixed("2")).stream([failed, failed])) == [failed, failed]


class SimulatedArrivals:
    """Items that arrive at given times of a clock, which advances while the router waits for them."""

    def __init__(self, times_s: np.ndarray, clock: list[float]) -> None:
        self.times_s, self.clock, self.taken = times_s, clock, 0

    @property
    def ended(self) -> bool:
        return self.taken == len(self.times_s)

    def take(self, most: int, *, least: int, until_s: float) -> list[Arrival]:
        last = min(self.taken + least, len(self.times_s)) - 1
        self.clock[0] = max(self.clock[0], min(self.times_s[last], until_s))
        here = int(np.searchsorted(self.times_s, self.clock[0], side="right"))
        if here <= last:
            return []
        taken = range(self.taken, min(here, self.taken + most))
        self.taken = taken.stop
        return [Arrival(number, views()[number % CLIPS, :1][None], None, self.times_s[number]) for number in taken]


def simulated(times_s: np.ndarray, choice: np.ndarray, max_wait_s: float | None) -> tuple[np.ndarray, list, float]:
    """Runs clips that arrive at given times; a pass takes `START_S` and `COST_S` a view. Returns the latencies."""
    clock, passes = [0.0], []

    def advance(_module: object, inputs: tuple) -> None:
        passes.append((inputs[1], len(inputs[0])))
        clock[0] += START_S + COST_S[inputs[1]] * len(inputs[0])

    handle = model().register_forward_pre_hook(advance)
    router = Router(model(), Replayed(Fixed("4"), choice), batch=8)
    flow = _Flow(router, SimulatedArrivals(times_s, clock), max_wait_s, lambda: clock[0])  # type: ignore[arg-type]
    latencies = np.array([clock[0] - times_s[result.item] for result in flow.results()])  # type: ignore[union-attr]
    handle.remove()
    return latencies, passes, clock[0]


@pytest.mark.parametrize("seed", range(3))
def test_points_of_tenfold_cost_in_random_order_run_within_a_tenth_of_the_ideal_time(seed: int) -> None:
    choice = np.random.default_rng(seed).choice(3, 400, p=[0.1, 0.3, 0.6])
    _, passes, seconds = simulated(np.zeros(400), choice, None)
    counts = Counter(CONFIG.points[point] for point in choice)
    ideal = sum(count * (COST_S[point] + START_S / 8) for point, count in counts.items())  # full batches alone
    assert ideal <= seconds * (1 + 1e-9) and seconds <= 1.1 * ideal
    assert sum(size for _, size in passes) == 400


@pytest.mark.parametrize(("seed", "max_wait_s"), [(0, 2.0), (1, 5.0)])
def test_no_clip_of_a_stream_waits_longer_than_allowed_and_one_batch(seed: int, max_wait_s: float) -> None:
    draw = np.random.default_rng(seed)
    choice = draw.choice(3, 200, p=[0.1, 0.3, 0.6])
    times_s = np.cumsum(draw.exponential(2.0, 200))  # the model is busy for less than half of the time
    latencies, passes, _ = simulated(times_s, choice, max_wait_s)
    assert latencies.max() <= max_wait_s + START_S + 8 * COST_S["4"]
    assert max(size for _, size in passes) > 1  # waiting has an aim


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 10)), max_size=40), st.floats(0, 5))
def test_a_queue_is_ready_when_it_is_full_or_its_oldest_view_is_due(
    added: list[tuple[int, float]], max_wait_s: float
) -> None:
    queues: Queues[int] = Queues({0: 2, 1: 4, 2: 8}, max_wait_s)
    added.sort(key=lambda one: one[1])
    for number, (point, at_s) in enumerate(added):
        queues.add(point, number, at_s)
    counts = Counter(point for point, _ in added)
    full = queues.full()
    assert (full is None) == all(counts[point] < queues.batches[point] for point in counts)
    due_s = min((at_s for _, at_s in added), default=math.inf) + max_wait_s
    assert queues.next_due_s() == due_s
    if added:
        assert queues.due(due_s - 1e-6) is None
        assert queues.due(due_s) is not None
        point = added[0][0]
        queues.passed(point, 1.0)  # a pass of a second must begin a second earlier
        assert queues.next_due_s() == due_s - 1.0
        assert queues.take(point) == [n for n, (other, _) in enumerate(added) if other == point][: 2 << point]


@pytest.mark.parametrize("max_wait_s", [None, 0.0])
def test_a_long_stream_holds_a_bounded_number_of_clips(max_wait_s: float | None) -> None:
    made, clip = 0, views()[0, 0]

    def source() -> Iterator[torch.Tensor]:
        nonlocal made
        for made in range(1, 801):  # noqa: B007 - counted outside
            yield clip

    rare = np.zeros(500, dtype=np.int64) + 2
    rare[7] = 0  # one of 500 clips: its queue never fills
    inside = []
    for number, _ in enumerate(
        Router(model(), Replayed(Fixed("4"), rare), batch=8, max_wait_s=max_wait_s).stream(source())
    ):
        inside.append(made - number)
    assert number == 799 and max(inside) <= 8 * (8 + 2 + 1) + 8  # windows, read ahead, and a group
    assert max(inside) < 120


def test_an_error_of_the_source_follows_the_results_before_it() -> None:
    def source() -> Iterator[ClipViews]:
        yield from items()[:5]
        raise RuntimeError("camera unplugged")

    policy = Cascade(("2", "4"), (0.9,))
    for max_wait_s in (0.0, 1.0, None):  # also where the last clips still wait for a batch
        found = []
        with pytest.raises(RuntimeError, match="camera unplugged"):
            for result in Router(model(), policy, batch=4, max_wait_s=max_wait_s).stream(source()):
                found.append(result)
        assert len(found) == 5  # noqa: PLR2004
    found = []
    with pytest.raises(UserError, match="got torch.float32"):
        for result in Router(model(), policy, batch=4).stream([*views()[:5], views()[0].float()]):
            found.append(result)
    assert len(found) == 5  # noqa: PLR2004


def test_a_run_keeps_no_item_and_so_decodes_data_sets_of_any_size() -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def source() -> Iterator[torch.Tensor]:
        nonlocal most
        for _ in range(200):
            clip = views()[0, 0].clone()
            alive.add(clip)
            most = max(most, len(alive))
            yield clip

    assert len(Router(model(), Fixed("2"), batch=2).run(source()).logits) == 200  # noqa: PLR2004
    assert most < 50  # noqa: PLR2004


def test_a_stream_that_is_left_early_ends_its_thread() -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield views()[0, 0]

    results = Router(model(), Fixed("2"), batch=4).stream(endless())
    next(results)
    results.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while any(thread.name == "videoadapt-source" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_wrong_items_sizes_and_policies_are_refused() -> None:
    router = Router(model(), Fixed("2"))
    with pytest.raises(UserError, match=r"expected uint8 views \(3, 2, 16, 16\).*got torch.float32"):
        router.run([views()[0].float()])
    with pytest.raises(UserError, match="expected tensors, or items with `views`, got str"):
        list(router.stream(["clip.mp4"]))  # type: ignore[list-item]
    with pytest.raises(UserError, match="same number of views in every item, got \\[1, 2\\]"):
        router.run([views()[0], views()[0, :1]])
    with pytest.raises(UserError, match="same number of views in every item, got \\[1, 2\\]"):  # of another group, too
        Router(model(), Fixed("2"), batch=1).run([views()[0], views()[0, :1]])
    for wrong in ({"thumbnails": thumbnails()[:1]}, {"right": np.ones((3, 3), bool)}):
        with pytest.raises(UserError, match="of each of the 2 clips of an item, got [13]"):
            router.run([ClipViews(views()[:2], **wrong)])
    with pytest.raises(UserError, match="depends on all clips; expected Router.run"):
        list(Router(model(), Random((1.0, 0.0, 0.0))).stream(items()))
    with pytest.raises(UserError, match="no clips were given"):
        router.run([])
    with pytest.raises(VideoError, match=r"a\.mp4: torn"):
        router.run([Failure(0, "a.mp4", "torn")])
    with pytest.raises(UserError, match="max_wait_s: expected seconds from 0"):
        Router(model(), Fixed("2"), max_wait_s=-1)
    with pytest.raises(UserError, match="no point 14"):
        batch_sizes(model(), {"14": 2})
    with pytest.raises(UserError, match="numbers from 1"):
        batch_sizes(model(), 0)
    with pytest.raises(UserError, match="expected auto, a number.*'large'"):
        batch_sizes(model(), "large")  # type: ignore[arg-type]


def test_automatic_batches_are_larger_for_cheaper_points() -> None:
    sizes = batch_sizes(TimeSformer(CONFIG.model_copy(update={"width": 96, "heads": 3, "depth": 4, "size": 32})))
    assert sizes["4"] <= sizes["3"] <= sizes["2"]
    assert batch_sizes(model(), {"4": 5})["4"] == 5  # noqa: PLR2004


def test_automatic_batches_of_a_gpu_fit_into_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda", 0), element_size=lambda: 4)  # the weight of a model there
    there: Any = SimpleNamespace(head=SimpleNamespace(weight=gpu), config=CONFIG)
    memory = {"free": 0, "reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (memory["free"], 2**40))
    for name in ("reserved", "allocated"):
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda _device, name=name: memory[name])
    assert set(batch_sizes(there).values()) == {1}  # the least, also where nothing is free
    memory["free"] = 2**24
    some = batch_sizes(there)
    assert 1 < some["4"] < some["2"]
    memory["free"] = 2**25
    assert batch_sizes(there)["4"] // 2 == some["4"]
    memory |= {"free": 0, "reserved": 2**25, "allocated": 2**24}  # torch holds memory that it does not use
    assert batch_sizes(there) == some
    memory["free"] = 2**40
    assert max(batch_sizes(there).values()) == 1024  # noqa: PLR2004 - more would be no faster


def test_views_and_thumbnails_of_an_assigned_video_come_from_one_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = runs.config(runs.make_data(tmp_path / "data"), tmp_path / "run", evaluate={"spatial_crops": 3})
    opened: list[str] = []
    decoded: list[str] = []

    def open_counted(path: Path, *settings: Any, **named: Any) -> VideoReader:
        video = open_video(path, *settings, **named)
        frames = video.frames

        def frames_counted(indices: Indices) -> np.ndarray:
            decoded.append(str(path))
            return frames(indices)

        opened.append(str(path))
        monkeypatch.setattr(video, "frames", frames_counted)
        return video

    manifest = load_or_index(config)
    rows = np.flatnonzero(manifest["split"] == "val").tolist()
    monkeypatch.setattr("videoadapt.data.clips.datasets.open_video", open_counted)
    made = TimeSformer(config.model).eval()
    policy = Assigned(Assigner(config.assign, 3).eval(), config.model.points, 0.5)
    videos = EvalVideos(manifest, config, temporal_views=2, spatial_crops=3)
    found = routed(Router(made, policy), stream(videos, rows))
    assert [result.logits.shape for result in found] == [(2, 3, 12)] * len(rows)
    assert opened == decoded == manifest["path"][rows].tolist()
