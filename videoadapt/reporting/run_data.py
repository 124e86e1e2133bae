"""What the page shows of one run: plain dicts and lists, as JSON takes them, from the files of the run folder.

Each function reads one part. A part whose files are missing, as in runs of earlier versions, is None, and the page says
so in a word.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.load import Config
from videoadapt.evaluation.costs import flops
from videoadapt.evaluation.evaluated import (
    VIEWS,
    as_evaluated,
    has_text,
    read_evaluated_table,
    read_evaluation,
    reported_policy,
    unclear_speeds,
)
from videoadapt.evaluation.intervals import accuracy_interval
from videoadapt.reporting.sentence import headline
from videoadapt.routing.label_rules import Choice
from videoadapt.runtime.files import Summary, read_json, read_parquet
from videoadapt.runtime.run_config import run_name

Part = dict[str, Any]

MATRIX_CLASSES = 24  # with more classes, the cells of a confusion matrix are too small to read
MOST_PAIRS = 30  # confusions shown where the matrix would be too large
MOST_FAILED = 200  # broken videos named on the page
BINS = 10  # of the reliability diagram
CURVE_BINS = 120  # points of a training curve
NOT_RUN = "not run"
_STAGES = {  # in their order, with the file that each leaves
    "index": "index.json",
    "train": "train.json",
    "label": "labels/label.json",
    "assign": "assigner/assign.json",
    "calibrate": "calibrate/calibrate.json",
    "evaluate": "evaluate/evaluate.json",
}
_AGAIN = "run `videoadapt report` without this file, or run its stage again"


def run_data(config: Config) -> Part:
    """Reads all that the page shows of a run, apart from the pictures.

    Args:
        config: The config of the run.

    Returns:
        `name`, `points` and the parts, each None where the run has no such files.

    Raises:
        UserError: A file of the run is damaged.
    """
    run = config.run.dir
    costs = flops(as_evaluated(config))
    data: Part = {
        "name": run_name(run),
        "folder": str(run.resolve()),
        "points": costs["points"],
        "views_per_video": costs["views_per_video"],
        "assigner_macs": costs["assigner_macs"],
        "has_assigner": (run / "assigner" / "assign.json").exists(),
        "population": _population(run),
        "curves": _curves(run),
        "training_begun": (run / "metrics.jsonl").exists(),
        "calibration": _calibration(run),
        "stages": _stage_seconds(run),
        "commands": _commands(config),
        "evaluation": None,
    }
    # `flops` has the policies only if the evaluation is one of this model and of these videos.
    if "policies" in costs:
        data["evaluation"] = evaluation_data(config)
    return data


def evaluation_data(config: Config) -> Part:
    """Reads the parts that need an evaluation. The tables of clips and classes are data frames.

    Args:
        config: The config of an evaluated run.
    """
    run = config.run.dir
    found = read_evaluation(run)
    policies, points = found["policies"], list(config.model.points)
    reported = reported_policy(policies)
    speed = found.get("speed") or {}
    speeds, rounds = speed.get("policies") or {}, speed.get("rounds", 0)
    videos = read_evaluated_table(run, "videos", ["policy", "video", "truth", "prediction", "right", "failed", "macs"])
    clips = read_evaluated_table(run, "clips", ["policy", "video", "clip", "truth", "point", "macs"])
    right = right_by_point(videos, points)
    table = clip_table(clips[clips["policy"] == reported], videos[videos["policy"] == reported], right)
    guessing, promised = found.get("largest_class_fraction"), found.get("promises") or {}
    first = headline(
        policies,
        reported,
        speeds.get(reported),
        guessing,
        rounds=rounds,
        clips=speed.get("clips"),
        calibrated=promised,
    )
    return {
        "headline": asdict(first),
        "reported": reported,
        "costliest": next(iter(policies)),
        "policies": [
            policy_row(name, row, speeds.get(name, {})) | {"reported": name == reported}
            for name, row in policies.items()
        ],
        "adaptive": table["point"].nunique() > 1,
        "clips": table,
        "classes": class_table(table, right, run, reported, next(iter(policies))),
        "confusion": confusion(run, reported),
        "assigner": assigner(run, points, clips[clips["policy"] == "assigned"], right, _sources(videos)),
        # What two evaluations must have in common, if their manifests, which cover other splits too, differ.
        "population": " ".join(str(found.get(key)) for key in _POPULATION) if found.get("files") else None,
        "facts": {key: found.get(key) for key in _FACTS},  # None in runs of earlier versions; the page then says less
        "failed": found.get("failed", [])[:MOST_FAILED],
        "failed_count": len(found.get("failed", [])),
        "speed": _speed_facts(found.get("speed")),
        "unclear": unclear_speeds(speeds) if speeds else [],
        "inputs": found.get("inputs"),
    }


_POPULATION = ("files", "listed", "classes", "largest_class", "largest_class_fraction")
_FACTS = (
    *("kind", "split", "manifest", "files", "model", "listed", "scored", "sources", "failed_count_as", "views"),
    "trained_on",
    *("selected_on_val", "largest_class", "largest_class_fraction", "date", "seconds", "machine", "versions"),
)


def policy_row(name: str, row: Mapping[str, Any], speed: Mapping[str, Any]) -> Part:
    """Returns the figures of a policy in the page's words; a figure that was not measured is None."""
    kept = ("top1", "top1_low", "top1_high", "macs_per_clip", "macs_per_video", "macs_saved", "mix", "pareto")
    measured = ("speedup", "routed_efficiency", "end_to_end_efficiency", "p50_ms", "p95_ms", "stages_s", "stages_cpu_s")
    return {
        "name": name,
        "kind": name.partition(":")[0],
        **{key: row[key] for key in kept},
        "difference": row["difference_to_costliest"],
        "clips_per_s": speed.get("clips_per_s") or row.get("clips_per_s"),
        **{key: speed.get(key) for key in (*measured, "end_to_end_clips_per_s", "joules_per_clip")},
    }


def right_by_point(videos: pd.DataFrame, points: Sequence[str]) -> pd.DataFrame:
    """Returns whether each fixed point is right on each video: a row per video, a column per point, costliest first."""
    fixed = {f"fixed:{point}": point for point in points}
    rows = videos[videos["policy"].isin(list(fixed))]
    table = rows.pivot(index="video", columns="policy", values="right").rename(columns=fixed)
    return table.reindex(columns=list(points)).fillna(False).astype(bool)


def clip_table(clips: pd.DataFrame, videos: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per clip: what it cost, where it ended, what its video was taken for, and each point's verdict.

    Args:
        clips: The rows of one policy in `clips.parquet`.
        videos: The rows of the same policy in `videos.parquet`.
        right: See `right_by_point`.
    """
    answers = videos.set_index("video")[["prediction", "right"]]
    table = clips[["video", "clip", "truth", "point", "macs"]].reset_index(drop=True)
    table = table.join(answers, on="video")
    verdicts = right.rename(columns=lambda point: f"right at {point}")
    table = table.join(verdicts, on="video")
    # A video whose probabilities are NaN has no prediction, and a clip that a cascade over views left out has no point.
    for name, blank in (("prediction", ""), ("point", NOT_RUN)):
        table[name] = table[name].astype(object).where(table[name].notna(), blank)
    return table[["video", "clip", "truth", "prediction", "right", "point", "macs", *verdicts.columns]]


def class_table(clips: pd.DataFrame, right: pd.DataFrame, run: Path, reported: str, costliest: str) -> pd.DataFrame:
    """Returns a row per class: accuracies of the costliest point and of the policy, their change, cost and mix."""
    by_policy = pd.read_csv(run / "evaluate" / "classes.csv", dtype={"class": str}, keep_default_na=False)
    own = by_policy[by_policy["policy"] == reported].set_index("class")
    fixed = by_policy[by_policy["policy"] == costliest].set_index("class")["top1"]
    groups = clips.groupby("truth", sort=False)
    mix = clips.groupby(["truth", "point"]).size().unstack(fill_value=0).reindex(columns=right.columns, fill_value=0)
    mix = mix.div(mix.sum(axis=1), axis=0).rename(columns=lambda point: f"at {point}")
    table = own[["videos", "top1", "top1_low", "top1_high", "taken_for"]].join(fixed.rename("top1_costliest"))
    table["change"] = table["top1"] - table["top1_costliest"]
    table = table.join(groups["macs"].mean().rename("macs_per_clip")).join(mix)
    return table.rename_axis("class").reset_index().sort_values(["change", "class"], kind="stable")


def confusion(run: Path, policy: str) -> Part | None:
    """Returns the confusion matrix of a policy, or its most frequent confusions where there are many classes."""
    path = run / "evaluate" / "confusion.csv"
    if not path.exists():
        return None
    rows = pd.read_csv(path, dtype={"truth": str, "prediction": str}, keep_default_na=False)
    rows = rows[rows["policy"] == policy]
    wrong = rows[rows["truth"] != rows["prediction"]].sort_values(
        ["videos", "fraction"], ascending=False, kind="stable"
    )
    pairs = wrong.head(MOST_PAIRS)[["truth", "prediction", "videos", "fraction"]].to_dict("records")
    names = sorted({*rows["truth"], *rows["prediction"]} - {""})
    cells = None
    if len(names) <= MATRIX_CLASSES:
        place = {name: number for number, name in enumerate(names)}
        cells = [
            [place[row.prediction], place[row.truth], round(float(row.fraction), 4), int(row.videos)]
            for row in rows.itertuples()
            if row.prediction in place
        ]
    return {"classes": names, "cells": cells, "pairs": pairs, "wrong": int(wrong["videos"].sum()), "kinds": len(wrong)}


def _sources(videos: pd.DataFrame) -> pd.Series:
    """Returns the source of each video, by its name; in evaluations of older versions each is its own."""
    named = videos.drop_duplicates("video").set_index("video", drop=False)
    return named["source" if "source" in named else "video"]


def assigner(
    run: Path, points: Sequence[str], clips: pd.DataFrame, right: pd.DataFrame, sources: pd.Series
) -> Part | None:
    """Returns how the assigner's choices meet the labels, and whether its probabilities can be believed.

    Args:
        run: The run folder. Without `evaluate/assigner.parquet`, as in older runs, there are no probabilities.
        points: The points, costliest first.
        clips: The rows of the assigned policy in `clips.parquet`.
        right: See `right_by_point`.
        sources: The source of each video, by its name.

    Returns:
        `cells` counts clips by cheapest right point (or none) and by the point they got. None without the policy.
    """
    if clips.empty:
        return None
    verdicts = right.reindex(clips["video"]).to_numpy(bool)
    label = np.where(
        verdicts.any(1), verdicts.shape[1] - 1 - verdicts[:, ::-1].argmax(1), len(points)
    )  # cheapest right
    choice = clips["point"].map({point: number for number, point in enumerate(points)}).to_numpy(np.int64)
    counts = np.zeros((len(points) + 1, len(points)), dtype=np.int64)
    np.add.at(counts, (label, choice), 1)
    cells = [[column, row, int(counts[row, column])] for row in range(len(points) + 1) for column in range(len(points))]
    path = run / "evaluate" / "assigner.parquet"
    reliability = None
    if path.exists():
        names = [f"p/{point}" for point in points]
        columns = [*names, *(f"right/{point}" for point in points)]
        table = read_parquet(path, "run `videoadapt evaluate` again", ["video", *columns])
        reliability = reliability_of(
            table[names].to_numpy(float),
            table[columns[len(points) :]].to_numpy(bool),
            list(points),
            pd.factorize(table["video"].map(sources))[0],
        )
    return {"rows": [*points, "none right"], "columns": list(points), "cells": cells, "reliability": reliability}


def reliability_of(p: Any, right: Any, points: Sequence[str], sources: Choice) -> list[Part]:
    """Returns how often a point suffices where the assigner says that it does with some probability.

    A point suffices if it, or a cheaper one, is right: so the assigner's probabilities add up when it chooses.

    Args:
        p: The assigner's probability of each point to be the label, `(clips, points)`, costliest first.
        right: Whether each point is right, `(clips, points)`.
        points: Their names.
        sources: Number of each clip's source, `(clips,)`. Intervals draw whole sources.

    Returns:
        For each point but the costliest: bins with as many clips each, `p` (mean of what was said), `observed` and its
        95 % interval `low`, `high`, and `clips`.
    """
    said = np.cumsum(p[:, ::-1], axis=1)[:, ::-1]
    suffices = np.cumsum(right[:, ::-1], axis=1)[:, ::-1] > 0
    found = []
    for number in range(1, len(points)):
        order = np.argsort(said[:, number], kind="stable")
        bins = []
        for rows in np.array_split(order[~np.isnan(said[order, number])], BINS):
            if len(rows):
                observed = suffices[rows, number]  # (clips of the bin,)
                low, high = accuracy_interval(observed, sources[rows])
                means = {"p": float(said[rows, number].mean()), "observed": float(observed.mean())}
                bins.append({**means, "low": low, "high": high, "clips": len(rows)})
        found.append({"point": points[number], "bins": bins})
    return found


def _population(run: Path) -> Part | None:
    path = run / "index.json"
    if not path.exists():
        return None
    found = read_json(path, _AGAIN, ["splits", "manifest"])
    return {"manifest": found["manifest"], "classes": found.get("classes"), "splits": found["splits"]}


def _curves(run: Path) -> Part | None:
    """Returns loss and top-1 of each point while training: means over steps, and the validations."""
    path, summary = run / "metrics.jsonl", run / "train.json"
    if not path.exists() or not summary.exists() or not path.stat().st_size:
        return None
    trained = read_json(summary, _AGAIN, ["points", "steps", "epochs"])
    metrics = pd.read_json(path, lines=True)
    if trained["steps"] != metrics["step"].iloc[-1]:  # of an early stop, after which the training went on
        trained |= {"steps": int(metrics["step"].iloc[-1]), "best": None}
    epochs = trained["epochs"]
    width = max(1, len(metrics) // CURVE_BINS)
    binned = metrics.groupby((metrics["step"] - metrics["step"].iloc[0]) // width).mean(numeric_only=True)
    checks, validation = pd.DataFrame(), run / "validation.jsonl"
    if validation.exists() and validation.stat().st_size:
        checks = pd.read_json(validation, lines=True)
        # Earlier versions recorded the epochs of the config, also of a run that stopped early.
        epochs = round(trained["steps"] * checks["epoch"].iloc[-1] / checks["step"].iloc[-1])
    per_epoch = trained["steps"] / max(epochs, 1) or 1.0
    lines = {}
    for point in trained["points"]:
        for name in ("loss", "top1"):
            column = f"{name}/{point}"
            if column in binned:
                lines[f"train {column}"] = _pairs(binned["step"] / per_epoch, binned[column])
            if column in checks:
                lines[f"val {column}"] = _pairs(checks["epoch"], checks[column])
    return {"points": list(trained["points"]), "lines": lines, "best": trained.get("best"), "epochs": epochs}


def _pairs(x: pd.Series, y: pd.Series) -> list[list[float]]:
    return [[round(float(a), 4), round(float(b), 5)] for a, b in zip(x, y, strict=True) if math.isfinite(b)]


def _calibration(run: Path) -> Part | None:
    path = run / "calibrate" / "calibrate.json"
    return read_json(path, "run `videoadapt calibrate` again", ["curve"]) if path.exists() else None


def _commands(config: Config) -> list[str]:
    """Returns the commands of the stages that the run has. What was overridden stands in the config of the run.

    An evaluation may have had further policies, and other views.
    """
    run = config.run.dir
    words = {stage: ["videoadapt", stage, str(run)] for stage, path in _STAGES.items() if (run / path).exists()}
    if "evaluate" in words:
        found = read_json(run / _STAGES["evaluate"], _AGAIN)
        in_config = {f"cascade:{text}" for text in config.evaluate.cascade}
        in_config |= {f"leap:{text}" for text in config.evaluate.leap} | set(found.get("promises", {}))
        for name in found.get("policies", {}):
            if has_text(name) and name not in in_config:
                words["evaluate"] += ["--policy", name]
        now, then = vars(config.evaluate), vars(as_evaluated(config).evaluate)
        words["evaluate"] += [f"evaluate.{key}={then[key]}" for key in VIEWS if then[key] != now[key]]
    return [shlex.join(each) for each in words.values()]


def _stage_seconds(run: Path) -> list[Part]:
    """Returns the duration of each stage that says it."""
    rows = []
    for stage, path in _STAGES.items():
        found: Summary = read_json(run / path, _AGAIN) if (run / path).exists() else {}
        if found.get("seconds"):
            parts = found.get("stages") or {}
            rows.append({"stage": stage, "seconds": found["seconds"], "parts": parts, "host": found.get("host", "")})
    return rows


def _speed_facts(speed: Mapping[str, Any] | None) -> Part | None:
    """Returns how the speed was measured, without the long lists of clips."""
    if not speed:
        return None
    measured = {key: value for key, value in speed.get("measured", {}).items() if not isinstance(value, (list, dict))}
    kept = {key: speed.get(key) for key in ("clips", "rounds", "file_rounds", "seconds", "date")}
    return {**kept, "device": None, **measured}
