"""The measured cost of policies: speed, latency, time by stage and energy, within a time limit.

The result is kept beside the scores.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videoadapt.config.load import Config
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError, UserError
from videoadapt.evaluation.intervals import median_interval
from videoadapt.evaluation.outcomes import Outcome
from videoadapt.evaluation.speed_passes import (
    Bench,
    Pass,
    TimeLimit,
    best_batches,
    end_to_end,
    eval_videos,
    interleaved,
    latencies,
    seconds_of_points,
    streaming,
)
from videoadapt.model.batches import batch_sizes
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.label_rules import Choice, Interval
from videoadapt.routing.policy import Policy, Random, mix_of
from videoadapt.routing.scores import Scores
from videoadapt.runtime.console import say
from videoadapt.runtime.files import read_json, write_json
from videoadapt.runtime.machine import device_name, versions

_DECODING = 1 / 3  # of the time limit: the rest is for the passes
_SLOW = 1 / 20  # a pass of one clip that takes more of the time left is not repeated
_FIRST_ROUND = 1 / 4  # of the time left: its duration is an estimate, and each policy must have its pass in time
_SEARCH = 1 / 10  # of the time left, for batch sizes
_LATENCY = 1 / 10  # of the time left, for clips one by one
_FILES = 1 / 3  # of the time left, for the rounds from files to logits
STAGES = ("decode", "preprocess", "transfer", "assign", "route", "model")


@dataclass(frozen=True)
class PolicySpeed:
    """The measured cost of one policy. The names are keys of `evaluate.json`; None: the time did not suffice.

    The middle value of each interval is the median over rounds.
    """

    clips_per_s: float  # decoded clips to logits on the CPU
    end_to_end_clips_per_s: float | None  # files to logits
    speedup: Interval  # time of the fixed costliest point in the same round / time of this policy
    macs_ratio: float  # MACs of the fixed costliest point / MACs of this policy, on the measured clips
    routed_efficiency: Interval  # speedup / macs_ratio
    end_to_end_efficiency: Interval | None  # the same from files to logits
    p50_ms: float | None  # of a clip alone, at batch 1
    p95_ms: float | None
    stages_s: dict[str, float]  # seconds per clip; on a GPU its own time for `STAGES` but `decode` and `route`
    stages_cpu_s: dict[str, float]  # processor seconds per clip for `STAGES`; see `StageClock.cpu_seconds`
    joules_per_clip: float | None  # of the GPU, or of the CPU sockets; None where the machine does not tell it
    batches: dict[str, int]  # views of a forward pass, by point


@dataclass(frozen=True)
class Speed:
    """What was measured, and the result. The names are keys of `evaluate.json`."""

    clips_per_s: dict[str, float]  # by policy; a policy that had no pass in time is missing
    policies: dict[str, PolicySpeed]  # more of these policies
    clips: int  # measured clips; each policy runs all of them in a pass
    clips_wanted: int  # `evaluate.speed_clips`, or all clips if there are fewer
    rounds: int  # rounds that count; the median of their times is the result
    file_rounds: int  # of those from files to logits
    seconds: float  # duration of the measurement, with decoding
    limit_s: float  # `evaluate.speed_seconds`
    date: str
    measured: dict[str, Any]  # what the result depends on, beside the scores; see `_measured`


def measure_speed(
    model: TimeSformer, manifest: Manifest, scores: Scores, outcomes: Sequence[Outcome], config: Config
) -> Speed | None:
    """Measures the cost of each policy on the same random videos.

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
    videos = np.unique(scores.rows)  # a policy may need all clips of a video
    count = min(-(-limits.speed_clips // scores.clips_per_video), len(videos))
    if not count or not limits.speed_seconds:
        return None
    drawn = np.random.default_rng(config.run.seed).permutation(videos)[:count]
    file = scores.files[0].with_name("speed.json")
    measured = _measured(model, scores, drawn, outcomes, config)
    kept = _kept(file, measured)
    if kept is not None:
        return kept
    speed = _measure(model, manifest, scores, drawn, outcomes, config=config, measured=measured)
    if len(speed.policies) == len(outcomes):  # otherwise the next call, whose files are in memory, may have more time
        write_json(file, asdict(speed))
    return speed


def _measured(
    model: TimeSformer, scores: Scores, drawn: Choice, outcomes: Sequence[Outcome], config: Config
) -> dict[str, Any]:
    """Returns what a measurement depends on. Weights, views and assigner are in the name of the scores' folder."""
    weight, limits = model.head.weight, config.evaluate
    return {
        "device": device_name(weight.device),
        "threads": torch.get_num_threads(),
        **versions(("videoadapt", "torch")),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "batch": limits.batch,
        "workers": config.data.workers,  # of the rounds from files
        "limits": [limits.speed_seconds, limits.speed_clips, limits.speed_repeats],
        "drawn": drawn.tolist(),
        # The views of the drawn clips at each point: a name does not contain fitted thresholds.
        "policies": {o.policy.name: o.ran[np.isin(scores.rows, drawn)].tolist() for o in outcomes},
    }


def _kept(file: Path, measured: Mapping[str, Any]) -> Speed | None:
    """Returns an earlier result that measured the same; None, with a message, if it is damaged."""
    if not file.exists():
        return None
    try:
        content = read_json(file, "the speed is measured again", list(Speed.__dataclass_fields__))
        rows = {name: PolicySpeed(**row) for name, row in content["policies"].items()}
        speed = Speed(**content | {"policies": rows})
    except (UserError, TypeError) as error:
        say(str(error))
        return None
    if speed.measured != measured:
        return None
    say(f"speed: kept from {speed.date}; without {file} it is measured again")
    return speed


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
    limit = TimeLimit(config.evaluate.speed_seconds)
    videos = eval_videos(manifest, config, thumbnails=any(outcome.policy.assigner for outcome in outcomes))
    items, cpu_s = _decoded(videos, scores, drawn, limit)
    clips = len(items) * scores.clips_per_video
    decode_s = limit.spent_s / clips, cpu_s / clips
    bench = Bench(model, items, batch_sizes(model, config.evaluate.batch), config)
    bench = _within_time(bench, scores, outcomes, drawn, limit)
    policies, rows = _on_these(scores, outcomes, drawn[: len(bench.items)]), drawn[: len(bench.items)].tolist()
    passes: list[list[Pass]] = [[] for _ in policies]
    alone: list[list[float]] = [[] for _ in policies]  # seconds of clips
    files: list[list[float]] = [[] for _ in policies]  # clips per second
    if bench.items:
        latency_s, files_s = limit.left_s * _LATENCY, limit.left_s * _FILES
        rounds_limit = TimeLimit(limit.left_s - latency_s - files_s)
        passes = interleaved(bench, policies, config.evaluate.speed_repeats + 1, rounds_limit)
        # The first round warms up: it counts if there is no other. Only whole rounds count, if there is one.
        whole = min(map(len, passes))
        passes = [done[1:whole] or done[:1] for done in passes]
        if all(passes) and limit.left_s > 0:
            alone = latencies(bench, _streaming(policies, passes), limit, latency_s)
            files = end_to_end(bench, _streaming(policies, passes), manifest, rows, limit_s=files_s)
    found = {
        policy.name: _figures(
            bench, (policy, policies[0]), (done, passes[0]), (speeds, files[0]), alone_s=clip_s, decode_s=decode_s
        )
        for policy, done, clip_s, speeds in zip(policies, passes, alone, files, strict=True)
        if done
    }
    return Speed(
        clips_per_s={name: figures.clips_per_s for name, figures in found.items()},
        policies=found,
        clips=bench.clips,
        clips_wanted=len(drawn) * scores.clips_per_video,
        rounds=max(map(len, passes)),
        file_rounds=len(files[0]),
        seconds=round(limit.spent_s, 1),
        limit_s=config.evaluate.speed_seconds,
        date=datetime.date.today().isoformat(),
        measured=measured,
    )


def _within_time(bench: Bench, scores: Scores, outcomes: Sequence[Outcome], drawn: Choice, limit: TimeLimit) -> Bench:
    """Returns the bench with as many videos as a first round can take, none if there is no time, and batch sizes."""
    point_s = seconds_of_points(bench, limit, _SLOW)
    if not point_s:
        return replace(bench, items=[])
    costs = np.array([point_s[point] for point in bench.model.config.points])
    crops = outcomes[0].ran.max()  # the first policy is a fixed point
    seconds = np.zeros(len(bench.items))
    for number, row in enumerate(drawn[: len(bench.items)].tolist()):
        # Views that ran at each point, in units of all crops of a clip.
        seconds[number] = sum((o.ran[scores.rows == row] @ costs).sum() / crops for o in outcomes)
    fitting = np.searchsorted(np.cumsum(seconds), limit.left_s * _FIRST_ROUND, side="right")
    bench = replace(bench, items=bench.items[: max(1, int(fitting))])
    if bench.config.evaluate.batch == "auto":
        bench = replace(bench, batches=best_batches(bench, limit, limit.left_s * _SEARCH))
    return bench


def _on_these(scores: Scores, outcomes: Sequence[Outcome], drawn: Choice) -> list[Policy]:
    """Returns the policies; those that copy another one's mix copy it as it is on these videos."""
    here = {o.policy.name: o.choice[np.isin(scores.rows, drawn)] for o in outcomes}
    return [
        replace(policy, mix=mix_of(here[policy.imitates], len(policy.mix)))
        if isinstance(policy, Random) and policy.imitates
        else policy
        for policy in (outcome.policy for outcome in outcomes)
    ]


def _streaming(policies: Sequence[Policy], passes: Sequence[Sequence[Pass]]) -> list[Policy]:
    return [streaming(policy, done[-1].routed) for policy, done in zip(policies, passes, strict=True)]


def _figures(
    bench: Bench,
    policies: tuple[Policy, Policy],
    passes: tuple[Sequence[Pass], Sequence[Pass]],
    files: tuple[Sequence[float], Sequence[float]],
    *,
    alone_s: Sequence[float],
    decode_s: tuple[float, float],
) -> PolicySpeed:
    """Returns the figures of a policy.

    Args:
        bench: The measured videos.
        policies: The policy, and the fixed costliest point.
        passes: The passes of both, in the same rounds.
        files: Clips per second from files to logits of both, in the same rounds.
        alone_s: Seconds of each clip of the policy alone.
        decode_s: Seconds of decoding a clip, on the wall clock and of processors.
    """
    own, reference = passes
    ratio = bench.macs(policies[1], reference[-1].routed) / bench.macs(policies[0], own[-1].routed)
    speedup = median_interval([b.seconds / a.seconds for a, b in zip(own, reference, strict=False)])
    from_files = [a / b / ratio for a, b in zip(*files, strict=True)]
    median_s = float(np.median([done.seconds for done in own]))
    joules = [done.joules for done in own if done.joules is not None]
    p50, p95 = np.quantile(alone_s, [0.5, 0.95]).tolist() if len(alone_s) else (None, None)
    low, high = speedup[1] / ratio, speedup[2] / ratio
    return PolicySpeed(
        clips_per_s=bench.clips / median_s,
        end_to_end_clips_per_s=float(np.median(files[0])) if len(files[0]) else None,
        speedup=speedup,
        macs_ratio=ratio,
        routed_efficiency=(speedup[0] / ratio, low, high),
        end_to_end_efficiency=median_interval(from_files) if from_files else None,
        p50_ms=None if p50 is None else 1000 * p50,
        p95_ms=None if p95 is None else 1000 * p95,
        stages_s=_stages(bench, [done.stages for done in own], decode_s[0]),
        stages_cpu_s=_stages(bench, [done.cpu_stages for done in own], decode_s[1]),
        joules_per_clip=float(np.mean(joules)) / bench.clips if joules else None,
        batches=dict(bench.batches),
    )


def _stages(bench: Bench, stages: Sequence[Mapping[str, float]], decode_s: float) -> dict[str, float]:
    """Returns the mean seconds per clip by stage."""
    clips = len(stages) * bench.clips
    return {stage: sum(one.get(stage, 0.0) for one in stages) / clips for stage in STAGES} | {"decode": decode_s}


def _decoded(videos: EvalVideos, scores: Scores, drawn: Choice, limit: TimeLimit) -> tuple[list[ClipViews], float]:
    """Decodes the drawn videos in their order, at least one, until its fraction of the time is over.

    Returns:
        The videos, and the processor seconds of decoding them.
    """
    end_s = limit.left_s * (1 - _DECODING)
    items, cpu_s = [], 0.0
    for row, video in zip(drawn.tolist(), stream(videos, drawn.tolist()), strict=True):
        if not isinstance(video, VideoViews):
            raise RunError(
                f"evaluate: {videos.manifest.row(row).path} was readable when it was scored, and cannot be read now, "
                "so that the speed cannot be measured; bring it back, or set evaluate.speed_seconds=0"
            )
        items.append(ClipViews(video.views, video.thumbnails, scores.right[scores.rows == row]))
        cpu_s += video.cpu_s
        if limit.left_s < end_s:
            break
    return items, cpu_s
