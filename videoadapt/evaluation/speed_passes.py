"""Timed passes of policies over the same decoded videos, from which `speed` computes its figures."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from videoadapt.config.load import Config
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.clips.datasets import EvalVideos, Failure
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import Manifest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.decide import clip_macs, views_run
from videoadapt.routing.label_rules import Choice
from videoadapt.routing.policy import NO_STEP, Evidence, Fixed, Policy
from videoadapt.routing.router import Routed, Router
from videoadapt.routing.stage_clock import StageClock
from videoadapt.runtime.console import Bar
from videoadapt.runtime.energy import energy_meter
from videoadapt.runtime.machine import worker_count

_LONGEST_TRY_S = 1.0  # a batch size whose pass takes longer is not doubled


class TimeLimit:
    """The time limit of a measurement, from now on."""

    def __init__(self, limit_s: float) -> None:
        self._start = time.perf_counter()
        self._limit_s = limit_s

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left_s(self) -> float:
        """Seconds until the limit, below 0 after it."""
        return self._limit_s - self.spent_s


@dataclass(frozen=True)
class Pass:
    """One policy over all videos once.

    Attributes:
        seconds: From the decoded videos to the logits on the CPU.
        stages: Seconds by stage, see `StageClock`; `route` is what the others leave of `seconds`.
        cpu_stages: Processor seconds by stage.
        joules: Energy of the device; None if it is not known.
        routed: The decisions.
    """

    seconds: float
    stages: Mapping[str, float]
    cpu_stages: Mapping[str, float]
    joules: float | None
    routed: Routed


@dataclass(frozen=True)
class Bench:
    """What all passes share: the model, decoded videos of K clips each, and the views of a forward pass by point."""

    model: TimeSformer
    items: Sequence[ClipViews]
    batches: Mapping[str, int]
    config: Config

    @property
    def clips(self) -> int:
        """Number of clips."""
        return sum(len(item.views) for item in self.items)

    def router(self, policy: Policy, *, alone: bool = False) -> Router:
        """Returns the router of a policy; `alone` runs view by view."""
        return Router(self.model, policy, batch=1 if alone else self.batches, average=self.config.evaluate.average)

    def run(self, policy: Policy, items: Sequence[ClipViews] | None = None) -> Pass:
        """Runs a policy over all videos, or over the given ones, and times it."""
        router, device = self.router(policy), self.model.head.weight.device
        router.clock = StageClock(device)
        meter = energy_meter(device)
        before_j = meter() if meter else 0.0
        start = time.perf_counter()
        routed = router.run(self.items if items is None else items)  # logits on the CPU: a GPU has finished by then
        seconds, cpu_stages = time.perf_counter() - start, router.clock.cpu_seconds()
        joules = meter() - before_j if meter else None
        stages = router.clock.seconds()
        stages["route"] = max(0.0, seconds - sum(stages.values()))
        return Pass(seconds, stages, cpu_stages, joules, routed)

    def macs(self, policy: Policy, routed: Routed) -> float:
        """Returns the MACs of a pass."""
        clips, crops = self.items[0].views.shape[:2]
        ran = views_run(policy, routed.decision, len(self.model.config.points), clips=clips, crops=crops)
        return float(clip_macs(policy, ran, self.model.config)[0].sum())


class Replayed(Policy):
    """The choices of another pass, in the same order again and again.

    For policies that cannot stream: those that need the truth, or all clips at once.
    """

    def __init__(self, policy: Policy, choice: Choice) -> None:
        self._name, self._choices = policy.name, itertools.cycle(choice.tolist())

    @property
    def name(self) -> str:
        """The name of the policy."""
        return self._name

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Returns the next choices, then `NO_STEP`. Each choice is taken once, in the order of the clips."""
        if (last == NO_STEP).all():
            return np.array([next(self._choices) for _ in range(evidence.count)])
        return np.full(evidence.count, NO_STEP)


def streaming(policy: Policy, routed: Routed) -> Policy:
    """Returns a policy that makes the same choices in a stream."""
    return Replayed(policy, routed.choice) if policy.needs & {"truth", "population"} else policy


def best_batches(bench: Bench, limit: TimeLimit, limit_s: float) -> dict[str, int]:
    """Returns the fastest batch size of each point: that of `bench`, half of it, or multiples of it.

    Args:
        bench: The videos, and the sizes to begin with.
        limit: The time limit of the whole measurement.
        limit_s: Seconds for the search.
    """
    found = dict(bench.batches)
    # View by view, so that the passes of a try are full batches.
    views = [ClipViews(view[None, None]) for item in bench.items for view in item.views.flatten(0, 1)]
    end_s = limit.left_s - limit_s
    for point, size in reversed([*bench.batches.items()]):  # the cheapest first: its best size is the least certain
        best_s = np.inf
        for tried in (size, size // 2, 2 * size, 4 * size):
            if not 0 < tried <= len(views) or limit.left_s < end_s:
                continue
            one = Bench(bench.model, views[:tried], {**bench.batches, point: tried}, bench.config)
            # Twice: the first pass also makes kernels and caches.
            seconds = min(one.run(Fixed(point)).seconds for _ in range(2)) / one.clips
            if seconds < 0.97 * best_s:  # noqa: PLR2004 - a difference that is more than noise
                best_s, found[point] = seconds, tried
            if seconds * one.clips > _LONGEST_TRY_S:
                break
    return found


def interleaved(bench: Bench, policies: Sequence[Policy], rounds: int, limit: TimeLimit) -> list[list[Pass]]:
    """Returns the passes of each policy, one policy after the other until the rounds or the time are over.

    Policies run in turn, so that a slow moment of the machine affects all of them. After its first pass, a policy that
    would wait for all clips repeats its choices, so that copies and passes overlap as those of the others do.
    """
    running = list(policies)
    passes: list[list[Pass]] = [[] for _ in policies]
    with Bar("speed", total=rounds * len(policies), unit="passes") as bar:
        for _ in range(rounds):
            before_s = limit.spent_s
            for number, (policy, done) in enumerate(zip(running, passes, strict=True)):
                if limit.left_s <= 0:
                    return passes
                done.append(bench.run(policy))
                running[number] = streaming(policy, done[0].routed)
                bar.step(1, f"{policy.name}; {bench.clips} clips a pass")
            if limit.left_s < limit.spent_s - before_s:  # the next round would not end in time, and so not count
                break
    return passes


def latencies(bench: Bench, policies: Sequence[Policy], limit: TimeLimit, limit_s: float) -> list[list[float]]:
    """Returns the seconds per clip of each policy, clip by clip at batch 1, the policies in turn within the time."""
    routers = [bench.router(policy, alone=True) for policy in policies]
    found: list[list[float]] = [[] for _ in policies]
    end_s = limit.left_s - limit_s
    for item in [bench.items[0], *bench.items]:
        for router, seconds in zip(routers, found, strict=True):
            start = time.perf_counter()
            router.run([item])
            seconds.append((time.perf_counter() - start) / len(item.views))
        if limit.left_s < end_s:
            break
    # The first pass also makes kernels and caches for batch 1: it counts if there is no other.
    return [seconds[1:] or seconds for seconds in found]


def eval_videos(manifest: Manifest, config: Config, *, thumbnails: bool) -> EvalVideos:
    """Returns the views of an evaluation; thumbnails cost time, and only a policy with an assigner needs them."""
    views, crops = config.evaluate.temporal_views, config.evaluate.spatial_crops
    return EvalVideos(manifest, config, temporal_views=views, spatial_crops=crops, thumbnails=thumbnails)


def end_to_end(
    bench: Bench, policies: Sequence[Policy], manifest: Manifest, rows: Sequence[int], *, limit_s: float
) -> list[list[float]]:
    """Returns clips per second from files to logits, by policy and round, within `limit_s`.

    The time begins when each worker process has decoded a video that does not count, so that neither their start nor
    work before the first video does. With fewer than twice as many videos there is no result.
    """
    found: list[list[float]] = [[] for _ in policies]
    before = max(1, worker_count(bench.config.data.workers))
    if len(rows) < 2 * before:
        return found
    limit = TimeLimit(limit_s)
    videos = [eval_videos(manifest, bench.config, thumbnails=policy.assigner is not None) for policy in policies]
    while limit.left_s > limit.spent_s / max(1, len(found[0])) and len(found[0]) < bench.config.evaluate.speed_repeats:
        for policy, own, speeds in zip(policies, videos, found, strict=True):
            speeds.append(_from_files(bench, policy, own, rows, before))
    return found


def _from_files(bench: Bench, policy: Policy, videos: EvalVideos, rows: Sequence[int], before: int) -> float:
    """Returns clips per second, from the moment when `before` videos have been decoded, which come once more."""
    router, decoded = bench.router(policy), stream(videos, [*rows[:before], *rows])
    for _ in range(before):
        next(decoded)
    start = time.perf_counter()
    count = sum(not isinstance(video, Failure) for video in router.stream(decoded))
    return count * videos.temporal_views / (time.perf_counter() - start)


def seconds_of_points(bench: Bench, limit: TimeLimit, slow: float) -> dict[str, float]:
    """Returns the seconds of one clip at each point; empty if the time does not suffice for that.

    Args:
        bench: The videos; the first one is used.
        limit: The time limit.
        slow: A pass that takes more than this fraction of the time left is not repeated.
    """
    found = {}
    one = bench.items[:1]
    for point in reversed(bench.model.config.points):  # the cheapest first
        if limit.left_s <= 0:
            return {}
        found[point] = bench.run(Fixed(point), one).seconds / len(one[0].views)
        if found[point] < limit.left_s * slow:  # a first pass also makes kernels and caches
            found[point] = bench.run(Fixed(point), one).seconds / len(one[0].views)
    return found
