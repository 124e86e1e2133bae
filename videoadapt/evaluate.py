"""Evaluation of all policies on the val split: accuracy, cost and measured speed, with the population stated."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from videoadapt.assigner import assigner_macs
from videoadapt.checkpoint import assigner_checkpoints
from videoadapt.config import Config
from videoadapt.cost import point_macs
from videoadapt.data.datasets import EvalVideos, VideoViews
from videoadapt.data.loader import stream
from videoadapt.data.manifest import Manifest, load_or_index
from videoadapt.errors import UserError
from videoadapt.intervals import class_means, mean_class_interval, paired_difference, wilson
from videoadapt.labels import Bools, Choice, Floats, softmax
from videoadapt.log import Bar, write_json
from videoadapt.model.timesformer import TimeSformer
from videoadapt.policy import Assigned, Evidence, Fixed, Oracle, Policy, Random, mix_of
from videoadapt.report.tables import write_parquet
from videoadapt.routing import route
from videoadapt.runtime import peak_memory_bytes
from videoadapt.scoring import Scores, inference_model, score

TOP = 5


@dataclass(frozen=True)
class Population:
    """The videos that count: how each is named, its truth, and which of them have scores.

    `scored` are positions among the `videos`; the others failed and count as wrong, or are left out by policy.
    """

    videos: list[str]
    truth: Choice
    scored: Choice
    failed: list[dict[str, str]]


@dataclass(frozen=True)
class Outcome:
    """What one policy did: the point of each clip, and per video the mean of its views' probabilities."""

    policy: Policy
    choice: Choice  # (clips,)
    probabilities: Floats  # (scored videos, classes)
    macs: Floats  # (clips,), all crops, the assigner included


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluates the fixed, assigned, random and oracle policies on the val split.

    Every listed video counts (`evaluate.failed`: as wrong, or left out). Writes `evaluate/` tables per view, clip and
    video (Parquet) and `evaluate/evaluate.json`, which is returned.
    """
    start = time.monotonic()
    manifest = load_or_index(config)
    model = inference_model(config)
    assigned = _assigned(config, model)
    assigner = assigned.assigner if assigned else None
    frame = manifest.table
    rows = np.flatnonzero((frame["split"] == "val") & (frame["status"] == "ok"))
    if not len(rows):
        raise UserError("data.val.annotations: the val split has no readable video; set it, and data.root")
    scores = score(
        model,
        manifest,
        rows.tolist(),
        config,
        name="evaluate",
        temporal_views=config.evaluate.temporal_views,
        assigner=assigner,
    )
    population = _population(manifest, scores)
    right = _right(scores)
    outcomes = [
        _outcome(policy, scores, right, config) for policy in _policies(model.config.points, scores, assigned, config)
    ]
    _write_tables(config, scores, population, outcomes)
    speeds = _speeds(model, manifest, scores, right, outcomes, config)
    summary = {
        "split": "val",
        "manifest": manifest.hash,
        "listed": len(population.videos),
        "scored": len(population.scored),
        "failed": population.failed,
        "failed_count_as": config.evaluate.failed,
        "views_per_video": config.evaluate.temporal_views * config.evaluate.spatial_crops,
        "macs_per_view": point_macs(config.model),
        "assigner_macs": assigner_macs(config.assign, len(model.config.points)) if assigner else None,
        "policies": _policy_rows(outcomes, population, speeds, config),
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_json(config.run.dir / "evaluate" / "evaluate.json", summary)
    return summary


def _assigned(config: Config, model: TimeSformer) -> Assigned | None:
    if assigner_checkpoints(config.run.dir).latest() is None:
        return None
    assigned = Assigned.load(config.run.dir)
    assigned.assigner.to(model.head.weight.device)
    return assigned


def _population(manifest: Manifest, scores: Scores) -> Population:
    """All listed videos of the val split; those that failed at indexing or decoding stay in it, by name and cause."""
    listed = manifest.table[manifest.table["split"] == "val"]
    causes = {row: cause for row, cause in zip(listed.index, listed["cause"], strict=True) if cause}
    causes |= {failure.video: failure.cause for failure in scores.failures}
    position = {row: i for i, row in enumerate(listed.index)}
    return Population(
        videos=listed["video"].tolist(),
        truth=listed["label"].to_numpy(np.int64),
        scored=np.array([position[row] for row in dict.fromkeys(scores.rows.tolist())], dtype=np.int64),
        failed=[{"path": str(listed.loc[row, "path"]), "cause": cause} for row, cause in causes.items()],
    )


def _right(scores: Scores) -> Bools:
    """Whether the model is right on each clip at each point, from the mean over its crops: `(clips, points)`."""
    return softmax(scores.logits).mean(1).argmax(-1) == scores.truth[:, None]


def _policies(points: tuple[str, ...], scores: Scores, assigned: Assigned | None, config: Config) -> list[Policy]:
    policies: list[Policy] = [Fixed(point) for point in points]
    if assigned is not None:
        choice = assigned.choose(Evidence(len(scores.rows), points, scores.assigned))
        policies += [assigned, Random(mix_of(choice, len(points)), config.run.seed)]
    return [*policies, Oracle()]


def _outcome(policy: Policy, scores: Scores, right: Bools, config: Config) -> Outcome:
    points = config.model.points
    clips = len(scores.rows)
    choice = policy.choose(Evidence(clips, points, scores.assigned, right))
    chosen = softmax(scores.logits[np.arange(clips), :, choice]).mean(1)  # (clips, classes)
    _, video = np.unique(scores.rows, return_inverse=True)
    sums = np.zeros((video.max() + 1, chosen.shape[1]))
    np.add.at(sums, video, chosen)
    macs = np.array([point_macs(config.model)[p] for p in points], dtype=np.float64)[choice]
    macs *= config.evaluate.spatial_crops
    if policy.assigner:
        macs += assigner_macs(config.assign, len(points))
    return Outcome(policy, choice, sums / np.bincount(video)[:, None], macs)


def _video_right(outcome: Outcome, population: Population, top: int) -> Bools:
    """Whether the truth is among the `top` classes, for all listed videos; a failed one is wrong."""
    right = np.zeros(len(population.videos), dtype=bool)
    truth = population.truth[population.scored]
    best = np.argsort(-outcome.probabilities, axis=1, kind="stable")[:, :top]
    right[population.scored] = (best == truth[:, None]).any(1)
    return right


def _policy_rows(
    outcomes: list[Outcome], population: Population, speeds: dict[str, float], config: Config
) -> dict[str, dict[str, Any]]:
    counted = np.arange(len(population.videos)) if config.evaluate.failed == "wrong" else population.scored
    costliest = _video_right(outcomes[0], population, 1)
    rows = {}
    for outcome in outcomes:
        all_right = _video_right(outcome, population, 1)
        right, truth = all_right[counted], population.truth[counted]
        top5 = _video_right(outcome, population, min(TOP, config.model.num_classes))[counted]
        low, high = wilson(int(right.sum()), len(right))
        low5, high5 = wilson(int(top5.sum()), len(top5))
        class_low, class_high = mean_class_interval(right, truth)
        difference = paired_difference(right, costliest[counted])
        model_macs = outcome.macs - (
            assigner_macs(config.assign, len(config.model.points)) if outcome.policy.assigner else 0
        )
        views = config.evaluate.spatial_crops
        rows[outcome.policy.name] = {
            "top1": float(right.mean()),
            "top1_low": low,
            "top1_high": high,
            "top1_readable": float(all_right[population.scored].mean()),
            "top5": float(top5.mean()),
            "top5_low": low5,
            "top5_high": high5,
            "mean_class": float(class_means(right, truth).mean()),
            "mean_class_low": class_low,
            "mean_class_high": class_high,
            "difference_to_costliest": list(difference),
            "macs_per_view": float(outcome.macs.mean() / views),
            "macs_per_view_without_assigner": float(model_macs.mean() / views),
            "macs_per_clip": float(outcome.macs.mean()),
            "macs_per_video": float(outcome.macs.sum() / max(len(population.scored), 1)),
            "macs_per_video_without_assigner": float(model_macs.sum() / max(len(population.scored), 1)),
            "macs_saved": float(1 - outcome.macs.mean() / outcomes[0].macs.mean()),
            "mix": dict(zip(config.model.points, mix_of(outcome.choice, len(config.model.points)), strict=True)),
            "clips_per_s": speeds.get(outcome.policy.name),
        }
    if "random" in rows:
        assigned = next(o for o in outcomes if o.policy.name == "assigned")
        shuffled = next(o for o in outcomes if o.policy.name == "random")
        pair = [_video_right(o, population, 1)[counted] for o in (assigned, shuffled)]
        rows["assigned"]["difference_to_random"] = list(paired_difference(*pair))
    return rows


def _write_tables(config: Config, scores: Scores, population: Population, outcomes: list[Outcome]) -> None:
    """Per view and point, per clip and policy, per video and policy."""
    points, folder = config.model.points, config.run.dir / "evaluate"
    names = {row: population.videos[position] for row, position in zip(dict.fromkeys(scores.rows.tolist()), population.scored, strict=True)}
    videos = np.array([names[row] for row in scores.rows], dtype=object)
    clips, crops = scores.logits.shape[:2]
    probabilities = softmax(scores.logits)  # (clips, crops, points, classes)
    p_true = np.take_along_axis(probabilities, scores.truth[:, None, None, None], axis=3)
    size = crops * len(points)
    views = pd.DataFrame(
        {
            "video": np.repeat(videos, size),
            "clip": np.repeat(scores.clips, size),
            "crop": np.tile(np.repeat(np.arange(crops), len(points)), clips),
            "point": np.tile(np.array(points, dtype=object), clips * crops),
            "truth": np.repeat(scores.truth, size),
            "prediction": probabilities.argmax(-1).ravel(),
            "p_true": p_true.ravel(),
        }
    )
    write_parquet(folder / "views.parquet", views)
    clip_tables, video_tables = [], []
    for outcome in outcomes:
        clip_tables.append(
            pd.DataFrame(
                {
                    "policy": outcome.policy.name,
                    "video": videos,
                    "clip": scores.clips,
                    "start_s": scores.starts_s,
                    "truth": scores.truth,
                    "point": np.array(points, dtype=object)[outcome.choice],
                    "macs": outcome.macs,
                }
            )
        )
        prediction = np.full(len(population.videos), -1)
        prediction[population.scored] = outcome.probabilities.argmax(-1)
        macs = np.zeros(len(population.videos))
        macs[population.scored] = clip_tables[-1].groupby("video", sort=False)["macs"].sum().to_numpy()
        video_tables.append(
            pd.DataFrame(
                {
                    "policy": outcome.policy.name,
                    "video": population.videos,
                    "truth": population.truth,
                    "prediction": prediction,
                    "right": prediction == population.truth,
                    "failed": prediction < 0,
                    "macs": macs,
                }
            )
        )
    write_parquet(folder / "clips.parquet", pd.concat(clip_tables))
    write_parquet(folder / "videos.parquet", pd.concat(video_tables))


def _speeds(
    model: TimeSformer,
    manifest: Manifest,
    scores: Scores,
    right: Bools,
    outcomes: list[Outcome],
    config: Config,
) -> dict[str, float]:
    """Clips per second of each policy on the same random clips, decoded beforehand: assigner, routing and model.

    Policies take turns, and the median of `evaluate.speed_repeats` rounds counts, after one round to warm up.
    """
    count = min(config.evaluate.speed_clips, len(scores.rows))
    if not count:
        return {}
    drawn = np.sort(np.random.default_rng(config.run.seed).permutation(len(scores.rows))[:count])
    views, thumbnails = _decoded(manifest, scores, drawn, config)
    seconds: dict[str, list[float]] = {outcome.policy.name: [] for outcome in outcomes}
    rounds = config.evaluate.speed_repeats + 1
    with Bar("speed", total=rounds * len(outcomes), unit="passes") as bar:
        for _ in range(rounds):
            for outcome in outcomes:
                start = time.perf_counter()
                route(
                    model,
                    views,
                    outcome.policy,
                    batch=config.evaluate.batch,
                    thumbnails=thumbnails,
                    right=right[drawn],
                )
                seconds[outcome.policy.name].append(time.perf_counter() - start)
                bar.step(1, outcome.policy.name)
    return {name: count / float(np.median(times[1:])) for name, times in seconds.items()}


def _decoded(
    manifest: Manifest, scores: Scores, drawn: Choice, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views and thumbnails of some of the scored clips, `(clips, crops, ...)` and `(clips, ...)`."""
    dataset = EvalVideos(
        manifest,
        config,
        temporal_views=config.evaluate.temporal_views,
        spatial_crops=config.evaluate.spatial_crops,
    )
    rows = list(dict.fromkeys(scores.rows[drawn].tolist()))
    read = stream(dataset, rows, workers=config.data.workers, timeout_s=config.data.timeout_s)
    videos = {video.video: video for video in read if isinstance(video, VideoViews)}
    wanted = [(videos[row], clip) for row, clip in zip(scores.rows[drawn], scores.clips[drawn], strict=True)]
    return torch.stack([v.views[c] for v, c in wanted]), torch.stack([v.thumbnails[c] for v, c in wanted])
