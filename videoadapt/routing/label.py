"""Stage 2, first half: runs every point on every clip, and derives the token-length labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest, chi2_contingency

from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import UserError, plural
from videoadapt.model.checkpoint import Checkpoint
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.label_inputs import label_inputs, label_summary_path
from videoadapt.routing.label_rules import LABEL_SPLITS, choose_labels, outcome_table, right_matrix
from videoadapt.routing.scores import (
    ScoreFiles,
    Scores,
    inference_model,
    labelled_files_digest,
    score,
    trained_checkpoint,
)
from videoadapt.runtime.console import percent, say
from videoadapt.runtime.files import write_json, write_parquet
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.ranks import broadcast_result, ranks
from videoadapt.runtime.results import Result, ShardResult, Table
from videoadapt.training.exchange import broadcast_checkpoint
from videoadapt.training.trained_clips import require_held_out

_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class PointLabels:
    """The figures of one point. The names are keys of `label.json`."""

    right: float  # fraction of the clips on which the point is right
    labelled: int  # clips whose label is the point


@dataclass(frozen=True, repr=False)
class LabelSummary(Result):
    """The contents of `label.json`; the names are its keys."""

    source: str
    none_right: str  # rule for clips on which no point is right
    manifest: str  # hash
    model: str  # digest of the weights
    files: str  # digest of the files that were read
    clips: int
    failed: list[dict[str, str]]  # path and cause
    points: dict[str, PointLabels]
    none_right_clips: int  # clips on which no point is right
    left_out: int  # clips without a label
    inputs: dict[str, Any]  # what the labels depend on; see `label_inputs`
    seconds: float = 0.0  # of scoring, in all calls; 0 in labels of earlier versions

    def table(self) -> Table:
        """Returns, for each point, how often it is right and how many clips have it as their label."""
        rows = [(point, percent(v.right), v.labelled) for point, v in self.points.items()]
        return Table(
            f"labels of {plural(self.clips, 'clip')}, source {self.source}", ("point", "right %", "labelled"), rows
        )


def label(config: Config) -> LabelSummary | ShardResult:
    """Runs every point on every clip of the label source's splits, and derives the labels.

    Writes `outcomes.parquet` (one row per clip and point), `labels.parquet` (one row per clip) and `label.json` into
    `labels/` of the run folder. The ranks of a job share the clips; their number changes no label. A shard
    (`parallel.shard`) only scores its clips.

    Args:
        config: The run's config.

    Returns:
        The contents of `label.json`, or the name of the shard.

    Raises:
        UserError: No video of the source can be read, or the model was trained on clips of `holdout`.
        CheckpointError: There is no trained model.
    """
    path = label_summary_path(config.run.dir)
    with ranks(config), sole_writer(config, "label") as guard:
        # This and the model come first: indexing may take hours.
        checkpoint = broadcast_checkpoint(lambda: trained_checkpoint(config))
        model = inference_model(config, checkpoint)
        manifest = broadcast_result(lambda: load_or_index(config))
        scored = _score(model, checkpoint, manifest, config)
        if scored is None:
            return ShardResult(str(config.parallel.shard))

        def write() -> LabelSummary:
            tables, summary = _labelled(manifest, scored.load("label.source"), config)
            with guard():
                path.unlink(missing_ok=True)  # if the call ends here, it must not stand beside new tables
                for name, table in tables.items():
                    write_parquet(path.with_name(f"{name}.parquet"), table)
                write_json(path, summary.to_json())  # last: it stands for complete tables
            return summary

        return broadcast_result(write)


def _score(model: TimeSformer, checkpoint: Checkpoint, manifest: Manifest, config: Config) -> ScoreFiles | None:
    splits = LABEL_SPLITS[config.label.source]
    rows = manifest.readable_rows(*splits).tolist()  # videos that failed in indexing are not read again
    if not rows:
        raise UserError(f"label.source: {config.label.source} has no readable video in {' and '.join(splits)}")
    if config.label.source == "holdout":
        require_held_out(checkpoint, manifest, config)
    return score(model, manifest, rows, config, name="label", temporal_views=1)


def _labelled(manifest: Manifest, scores: Scores, config: Config) -> tuple[dict[str, pd.DataFrame], LabelSummary]:
    """Returns the tables by name, and the summary."""
    points, names, average = config.model.points, manifest["video"], config.evaluate.average
    table = pd.concat(  # one shard at a time, so that the logits of all clips are never in memory together
        outcome_table(names[shard.rows].tolist(), shard.clips, shard.truth, shard.probabilities(average), points)
        for shard in scores.shards()
    )
    classes = np.array([*manifest.classes, None], dtype=object)  # None stands at the place of `NO_CLASS`
    for column in ("truth", "prediction"):
        table[column] = classes[table[column]]
    clips, right = right_matrix(table, points, source=config.label.source)
    labels = choose_labels(right, config.label.none_right)
    if config.label.source != "teacher":  # which asks for agreement, not for the truth
        costliest = table[table["point"] == points[0]]
        note = guessing_note(costliest["truth"], costliest["prediction"])
        if note:
            say(f"point {points[0]}: {note}; an assigner has little to learn from these labels")
    if config.label.source == "holdout":
        say_other_mix(scores.rows, manifest, "accuracies here and on val differ for this reason, too")
    clips["label"] = labels
    summary = LabelSummary(
        source=config.label.source,
        none_right=config.label.none_right,
        manifest=manifest.hash,
        model=scores.model,
        files=labelled_files_digest(manifest, scores.rows.tolist()),
        clips=len(labels),
        failed=[{"path": str(failure.path), "cause": failure.cause} for failure in scores.failures],
        points={
            point: PointLabels(right=float(right[:, i].mean()), labelled=int((labels == i).sum()))
            for i, point in enumerate(points)
        },
        none_right_clips=int((~right.any(axis=1)).sum()),  # `right` is (clips, points)
        left_out=int((labels < 0).sum()),  # -1: a clip without a label
        inputs=label_inputs(config, manifest.hash, scores.model).to_json(),
        seconds=round(scores.seconds, 1),
    )
    return {"outcomes": table, "labels": clips}, summary


def say_other_mix(rows: npt.NDArray[np.integer], manifest: Manifest, consequence: str) -> None:
    """Prints that some clips have another mix of classes than val, and what follows, unless chance explains it.

    Args:
        rows: The clips, as row numbers of the manifest.
        manifest: Gives classes and sources.
        consequence: What follows, in words.
    """
    parts = (rows, manifest.readable_rows("val"))
    labels, sources = ([column[part] for part in parts] for column in (manifest["label"], manifest.sources))
    note = class_mix_note(labels, sources, manifest.classes)
    if note:
        say(f"{note}: {consequence}")


def class_mix_note(
    labels: Sequence[npt.NDArray[np.integer]], sources: Sequence[npt.NDArray[Any]], classes: Sequence[str]
) -> str | None:
    """Returns in words that some clips and val have another mix of classes; None if chance explains it.

    The test counts each source once, by the class of its first clip: those of one source are alike.

    Args:
        labels: Class number of each clip, and of each video of val.
        sources: Their sources.
        classes: The names of the classes.
    """
    counts = np.array([np.bincount(part, minlength=len(classes)) for part in labels])
    firsts = [np.unique(part, return_index=True)[1] for part in sources]
    tested = np.array(
        [np.bincount(part[first], minlength=len(classes)) for part, first in zip(labels, firsts, strict=True)]
    )
    if not counts.sum(1).all() or chi2_contingency(tested[:, tested.any(0)]).pvalue >= _SIGNIFICANT:
        return None
    here, there = counts / counts.sum(1, keepdims=True)
    most = int(np.abs(here - there).argmax())
    return (
        f"these clips have another mix of classes than val: {classes[most]} is {percent(here[most])} % of them, and "
        f"{percent(there[most])} % of val"
    )


def guessing_note(truth: pd.Series, prediction: pd.Series) -> str | None:
    """Returns in words that a model is not proven to be better than guessing; None if it is.

    Guessing is to answer always with the largest class. The test is an exact binomial one, one-sided at 5 %.

    Args:
        truth: The class of each clip.
        prediction: The model's answer for each clip.
    """
    counts, right = truth.value_counts(), int((truth == prediction).sum())
    largest = counts.iloc[0] / len(truth)
    if largest < 1 and binomtest(right, len(truth), largest, alternative="greater").pvalue < _SIGNIFICANT:
        return None
    return (
        f"right on {percent(right / len(truth))} % of {plural(len(truth), 'clip')}, which is not significantly more "
        f"than always answering with {counts.index[0]} ({percent(largest)} %)"
    )
