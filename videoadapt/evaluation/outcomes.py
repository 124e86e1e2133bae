"""From what policies did to what is reported of them: accuracies with intervals, costs, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from videoadapt.config.cascade import Measure
from videoadapt.config.load import Config
from videoadapt.evaluation.intervals import class_means, mean_class_interval, paired_difference, wilson
from videoadapt.routing.label_rules import Bools, Choice, Floats, softmax
from videoadapt.routing.policy import Evidence, Policy, mix_of
from videoadapt.routing.router import clip_macs, decide
from videoadapt.routing.scores import Scored, Scores
from videoadapt.runtime.files import replacing, write_csv, write_parquet

TOP = 5


@dataclass(frozen=True)
class Population:
    """The videos that count: how each is named, its truth, the class names, and which videos have scores.

    `scored` are positions among the `videos`, ascending; the others failed and count as wrong, or are left out by
    policy.
    """

    videos: list[str]
    truth: Choice
    classes: tuple[str, ...]
    scored: Choice
    failed: list[dict[str, str]]


@dataclass(frozen=True)
class Outcome:
    """What one policy did: the point of each clip, and the best classes of each scored video.

    `best` and `p_best` are `(scored videos, k)`, best first, k = 5 or the number of classes; the probabilities are
    means over all views of a video.
    """

    policy: Policy
    choice: Choice  # (clips,)
    best: Choice
    p_best: Floats
    macs: Floats  # (clips,), of all crops at all points that ran, and of the assigner
    assigner_macs: int  # of one clip, 0 without an assigner


def outcomes_of(scores: Scores, policies: Sequence[Policy], config: Config) -> list[Outcome]:
    """What each policy does with the scored clips."""
    points = config.model.points
    evidence = Evidence(len(scores.rows), points, scores.assigned, scores.right)

    def stored(rows: Choice, number: int) -> Mapping[Measure, Floats]:
        return {measure: values[rows, number] for measure, values in scores.confidence.items()}

    choices = [decide(policy, evidence, stored) for policy in policies]
    best: list[list[tuple[Choice, Floats]]] = [[] for _ in policies]
    first = 0
    for part in scores.shards():
        probabilities = part.probabilities()
        here = slice(first, first + len(part.rows))
        for found, choice in zip(best, choices, strict=True):
            found.append(_best(probabilities[np.arange(len(part.rows)), choice[here]], part.rows))
        first = here.stop
    outcomes = []
    for policy, choice, found in zip(policies, choices, best, strict=True):
        classes, probable = (np.concatenate(parts) for parts in zip(*found, strict=True))
        macs, assigner = clip_macs(policy, choice, config.model, crops=config.evaluate.spatial_crops)
        outcomes.append(Outcome(policy, choice, classes, probable, macs.astype(np.float64), assigner))
    return outcomes


def _best(probabilities: Floats, rows: Choice) -> tuple[Choice, Floats]:
    """The best classes of each video, from the probabilities of its clips, `(clips, classes)`."""
    _, video, counts = np.unique(rows, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), probabilities.shape[1]))
    np.add.at(sums, video, probabilities)
    means = sums / counts[:, None]
    best = np.argsort(-means, axis=1, kind="stable")[:, :TOP]
    return best, np.take_along_axis(means, best, axis=1)


def policy_rows(
    outcomes: list[Outcome], population: Population, speeds: dict[str, float], config: Config
) -> dict[str, dict[str, Any]]:
    """The figures of each policy, by name; the first outcome is the fixed costliest point."""
    counted = np.arange(len(population.videos)) if config.evaluate.failed == "wrong" else population.scored
    rows = {}
    for outcome in outcomes:
        row: dict[str, Any] = dict(_accuracies(outcome, population, counted))
        row["difference_to_costliest"] = _difference(outcome, outcomes[0], population, counted)
        row |= _costs(outcome, population, config)
        row["macs_saved"] = float(1 - outcome.macs.mean() / outcomes[0].macs.mean())
        row["mix"] = dict(zip(config.model.points, mix_of(outcome.choice, len(config.model.points)), strict=True))
        row["clips_per_s"] = speeds.get(outcome.policy.name)
        row |= outcome.policy.record()
        rows[outcome.policy.name] = row
    # A policy that reads the truth cannot be used on new clips, so it takes no place on the front.
    known = {o.policy.name: rows[o.policy.name] for o in outcomes if "truth" not in o.policy.needs}
    front = pareto_front([row["macs_per_video"] for row in known.values()], [row["top1"] for row in known.values()])
    for name, row in rows.items():
        row["pareto"] = bool(front[list(known).index(name)]) if name in known else False
    by_name = {outcome.policy.name: outcome for outcome in outcomes}
    for outcome in outcomes:
        if outcome.policy.imitates is not None:
            imitated = by_name[outcome.policy.imitates]
            rows[imitated.policy.name]["difference_to_random"] = _difference(imitated, outcome, population, counted)
    return rows


def pareto_front(costs: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Which policies no other one beats: none is cheaper and as accurate, or more accurate and no costlier."""
    pairs = list(zip(costs, accuracies, strict=True))
    return [
        not any((c <= cost and a > accuracy) or (c < cost and a >= accuracy) for c, a in pairs)
        for cost, accuracy in pairs
    ]


def _accuracies(outcome: Outcome, population: Population, counted: Choice) -> dict[str, float | None]:
    """`top1` follows `evaluate.failed`; both ways of counting stand beside it. No top-5 of so few classes."""
    all_right = _video_right(outcome, population, 1)
    right, truth = all_right[counted], population.truth[counted]
    low, high = wilson(int(right.sum()), len(right))
    class_low, class_high = mean_class_interval(right, truth)
    accuracies: dict[str, float | None] = {
        "top1": float(right.mean()),
        "top1_low": low,
        "top1_high": high,
        "top1_failed_wrong": float(all_right.mean()),
        "top1_readable": float(all_right[population.scored].mean()),
        "mean_class": float(class_means(right, truth).mean()),
        "mean_class_low": class_low,
        "mean_class_high": class_high,
        **dict.fromkeys(("top5", "top5_low", "top5_high")),
    }
    if len(population.classes) > TOP:
        top5 = _video_right(outcome, population, TOP)[counted]
        low5, high5 = wilson(int(top5.sum()), len(top5))
        accuracies |= {"top5": float(top5.mean()), "top5_low": low5, "top5_high": high5}
    return accuracies


def _costs(outcome: Outcome, population: Population, config: Config) -> dict[str, float]:
    model, crops, videos = (
        outcome.macs - outcome.assigner_macs,
        config.evaluate.spatial_crops,
        max(len(population.scored), 1),
    )
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
    right[population.scored] = (outcome.best[:, :top] == truth[:, None]).any(1)
    return right


def write_tables(config: Config, scores: Scores, population: Population, outcomes: list[Outcome]) -> pd.DataFrame:
    """`views.parquet` per view and point; `clips.parquet`, `videos.parquet` and `classes.csv` per policy.

    Returns the table of classes.
    """
    folder, points = config.run.dir / "evaluate", config.model.points
    scored = zip(dict.fromkeys(scores.rows.tolist()), population.scored, strict=True)
    names = {row: population.videos[position] for row, position in scored}
    with replacing(folder / "views.parquet") as temporary, parquet.ParquetWriter(temporary, _VIEWS) as writer:
        for part in scores.shards():
            writer.write_table(pa.Table.from_pandas(_view_table(part, names, points), _VIEWS, preserve_index=False))
    videos = np.array([names[row] for row in scores.rows], dtype=object)
    write_parquet(folder / "clips.parquet", pd.concat(_clip_table(o, scores, videos, points) for o in outcomes))
    table = pd.concat(_video_table(outcome, population, videos) for outcome in outcomes)
    write_parquet(folder / "videos.parquet", table)
    classes = class_table(table, population.classes, config.evaluate.failed)
    write_csv(folder / "classes.csv", classes)
    return classes


_VIEWS = pa.schema(
    [
        ("video", pa.string()),
        *((name, pa.int64()) for name in ("clip", "crop")),
        ("point", pa.string()),
        *((name, pa.int64()) for name in ("truth", "prediction")),
        ("p_true", pa.float64()),
    ]
)


def _view_table(part: Scored, names: dict[int, str], points: tuple[str, ...]) -> pd.DataFrame:
    clips, crops = part.logits.shape[:2]
    probabilities = softmax(part.logits)  # (clips, crops, points, classes)
    p_true = np.take_along_axis(probabilities, part.truth[:, None, None, None], axis=3)
    size = crops * len(points)
    return pd.DataFrame(
        {
            "video": np.repeat(np.array([names[row] for row in part.rows], dtype=object), size),
            "clip": np.repeat(part.clips, size),
            "crop": np.tile(np.repeat(np.arange(crops), len(points)), clips),
            "point": np.tile(np.array(points, dtype=object), clips * crops),
            "truth": np.repeat(part.truth, size),
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
    """All listed videos; one that failed has prediction -1, cost 0 and empty lists of best classes."""
    prediction = np.full(len(population.videos), -1)
    prediction[population.scored] = outcome.best[:, 0]
    best: list[list[int]] = [[] for _ in population.videos]
    p_best: list[list[float]] = [[] for _ in population.videos]
    for position, classes, shares in zip(population.scored, outcome.best, outcome.p_best, strict=True):
        best[position], p_best[position] = classes.tolist(), shares.tolist()
    macs = pd.Series(outcome.macs).groupby(videos).sum().reindex(population.videos, fill_value=0.0)
    return pd.DataFrame(
        {
            "policy": outcome.policy.name,
            "video": population.videos,
            "truth": population.truth,
            "prediction": prediction,
            "right": prediction == population.truth,
            "failed": prediction < 0,
            "best": best,
            "p_best": p_best,
            "macs": macs.to_numpy(),
        }
    )


def class_table(videos: pd.DataFrame, classes: Sequence[str], failed: str) -> pd.DataFrame:
    """Per policy and class: videos, top-1 with its Wilson interval, and the class most often taken for it.

    `videos` is the table of `videos.parquet`; failed videos count as `evaluate.failed` says. Worst classes first.
    """
    counted = videos if failed == "wrong" else videos[~videos["failed"]]
    rows = []
    for (policy, label), group in counted.groupby(["policy", "truth"], sort=False):
        low, high = wilson(int(group["right"].sum()), len(group))
        wrong = group.loc[~group["right"] & ~group["failed"], "prediction"].mode()
        rows.append(
            {
                "policy": policy,
                "class": classes[label],
                "videos": len(group),
                "top1": float(group["right"].mean()),
                "top1_low": low,
                "top1_high": high,
                "taken_for": classes[wrong.iloc[0]] if len(wrong) else "",
            }
        )
    table = pd.DataFrame(rows)
    order = {policy: number for number, policy in enumerate(counted["policy"].unique())}
    return table.sort_values(["policy", "top1", "class"], key=lambda c: c.map(order) if c.name == "policy" else c)
