"""Records evaluated runs in small files, and pools folds: results stay when the run folders are gone.

    python tools/record_run.py record RUN FILE.json   # accuracies, costs, speeds, and where each policy is right
    python tools/record_run.py show FILE.json ...     # the tables; several files are folds of one experiment

Folds are pooled: each video is in the val split of one of them, and intervals draw whole sources over all. The curve of
the assigner has all its thresholds, each beside the most accurate random mixture of two fixed points of the same cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from one_line_failures import one_line_failures
from videoadapt.config.cost import point_macs
from videoadapt.config.load import load_config
from videoadapt.errors import UserError
from videoadapt.evaluation.against_fixed import Measured, against_fixed
from videoadapt.evaluation.evaluated import read_evaluated_table, read_evaluation
from videoadapt.evaluation.intervals import accuracy_interval, paired_difference
from videoadapt.routing.label_rules import Bools, Choice, Floats, cheapest_sufficient
from videoadapt.runtime.console import percent, print_table
from videoadapt.runtime.files import Summary, read_json, replacing

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_REMEDY = "record the run again"
_OF_EVALUATION = ("split", "manifest", "model", "trained_on", "listed", "views", "assigner_macs", "date")
_OF_POLICY = ("top1", "macs_per_video", "macs_saved", "mix", "clips_per_s")

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def record(run: Path, file: Path) -> None:
    """Writes the results of a run folder into a file."""
    config, evaluation = load_config(run), read_evaluation(run)
    videos = read_evaluated_table(run, "videos", ["policy", "video", "source", "right", "failed"])
    if evaluation.get("failed_count_as") == "exclude":  # as in the evaluation's own figures
        videos = videos[~videos["failed"]]
    policies = {}
    for name, rows in videos.groupby("policy", sort=False):
        row = evaluation["policies"][name]
        policies[name] = {key: row[key] for key in _OF_POLICY} | {"right": _as_text(rows["right"].to_numpy())}
    first = videos[videos["policy"] == videos["policy"].iloc[0]]
    found: dict[str, Any] = {key: evaluation.get(key) for key in _OF_EVALUATION}
    found |= {"machine": (evaluation.get("speed") or {}).get("measured"), "points": point_macs(config.model)}
    found |= {"train": config.train.model_dump(mode="json", exclude={"init"})}
    for name, keys in {
        "train": ("seconds", "steps", "clips", "points", "host"),
        "labels/label": ("source", "clips", "points", "none_right_clips"),
        "assigner/assign": ("threshold", "rule", "auc", "clips_fitted", "clips_selecting", "macs_saved", "difference"),
        "calibrate/calibrate": ("promise", "videos", "sources", "chosen", "best_fixed", "needed"),
    }.items():
        if (run / f"{name}.json").exists():
            summary = read_json(run / f"{name}.json", "run the verb again")
            found[f"of_{Path(name).name}"] = {key: summary[key] for key in keys if key in summary}
    found["sources"] = first["source"].tolist()
    if (run / "evaluate" / "assigner.parquet").exists():
        columns = [f"p/{point}" for point in found["points"]]
        table = read_evaluated_table(run, "assigner", ["video", *columns]).set_index("video")[columns]
        if table.index.has_duplicates:
            raise UserError(f"{run}: expected one clip a video (evaluate.temporal_views=1), for the assigner's curve")
        table = table.reindex(first["video"], fill_value=0.0)  # for a video without an answer, no point suffices
        found["assigned"] = {
            point: (table[f"p/{point}"] * 1000).round().astype(int).tolist() for point in found["points"]
        }
    found["policies"] = policies
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())  # a line for each key
    with replacing(file) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@app.command()
def show(files: Annotated[list[Path], typer.Argument(help="Recorded folds of one experiment, or one run.")]) -> None:
    """Prints accuracies, costs and the curve of recorded runs."""
    folds = [read_json(file, _REMEDY, ["policies", "sources", "points"]) for file in files]
    sources = pooled_sources(folds)
    measured = pooled_policies(folds)
    fixed = [each for each in measured if each.name.startswith("fixed:")]
    costliest = fixed[0]
    rows = []
    for each in measured:
        low, high = accuracy_interval(each.right, sources)
        beside = None if each in fixed else against_fixed(each, fixed, sources)
        rows.append(
            (
                each.name,
                f"{percent(each.right.mean())} ({percent(low)} to {percent(high)})",
                interval(paired_difference(each.right, costliest.right, sources=sources)),
                percent(1 - each.macs / costliest.macs),
                interval(beside.difference_to_mixture) if beside else "",
            )
        )
    title = f"{len(sources)} videos, {len(set(sources.tolist()))} sources; 95 % intervals over sources"
    print_table(title, ("policy", "top-1 %", "to the costliest", "MACs saved %", "to the mixture"), rows)
    if all("assigned" in fold for fold in folds):
        curve = [(f"{t:g}", *values) for t, *values in curve_of(folds, fixed, sources)]
        print_table("the assigner", ("threshold", "top-1 %", "MACs saved %", "to the mixture"), curve)


def pooled_sources(folds: Sequence[Summary]) -> Choice:
    """Returns the number of each video's source over all folds, which share none, `(videos,)`."""
    numbers, first = [], 0
    for fold in folds:
        own = np.array(fold["sources"])
        numbers.append(own + first)
        first += int(own.max()) + 1
    return np.concatenate(numbers)


def pooled_policies(folds: Sequence[Summary]) -> list[Measured]:
    """Returns the policies that all folds have, with their answers on all videos."""
    names = [name for name in folds[0]["policies"] if all(name in fold["policies"] for fold in folds)]
    found = []
    for name in names:
        rows = [fold["policies"][name] for fold in folds]
        right = np.concatenate([_from_text(row["right"]) for row in rows])
        macs = np.average([row["macs_per_video"] for row in rows], weights=[len(row["right"]) for row in rows])
        found.append(Measured(name, float(macs), right))
    return found


def curve_of(folds: Sequence[Summary], fixed: Sequence[Measured], sources: Choice) -> list[tuple[Any, ...]]:
    """Returns, for each threshold: top-1, MACs saved, and the difference to the best mixture of fixed points."""
    points = list(folds[0]["points"])
    p: Floats = np.concatenate([np.array([fold["assigned"][point] for point in points]).T for fold in folds]) / 1000
    right: Bools = np.stack([each.right for each in fixed], axis=1)  # (videos, points)
    read = p.any(1)  # videos that failed have no answer, and cost nothing, as for the other policies
    costs, assigner, found = np.array([each.macs for each in fixed]), folds[0]["assigner_macs"] or 0, []
    for threshold in THRESHOLDS:
        choice = cheapest_sufficient(p, threshold)
        own = Measured("", float(costs[choice[read]].mean() + assigner), right[np.arange(len(p)), choice])
        beside = against_fixed(own, fixed, sources)
        difference = interval(beside.difference_to_mixture) if beside else ""
        found.append((threshold, percent(own.right.mean()), percent(1 - own.macs / costs[0]), difference))
    return found


def interval(values: Sequence[float]) -> str:
    """Returns a difference in points with its interval, such as `+1.0 (-0.3 to +2.3)`."""
    value, low, high = (f"{100 * each:+.1f}" for each in values)
    return f"{value} ({low} to {high})"


def _as_text(right: Bools) -> str:
    return "".join("01"[int(each)] for each in right)


def _from_text(text: str) -> Bools:
    return np.array([each == "1" for each in text])


if __name__ == "__main__":
    with one_line_failures():
        app()
