"""`flops`: the cost of every point without data, and after an evaluation the cost of every clip and video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from videoadapt.config.cost import point_cost, point_macs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest, manifest_path
from videoadapt.evaluation.evaluated import evaluation_path, read_evaluated_table, read_evaluation, reported_policy
from videoadapt.routing.assigner import assigner_macs
from videoadapt.runtime.console import say
from videoadapt.runtime.files import Summary, write_csv, write_json


@dataclass(frozen=True)
class PointRow:
    """MACs of one point. The names are keys of `flops.json`."""

    point: str
    macs_per_view: int
    macs_per_video: int
    parts: dict[str, int]  # MACs of a view, by part of the model


@dataclass(frozen=True)
class PolicyCost:
    """Mean cost and accuracy of one evaluated policy. The names are keys of `flops.json`."""

    policy: str
    macs_per_clip: float
    macs_per_video: float
    top1: float
    pareto: bool


@dataclass(frozen=True)
class Distribution:
    """Mean, median and 95th percentile of some values."""

    mean: float
    median: float
    p95: float


@dataclass(frozen=True)
class ClipReport:
    """Measured costs of the clips of one policy. The names are keys of `flops.json`."""

    policy: str
    macs_per_clip: Distribution
    macs_per_video: Distribution
    mix: dict[str, float]  # fraction of the clips at each point
    classes: list[dict[str, object]]  # the rows of `class_mix`
    files: list[str]


def flops(config: Config) -> Summary:
    """Computes MACs per part, view and video of every point, from the architecture alone.

    If the run has been evaluated, adds the clip-level report (see `clip_report`), and the cost and accuracy of every
    policy, and writes them into `report/` of the run folder. An evaluation at other points is left out with a message.
    Without an evaluation, writes nothing.

    Args:
        config: The run's config.

    Returns:
        The contents of `report/flops.json`.
    """
    views = config.evaluate.views
    per_view = point_macs(config.model)
    rows = [
        PointRow(point, total, views * total, asdict(point_cost(config.model, point)))
        for point, total in per_view.items()
    ]
    summary: Summary = {
        "points": [asdict(row) for row in rows],
        "views_per_video": views,
        # A model of one point leaves nothing to assign.
        "assigner_macs": assigner_macs(config.assign, len(rows)) if len(rows) > 1 else None,
    }
    if evaluation_path(config.run.dir).exists() and (costs := _evaluated_costs(config, per_view)):
        summary |= costs
        write_json(config.run.dir / "report" / "flops.json", summary)
    return summary


def _evaluated_costs(config: Config, macs_per_view: Mapping[str, int]) -> Summary:
    """Returns the costs of clips and policies of the run's evaluation; none, with a message, if it is another's."""
    found = read_evaluation(config.run.dir, ["macs_per_view", "manifest"])
    if found["macs_per_view"] != macs_per_view:
        _say_left_out(config, "was made with other points or another model")
        return {}
    manifest = Manifest.load(manifest_path(config.run.dir))
    if found["manifest"] != manifest.hash:
        _say_left_out(config, f"was made with manifest {found['manifest']}, and the run has {manifest.hash} now")
        return {}
    policies = found["policies"]
    costs = [
        PolicyCost(name, row["macs_per_clip"], row["macs_per_video"], row["top1"], row["pareto"])
        for name, row in policies.items()
    ]
    return {
        "evaluated": {key: found.get(key) for key in ("model", "date")},  # the weights may have changed since
        "clips": asdict(clip_report(config, policies, manifest.classes)),
        "policies": [asdict(cost) for cost in costs],
    }


def _say_left_out(config: Config, why: str) -> None:
    say(f"{evaluation_path(config.run.dir)}: {why}, so the costs of its clips are left out; run `evaluate` again")


def clip_report(
    config: Config, policies: Mapping[str, Mapping[str, object]], class_names: tuple[str, ...]
) -> ClipReport:
    """Writes the clip-level report: `clips.csv`, `videos.csv` and `classes.csv` under `report/`.

    The report is about one policy, see `reported_policy`.

    Args:
        config: The config of an evaluated run.
        policies: The rows of its `evaluate.json`, by policy name.
        class_names: Names of all classes, in their order.
    """
    folder = config.run.dir / "report"
    clips = read_evaluated_table(config.run.dir, "clips", ["policy", "truth", "point", "macs"])
    videos = read_evaluated_table(config.run.dir, "videos", ["policy", "failed", "macs"])
    policy = reported_policy(policies)
    clips = clips[clips["policy"] == policy].drop(columns="policy")
    videos = videos[(videos["policy"] == policy) & ~videos["failed"]].drop(columns="policy")
    classes = class_mix(clips, config.model.points, class_names)
    for name, table in (("clips", clips), ("videos", videos), ("classes", classes)):
        write_csv(folder / f"{name}.csv", table)
    return ClipReport(
        policy=policy,
        macs_per_clip=distribution(clips["macs"]),
        macs_per_video=distribution(videos["macs"]),
        mix={point: float((clips["point"] == point).mean()) for point in config.model.points},
        classes=classes.to_dict("records"),
        files=[str(folder / name) for name in ("clips.csv", "videos.csv", "classes.csv")],
    )


def class_mix(clips: pd.DataFrame, points: tuple[str, ...], names: tuple[str, ...]) -> pd.DataFrame:
    """Returns, per class: number of clips, mean MACs of a clip, and the fraction of clips at each point.

    The rows are in the order of `names`. Classes without clips get no row.

    Args:
        clips: The rows of one policy in `clips.parquet`.
        points: The points of the model; each becomes a column.
        names: Names of all classes.
    """
    rows = []
    groups = dict(iter(clips.groupby("truth")))
    for name in filter(groups.__contains__, names):
        group = groups[name]
        mix = {point: float((group["point"] == point).mean()) for point in points}
        row = {"class": name, "clips": len(group), "macs_per_clip": float(group["macs"].mean())}
        rows.append(row | mix)
    return pd.DataFrame(rows)


def distribution(values: pd.Series) -> Distribution:
    """Returns mean, median and 95th percentile."""
    return Distribution(float(values.mean()), float(values.median()), float(np.quantile(values, 0.95)))
