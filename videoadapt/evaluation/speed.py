"""The speed of policies in clips per second, measured within a time limit and kept beside the scores."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError, UserError
from videoadapt.evaluation.outcomes import Outcome
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.label_rules import Bools, Choice
from videoadapt.routing.policy import Fixed, Policy
from videoadapt.routing.router import Router
from videoadapt.routing.scores import Scores
from videoadapt.runtime.console import Bar, say
from videoadapt.runtime.files import read_json, write_json
from videoadapt.runtime.machine import device_name

_DECODING = 1 / 3  # of the time limit: the rest is for the passes
_SLOW = 20  # a pass of one clip that takes 1 / _SLOW of the time left is not repeated
_FIRST_ROUND = 1 / 2  # of the time left: its duration is an estimate, and each policy must have its pass in time


@dataclass(frozen=True)
class Speed:
    """What was measured, and the result. The names are keys of `evaluate.json`."""

    clips_per_s: dict[str, float]  # by policy; a policy that had no pass in time is missing
    clips: int  # measured clips; each policy runs all of them in a pass
    clips_wanted: int  # `evaluate.speed_clips`, or all clips if there are fewer
    rounds: int  # rounds that count; the median of their times is the result
    seconds: float  # duration of the measurement, with decoding
    limit_s: float  # `evaluate.speed_seconds`
    date: str
    measured: dict[str, Any]  # what the result depends on, beside the scores; see `_measured`


def measure_speed(
    model: TimeSformer, manifest: Manifest, scores: Scores, outcomes: Sequence[Outcome], config: Config
) -> Speed | None:
    """Measures each policy's clips per second on the same random clips: assigner, routing and model, without decoding.

    A result of an earlier call is used again, if it measured the same: it lies beside the scores, as `speed.json`.

    Args:
        model: The model, on its device.
        manifest: The videos.
        scores: The scores of all clips.
        outcomes: The outcomes of all policies on them.
        config: The run's config; `evaluate.speed_*` are the limits.

    Returns:
        The result; None if a limit is 0.

    Raises:
        RunError: A video could be read while it was scored, and cannot be read now.
    """
    limits = config.evaluate
    count = min(limits.speed_clips, len(scores.rows))
    if not count or not limits.speed_seconds:
        return None
    outcomes = [outcome for outcome in outcomes if outcome.policy.unit == "clip"]  # the drawn clips are no videos
    drawn = np.random.default_rng(config.run.seed).permutation(len(scores.rows))[:count]
    file = scores.files[0].with_name("speed.json")
    measured = _measured(model, drawn, outcomes, config)
    kept = _kept(file, measured)
    if kept is not None:
        return kept
    speed = _measure(model, manifest, scores, drawn, outcomes, config=config, measured=measured)
    write_json(file, asdict(speed))
    return speed


def _measured(model: TimeSformer, drawn: Choice, outcomes: Sequence[Outcome], config: Config) -> dict[str, Any]:
    """Returns what a measurement depends on. Weights, views and assigner are in the name of the scores' folder."""
    weight, limits = model.head.weight, config.evaluate
    return {
        "device": device_name(weight.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "batch": limits.batch,
        "limits": [limits.speed_seconds, limits.speed_clips, limits.speed_repeats],
        "drawn": drawn.tolist(),
        # The points of the drawn clips: a name does not contain fitted thresholds.
        "policies": {outcome.policy.name: outcome.choice[drawn].tolist() for outcome in outcomes},
    }


def _kept(file: Path, measured: Mapping[str, Any]) -> Speed | None:
    """Returns an earlier result that measured the same; None, with a message, if it is damaged."""
    if not file.exists():
        return None
    try:
        speed = Speed(**read_json(file, "the speed is measured again", list(Speed.__dataclass_fields__)))
    except (UserError, TypeError) as error:
        say(str(error))
        return None
    if speed.measured != measured:
        return None
    say(f"speed: kept from {speed.date}; without {file} it is measured again")
    return speed


class _Clock:
    """The time limit of a measurement, from now on."""

    def __init__(self, limit_s: float) -> None:
        self._start = time.perf_counter()
        self._limit_s = limit_s

    @property
    def spent_s(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left_s(self) -> float:
        return self._limit_s - self.spent_s


@dataclass(frozen=True)
class _Clips:
    """The decoded clips of a measurement; each field has one entry per clip."""

    rows: Choice  # positions among the scored clips
    views: Tensor  # uint8 (clips, crops, C, T, S, S)
    thumbnails: Tensor  # uint8 (clips, C, A, s, s)
    right: Bools  # (clips, points)

    def first(self, count: int) -> _Clips:
        return _Clips(self.rows[:count], self.views[:count], self.thumbnails[:count], self.right[:count])


def _measure(
    model: TimeSformer,
    manifest: Manifest,
    scores: Scores,
    drawn: Choice,
    outcomes: Sequence[Outcome],
    *,
    config: Config,
    measured: dict[str, Any],
) -> Speed:
    limits, clock = config.evaluate, _Clock(config.evaluate.speed_seconds)
    decoded = _decoded(manifest, scores, drawn, config, clock)
    point_s = _seconds_of_points(model, decoded.first(1), config, clock)
    clips = (
        decoded.first(_clip_count(outcomes, decoded.rows, point_s, model.config.points, clock))
        if point_s
        else decoded.first(0)
    )
    times = _rounds(model, clips, outcomes, config, clock) if point_s else [[] for _ in outcomes]
    # The first round warms up: it counts if there is no other. Only whole rounds count, if there is one.
    counted = [passes[1 : min(map(len, times))] or passes for passes in times]
    count = len(clips.rows)
    return Speed(
        clips_per_s={
            o.policy.name: count / float(np.median(passes))
            for o, passes in zip(outcomes, counted, strict=True)
            if passes
        },
        clips=count,
        clips_wanted=len(drawn),
        rounds=max(map(len, counted)),
        seconds=round(clock.spent_s, 1),
        limit_s=limits.speed_seconds,
        date=datetime.date.today().isoformat(),
        measured=measured,
    )


def _rounds(
    model: TimeSformer, clips: _Clips, outcomes: Sequence[Outcome], config: Config, clock: _Clock
) -> list[list[float]]:
    """Returns the seconds of each policy's passes, one policy after the other until the rounds or the time are over.

    Policies run in turn, so that a slow moment of the machine affects all of them.
    """
    times: list[list[float]] = [[] for _ in outcomes]
    rounds = config.evaluate.speed_repeats + 1
    with Bar("speed", total=rounds * len(outcomes), unit="passes") as bar:
        for _ in range(rounds):
            before_s = clock.spent_s
            for outcome, passes in zip(outcomes, times, strict=True):
                if clock.left_s <= 0:
                    return times
                passes.append(_pass_s(model, clips, outcome.policy, config))
                bar.step(1, f"{outcome.policy.name}; {len(clips.rows)} clips a pass")
            if clock.left_s < clock.spent_s - before_s:  # the next round would not end in time, and so not count
                break
    return times


def _pass_s(model: TimeSformer, clips: _Clips, policy: Policy, config: Config) -> float:
    """Returns the seconds in which a policy runs all clips once."""
    router = Router(model, policy, batch=config.evaluate.batch, average=config.evaluate.average)
    start = time.perf_counter()
    # Returns logits on the CPU, so that a GPU has finished by then.
    router.run(clips.views, thumbnails=clips.thumbnails, right=clips.right)
    return time.perf_counter() - start


def _seconds_of_points(model: TimeSformer, clip: _Clips, config: Config, clock: _Clock) -> dict[str, float]:
    """Returns the seconds of one clip at each point; empty if the time does not suffice for that."""
    found = {}
    for point in reversed(model.config.points):  # the cheapest first
        if clock.left_s <= 0:
            return {}
        found[point] = _pass_s(model, clip, Fixed(point), config)
        if found[point] < clock.left_s / _SLOW:  # a first pass also makes kernels and caches
            found[point] = _pass_s(model, clip, Fixed(point), config)
    return found


def _clip_count(
    outcomes: Sequence[Outcome], rows: Choice, point_s: Mapping[str, float], points: Sequence[str], clock: _Clock
) -> int:
    """Returns how many of the decoded clips a first round can take."""
    # Of each clip, over all policies: views that ran at each point, in units of all crops of a clip.
    crops = outcomes[0].ran.max()  # the first policy is a fixed point
    seconds = sum(o.ran[rows] @ np.array([point_s[point] for point in points]) / crops for o in outcomes)
    fitting = np.searchsorted(np.cumsum(seconds), clock.left_s * _FIRST_ROUND, side="right")
    return max(1, int(fitting))


def _decoded(manifest: Manifest, scores: Scores, drawn: Choice, config: Config, clock: _Clock) -> _Clips:
    """Decodes the drawn clips in their order, at least one, until its fraction of the time is over."""
    dataset = EvalVideos(
        manifest,
        config,
        temporal_views=config.evaluate.temporal_views,
        spatial_crops=config.evaluate.spatial_crops,
    )
    wanted: dict[int, list[int]] = {}  # the drawn clips by manifest row: each video is decoded once
    for number in drawn.tolist():
        wanted.setdefault(int(scores.rows[number]), []).append(number)
    end_s = clock.left_s * (1 - _DECODING)
    rows: list[int] = []
    views, thumbnails = [], []
    for row, video in zip(wanted, stream(dataset, list(wanted)), strict=True):
        if not isinstance(video, VideoViews):
            raise RunError(
                f"evaluate: {manifest.row(row).path} was readable when it was scored, and cannot be read now; run "
                "`evaluate` again"
            )
        rows += wanted[row]
        views += [video.views[clip] for clip in scores.clips[wanted[row]]]
        thumbnails += [video.thumbnails[clip] for clip in scores.clips[wanted[row]]]
        if clock.left_s < end_s:
            break
    return _Clips(np.array(rows), torch.stack(views), torch.stack(thumbnails), scores.right[rows])
