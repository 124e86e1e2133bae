"""From what policies did to what is reported of them: accuracies with intervals, costs, and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.assigner import assigner_macs
from videoadapt.config import Config
from videoadapt.intervals import class_means, mean_class_interval, paired_difference, wilson
from videoadapt.labels import Bools, Choice, Floats, softmax
from videoadapt.policy import Policy, mix_of
from videoadapt.report.tables import write_parquet
from videoadapt.scoring import Scores

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


def policy_rows(
    outcomes: list[Outcome], population: Population, speeds: dict[str, float], config: Config
) -> dict[str, dict[str, Any]]:
    """The figures of each policy, by name; the first outcome is the fixed costliest point."""
    counted = np.arange(len(population.videos)) if config.evaluate.failed == "wrong" else population.scored
    rows = {}
    for outcome in outcomes:
        row: dict[str, Any] = dict(_accuracies(outcome, population, counted, config))
        row["difference_to_costliest"] = _difference(outcome, outcomes[0], population, counted)
        row |= _costs(outcome, population, config)
        row["macs_saved"] = float(1 - outcome.macs.mean() / outcomes[0].macs.mean())
        row["mix"] = dict(zip(config.model.points, mix_of(outcome.choice, len(config.model.points)), strict=True))
        row["clips_per_s"] = speeds.get(outcome.policy.name)
        rows[outcome.policy.name] = row
    by_name = {outcome.policy.name: outcome for outcome in outcomes}
    if "random" in rows:
        rows["assigned"]["difference_to_random"] = _difference(
            by_name["assigned"], by_name["random"], population, counted
        )
    return rows


def _accuracies(outcome: Outcome, population: Population, counted: Choice, config: Config) -> dict[str, float]:
    all_right = _video_right(outcome, population, 1)
    right, truth = all_right[counted], population.truth[counted]
    top5 = _video_right(outcome, population, min(TOP, config.model.num_classes))[counted]
    low, high = wilson(int(right.sum()), len(right))
    low5, high5 = wilson(int(top5.sum()), len(top5))
    class_low, class_high = mean_class_interval(right, truth)
    return {
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
    }


def _costs(outcome: Outcome, population: Population, config: Config) -> dict[str, float]:
    paid = assigner_macs(config.assign, len(config.model.points)) if outcome.policy.assigner else 0
    model, crops, videos = outcome.macs - paid, config.evaluate.spatial_crops, max(len(population.scored), 1)
    return {
        "macs_per_view": float(outcome.macs.mean() / crops),
        "macs_per_view_without_assigner": float(model.mean() / crops),
        "macs_per_clip": float(outcome.macs.mean()),
        "macs_per_video": float(outcome.macs.sum() / videos),
        "macs_per_video_without_assigner": float(model.sum() / videos),
    }


def _difference(a: Outcome, b: Outcome, population: Population, counted: Choice) -> list[float]:
    """Top-1 of a minus b on the same videos, with its interval."""
    if a is b:
        return [0.0, 0.0, 0.0]
    return list(paired_difference(_video_right(a, population, 1)[counted], _video_right(b, population, 1)[counted]))


def _video_right(outcome: Outcome, population: Population, top: int) -> Bools:
    """Whether the truth is among the `top` classes, for all listed videos; a failed one is wrong."""
    right = np.zeros(len(population.videos), dtype=bool)
    truth = population.truth[population.scored]
    best = np.argsort(-outcome.probabilities, axis=1, kind="stable")[:, :top]
    right[population.scored] = (best == truth[:, None]).any(1)
    return right


def write_tables(config: Config, scores: Scores, population: Population, outcomes: list[Outcome]) -> None:
    """`views.parquet` per view and point; `clips.parquet` and `videos.parquet` per policy."""
    folder = config.run.dir / "evaluate"
    scored = zip(dict.fromkeys(scores.rows.tolist()), population.scored, strict=True)
    names = {row: population.videos[position] for row, position in scored}
    videos = np.array([names[row] for row in scores.rows], dtype=object)
    write_parquet(folder / "views.parquet", _view_table(scores, videos, config.model.points))
    clips = [_clip_table(outcome, scores, videos, config.model.points) for outcome in outcomes]
    write_parquet(folder / "clips.parquet", pd.concat(clips))
    write_parquet(folder / "videos.parquet", pd.concat(_video_table(o, population, videos) for o in outcomes))


def _view_table(scores: Scores, videos: Any, points: tuple[str, ...]) -> pd.DataFrame:
    clips, crops = scores.logits.shape[:2]
    probabilities = softmax(scores.logits)  # (clips, crops, points, classes)
    p_true = np.take_along_axis(probabilities, scores.truth[:, None, None, None], axis=3)
    size = crops * len(points)
    return pd.DataFrame(
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


def _clip_table(outcome: Outcome, scores: Scores, videos: Any, points: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame(
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


def _video_table(outcome: Outcome, population: Population, videos: Any) -> pd.DataFrame:
    """All listed videos; one that failed has prediction -1 and cost 0."""
    prediction = np.full(len(population.videos), -1)
    prediction[population.scored] = outcome.probabilities.argmax(-1)
    macs = pd.Series(outcome.macs).groupby(videos).sum().reindex(population.videos, fill_value=0.0)
    return pd.DataFrame(
        {
            "policy": outcome.policy.name,
            "video": population.videos,
            "truth": population.truth,
            "prediction": prediction,
            "right": prediction == population.truth,
            "failed": prediction < 0,
            "macs": macs.to_numpy(),
        }
    )
