"""The tables of an evaluation: per view, clip, video and class, and the confusions. Classes stand in them by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from videoadapt.config.load import Config
from videoadapt.evaluation.intervals import accuracy_interval
from videoadapt.evaluation.outcomes import Outcome, Population
from videoadapt.routing.label_rules import predictions, softmax
from videoadapt.routing.scores import Scored, Scores
from videoadapt.runtime.files import replacing, write_csv, write_parquet

Names = npt.NDArray[np.object_]


def write_tables(config: Config, scores: Scores, population: Population, outcomes: list[Outcome]) -> pd.DataFrame:
    """Writes the tables of views (per point), and of clips, videos, classes and confusions (per policy).

    Args:
        config: The run's config; the tables go to `evaluate/` in its folder.
        scores: The scores of all clips.
        population: The listed videos.
        outcomes: The outcomes of all policies.

    Returns:
        The table of classes, as `class_table` makes it.
    """
    folder, points, classes = config.run.dir / "evaluate", config.model.points, _class_names(population)
    names = video_names(scores, population)
    with replacing(folder / "views.parquet") as temporary, parquet.ParquetWriter(temporary, _VIEWS) as writer:
        for shard in scores.shards():  # the table of views is as long as the logits, so it is written in pieces
            table = _view_table(shard, names, classes, points)
            writer.write_table(pa.Table.from_pandas(table, _VIEWS, preserve_index=False))
    videos = np.array([names[row] for row in scores.rows], dtype=object)
    clips = pd.concat(_clip_table(outcome, scores, videos, classes, points) for outcome in outcomes)
    write_parquet(folder / "clips.parquet", clips)
    _write_assigner_table(folder / "assigner.parquet", scores, videos, points)
    table = pd.concat(_video_table(outcome, population, videos) for outcome in outcomes)
    write_parquet(folder / "videos.parquet", table)
    by_class = class_table(table, config.evaluate.failed)
    write_csv(folder / "classes.csv", by_class)
    write_csv(folder / "confusion.csv", confusion_table(table))
    return by_class


def video_names(scores: Scores, population: Population) -> dict[int, str]:
    """Returns the name of each scored video by its manifest row."""
    rows = dict.fromkeys(scores.rows.tolist())
    return {row: population.videos[position] for row, position in zip(rows, population.scored, strict=True)}


def _class_names(population: Population) -> Names:
    """Returns the names by class number, and None for `NO_CLASS`, the last entry."""
    return np.array([*population.classes, None], dtype=object)


_VIEWS = pa.schema(
    [
        ("video", pa.string()),
        *((name, pa.int64()) for name in ("clip", "crop")),
        *((name, pa.string()) for name in ("point", "truth", "prediction")),
        ("p_true", pa.float64()),
    ]
)


def _view_table(shard: Scored, names: dict[int, str], classes: Names, points: tuple[str, ...]) -> pd.DataFrame:
    clips, crops = shard.logits.shape[:2]
    probabilities = softmax(shard.logits)  # (clips, crops, points, classes)
    p_true = np.take_along_axis(probabilities, shard.truth[:, None, None, None], axis=3)  # (clips, crops, points, 1)
    size = crops * len(points)  # rows of a clip: its crops, and for each crop all points
    return pd.DataFrame(
        {
            "video": np.repeat(np.array([names[row] for row in shard.rows], dtype=object), size),
            "clip": np.repeat(shard.clips, size),
            "crop": np.tile(np.repeat(np.arange(crops), len(points)), clips),
            "point": np.tile(np.array(points, dtype=object), clips * crops),
            "truth": np.repeat(classes[shard.truth], size),
            "prediction": classes[predictions(probabilities).ravel()],
            "p_true": p_true.ravel(),
        }
    )


def _write_assigner_table(path: Path, scores: Scores, videos: Names, points: tuple[str, ...]) -> None:
    """Writes the assigner's probability of each point, `p/POINT`, and the truth about it, `right/POINT`, by clip."""
    path.unlink(missing_ok=True)  # of an assigner that the run had before
    if scores.assigned is None:
        return
    p = {f"p/{point}": scores.assigned[:, number] for number, point in enumerate(points)}
    right = {f"right/{point}": scores.right[:, number] for number, point in enumerate(points)}
    write_parquet(path, pd.DataFrame({"video": videos, "clip": scores.clips, **p, **right}))


def _clip_table(
    outcome: Outcome, scores: Scores, videos: Names, classes: Names, points: tuple[str, ...]
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "policy": outcome.policy.name,
            "video": videos,
            "clip": scores.clips,
            "start_s": scores.starts_s,
            "truth": classes[scores.truth],
            "point": np.array([*points, None], dtype=object)[outcome.choice],  # None: -1, a clip that did not run
            "views": outcome.ran.sum(1),  # counted once for each point
            "macs": outcome.macs,
        }
    )


def _video_table(outcome: Outcome, population: Population, videos: Names) -> pd.DataFrame:
    """Returns one row per listed video: `best_1` is the prediction, `p_1` its probability, `source` a number.

    A video that could not be read has no prediction and cost 0. One whose probabilities are NaN has none either.
    """
    classes, count = _class_names(population), len(population.videos)
    best: dict[str, npt.NDArray[np.generic]] = {}
    for number in range(outcome.best.shape[1]):
        name, p = np.full(count, None, dtype=object), np.full(count, np.nan)
        name[population.scored] = classes[outcome.best[:, number]]
        p[population.scored] = outcome.p_best[:, number]
        best |= {f"best_{number + 1}": name, f"p_{number + 1}": p}
    failed, right = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)
    failed[population.scored] = False
    right[population.scored] = outcome.best[:, 0] == population.truth[population.scored]
    # A video costs the sum over its clips.
    of_clips = pd.DataFrame({"views": outcome.ran.sum(1), "macs": outcome.macs})
    costs = of_clips.groupby(videos).sum().reindex(population.videos, fill_value=0)
    return pd.DataFrame(
        {
            "policy": outcome.policy.name,
            "video": population.videos,
            "source": population.sources,
            "truth": classes[population.truth],
            "prediction": best["best_1"],
            "right": right,
            "failed": failed,
            "views": costs["views"].to_numpy(),
            "macs": costs["macs"].to_numpy(),
            **best,
        }
    )


def class_table(videos: pd.DataFrame, failed: str) -> pd.DataFrame:
    """Returns, per policy and class: videos, top-1 with its interval, and the most frequent wrong answer.

    Args:
        videos: The table of `videos.parquet`.
        failed: `evaluate.failed`: how failed videos count.

    Returns:
        The table, the worst classes of each policy first.
    """
    counted = videos if failed == "wrong" else videos[~videos["failed"]]
    rows = []
    for (policy, name), group in counted.groupby(["policy", "truth"], sort=False):
        low, high = accuracy_interval(group["right"].to_numpy(), group["source"].to_numpy())
        wrong = group.loc[~group["right"], "prediction"].mode()  # leaves out videos without a prediction
        rows.append(
            {
                "policy": policy,
                "class": name,
                "videos": len(group),
                "top1": float(group["right"].mean()),
                "top1_low": low,
                "top1_high": high,
                "taken_for": wrong.iloc[0] if len(wrong) else "",
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values(["policy", "top1", "class"], key=lambda c: _in_order(c, counted["policy"]))


def confusion_table(videos: pd.DataFrame) -> pd.DataFrame:
    """Returns the confusion matrix of each policy as a list: how many videos of a class were given each answer.

    Args:
        videos: The table of `videos.parquet`. Videos that could not be read are left out.

    Returns:
        A row per policy, class and answer that occurs: `policy`, `truth`, `prediction` (None: the probabilities are
        NaN), `videos`, and `fraction` of the videos of the class. The most frequent confusions of a policy come first,
        then its right answers.
    """
    read = videos[~videos["failed"]]
    groups = read.groupby(["policy", "truth", "prediction"], sort=False, dropna=False)
    table = groups.size().rename("videos").reset_index()
    table["fraction"] = table["videos"] / table.groupby(["policy", "truth"])["videos"].transform("sum")
    table["right"], table["fewer"] = table["truth"] == table["prediction"], -table["videos"]
    order = ["policy", "right", "fewer", "truth", "prediction"]
    table = table.sort_values(order, key=lambda c: _in_order(c, read["policy"]))
    return table.drop(columns=["right", "fewer"])


def _in_order(column: pd.Series, policies: pd.Series) -> pd.Series:
    """Returns a sorting key: policies in the order of the evaluation, all else by value."""
    order = {policy: number for number, policy in enumerate(policies.unique())}
    return column.map(order) if column.name == "policy" else column
