"""Evaluates all policies on the val split: accuracy, cost and measured speed, with the population stated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import RunError, UserError, plural
from videoadapt.evaluation.outcomes import Outcome, PolicyRow, Population, outcomes_of, policy_rows, write_tables
from videoadapt.model.checkpoint import Checkpoint, Guard, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import assigner_macs
from videoadapt.routing.label_inputs import label_inputs
from videoadapt.routing.label_rules import Choice
from videoadapt.routing.policy import Assigned, Evidence, Fixed, Oracle, Policy, Random, mix_of, parse_cascade
from videoadapt.routing.router import route
from videoadapt.routing.scores import (
    Scores,
    files_digest,
    inference_model,
    score,
    trained_checkpoint,
)
from videoadapt.runtime.console import Bar, macs, percent, say
from videoadapt.runtime.files import Summary, write_json
from videoadapt.runtime.inputs import Inputs
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.machine import peak_memory_bytes
from videoadapt.runtime.ranks import broadcast_result, rank0_then_all, ranks
from videoadapt.runtime.results import Result, ShardResult, Table
from videoadapt.training.trained_clips import trained_clips
from videoadapt.training.validate import selected_on_val

HARDEST = 5  # classes shown; all are in classes.csv


@dataclass(frozen=True)
class ClassRow:
    """The figures of the first policy on one class."""

    name: str
    videos: int
    top1: float
    taken_for: str  # the most frequent wrong answer; empty if there is none


@dataclass(frozen=True, repr=False)
class EvaluationSummary(Result):
    """The contents of `evaluate.json`; the names are its keys."""

    split: str
    manifest: str  # hash of the manifest
    files: str  # digest of the files that were read
    model: str  # digest of the weights
    inputs: dict[str, Any]  # what the result depends on, by `Inputs.to_json`
    trained_on: int | None  # videos of the split that the model was trained on; None if its checkpoint does not say
    selected_on_val: str | None  # how the split had a part in the choice of the checkpoint; see `selected_on_val`
    listed: int  # videos of the split
    scored: int  # videos that could be read
    failed: list[dict[str, str]]  # path and cause of the others
    failed_count_as: str  # `wrong` or `exclude`
    temporal_views: int
    spatial_crops: int
    views_per_video: int
    views: str  # the views of a video and their mean, in words; see `describe_views`
    macs_per_view: dict[str, int]  # MACs of the model, by point
    assigner_macs: int | None  # MACs for one clip; None without an assigner
    policies: dict[str, PolicyRow]
    hardest_classes: list[ClassRow]
    peak_memory_bytes: int | None
    seconds: float = 0.0

    def content(self) -> Summary:
        """Returns the contents of `evaluate.json`: the figures of a policy stand in one row."""
        return vars(self) | {
            "policies": {name: row.to_json() for name, row in self.policies.items()},
            "hardest_classes": [
                {"class": row.name, "videos": row.videos, "top1": row.top1, "taken_for": row.taken_for}
                for row in self.hardest_classes
            ],
        }

    def table(self) -> Table:
        """Returns accuracy, cost and speed of each policy."""
        rows = [
            (
                name,
                f"{percent(row.top1)} ({percent(row.accuracies.top1_low)} to {percent(row.accuracies.top1_high)})",
                "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in row.difference_to_costliest)),
                macs(row.costs.macs_per_video),
                percent(row.macs_saved),
                "-" if row.clips_per_s is None else f"{row.clips_per_s:.1f}",
            )
            for name, row in self.policies.items()
        ]
        columns = ("policy", "top-1 % (95 %)", "to costliest", "MACs/video", "saved %", "clips/s")
        return Table(
            f"{plural(self.listed, 'video')} of {self.split}, {self.scored} read; each: {self.views}", columns, rows
        )


def evaluate(config: Config, policies: Sequence[Policy] = ()) -> EvaluationSummary | ShardResult:
    """Evaluates the fixed, assigned, random, cascade and oracle policies on the val split.

    Writes tables per view, clip and video (Parquet) and per class (CSV), and `evaluate.json`, into `evaluate/` of the
    run folder. Every listed video counts; `evaluate.failed` decides how a failed one counts. The ranks of a job share
    the videos; their number changes no result. A shard (`parallel.shard`) only scores its videos.

    Args:
        config: The run's config.
        policies: Further policies to evaluate.

    Returns:
        The contents of `evaluate.json`, or the name of the shard.

    Raises:
        UserError: No video can be read, a policy does not fit the model, or two policies have the same name.
        CheckpointError: There is no model, or the run's assigner does not fit it.
        RunError: A video could be read while it was scored, and cannot be read for the speed measurement.
    """
    start = time.monotonic()
    path = config.run.dir / "evaluate" / "evaluate.json"
    with ranks(config), sole_writer(config, "evaluate") as guard:
        checkpoint = trained_checkpoint(config)
        model = inference_model(config, checkpoint)
        selected = selected_on_val(checkpoint, chosen=config.run.checkpoint not in (None, Path("last")))
        assigned = Assigned.for_model(config.run.dir, model, config.assign)
        cascades = [parse_cascade(text, config.model, config.run.dir, model) for text in config.evaluate.cascade]
        _require_usable(policies, cascades, model, assigned)  # before indexing and scoring, which may take hours
        manifest = rank0_then_all(lambda: load_or_index(config))
        trained_on = _trained_on(checkpoint, manifest)
        if assigned is not None:
            assigned.say_other_inputs(label_inputs(config, manifest.hash, None))
        scores = _score(model, manifest, assigned, config)
        if scores is None:
            return ShardResult(str(config.parallel.shard))

        def write() -> EvaluationSummary:
            every = _policies(model.config.points, scores, assigned, [*cascades, *policies], config)
            found = _summary(
                model, manifest, scores, every, guard, config=config, trained_on=trained_on, selected=selected
            )
            summary = replace(found, seconds=round(time.monotonic() - start, 1))
            with guard():
                write_json(path, summary.to_json())
            return summary

        return broadcast_result(write)


def _score(model: TimeSformer, manifest: Manifest, assigned: Assigned | None, config: Config) -> Scores | None:
    frame = manifest.table
    # Videos that failed in indexing are not read again; `_population` counts them.
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
        assigner=assigned.assigner if assigned else None,
    )
    if scores is not None and not len(scores.rows):
        first = scores.failures[0]
        raise UserError(
            f"data.val.annotations: none of {plural(len(rows), 'video')} could be scored; {first.path}: {first.cause}"
        )
    return scores


def _trained_on(checkpoint: Checkpoint, manifest: Manifest) -> int | None:
    """Returns how many videos of the val split the model was trained on; prints a message if there are any."""
    videos = manifest.split("val").readable
    # Without the id: folders of classes often hold train/a/1.png and val/a/1.png.
    count = trained_clips(checkpoint, videos, ("source", "content"))
    if count:
        say(f"{count} of the {plural(len(videos), 'video')} of the val split were in the training of {checkpoint.path}")
    return count


def _summary(
    model: TimeSformer,
    manifest: Manifest,
    scores: Scores,
    policies: list[Policy],
    guard: Guard,
    *,
    config: Config,
    trained_on: int | None,
    selected: str | None,
) -> EvaluationSummary:
    points = model.config.points
    population = _population(manifest, scores)
    outcomes = outcomes_of(scores, policies, config)
    speeds = _speeds(model, manifest, scores, outcomes, config)
    with guard():
        # The old summary is removed first: if writing the tables fails, it must not stand beside the new tables.
        (config.run.dir / "evaluate" / "evaluate.json").unlink(missing_ok=True)
        classes = write_tables(config, scores, population, outcomes)
    evaluated = config.evaluate
    return EvaluationSummary(
        split="val",
        manifest=manifest.hash,
        files=files_digest(manifest, sorted(set(scores.rows.tolist()))),
        model=scores.model,
        inputs=Inputs.of(config, manifest.hash, scores.model, "run", "data", "model", "evaluate").to_json(),
        trained_on=trained_on,
        selected_on_val=selected,
        listed=len(population.videos),
        scored=len(population.scored),
        failed=population.failed,
        failed_count_as=evaluated.failed,
        temporal_views=evaluated.temporal_views,
        spatial_crops=evaluated.spatial_crops,
        views_per_video=evaluated.temporal_views * evaluated.spatial_crops,
        views=describe_views(config),
        macs_per_view=point_macs(config.model),
        assigner_macs=assigner_macs(config.assign, len(points)) if any(p.assigner for p in policies) else None,
        policies=policy_rows(outcomes, population, speeds, config),
        hardest_classes=_hardest(classes),
        peak_memory_bytes=peak_memory_bytes(),
    )


def describe_views(config: Config) -> str:
    """Returns the views of a video and their mean in words, such as `1 clip x 3 crops, logits averaged`.

    Settings at their defaults are left out.
    """
    views = config.evaluate
    clips, crops = views.temporal_views, views.spatial_crops
    text = f"{clips} clip{'s' * (clips != 1)} x {crops} crop{'s' * (crops != 1)}"
    changed = {
        "from frame 0": clips == 1 and views.single_clip == "start",
        "crops rounded up": views.crop_offset == "ceil",
        "not antialiased": not config.data.antialias,
        "logits averaged": views.average == "logits",
    }
    return ", ".join([text, *(name for name, is_so in changed.items() if is_so)])


def _hardest(classes: pd.DataFrame) -> list[ClassRow]:
    """Returns the worst classes of the first policy. Classes with a single video are left out."""
    first = classes[(classes["policy"] == classes["policy"].iloc[0]) & (classes["videos"] > 1)]
    shown = first.head(HARDEST)[["class", "videos", "top1", "taken_for"]]
    return [ClassRow(*row) for row in shown.itertuples(index=False, name=None)]


def _require_usable(
    further: Sequence[Policy], cascades: Sequence[Policy], model: TimeSformer, assigned: Assigned | None
) -> None:
    """Raises an error if a further policy does not fit the run."""
    names = [*(Fixed(point).name for point in model.config.points), Assigned.name, Random.name, Oracle.name]
    names += [policy.name for policy in cascades]
    digest = weights_digest(assigned.assigner) if assigned is not None else None
    for policy in further:
        policy.check(model)
        if policy.name in names:
            raise UserError(f"evaluate: two policies are named {policy.name}; give each policy a different name")
        names.append(policy.name)
        # Scores hold the probabilities of one assigner.
        if policy.assigner is not None and weights_digest(policy.assigner) != digest:
            raise UserError(f"policy {policy.name}: its assigner is not of this run; load it from this run")


def _population(manifest: Manifest, scores: Scores) -> Population:
    """Returns all listed videos of the val split; videos that failed in indexing or decoding have a cause."""
    listed = manifest.table[manifest.table["split"] == "val"]
    causes = {row: cause for row, cause in zip(listed.index, listed["cause"], strict=True) if cause}
    causes |= {failure.video: failure.cause for failure in scores.failures}
    position = {row: i for i, row in enumerate(listed.index)}  # manifest row to position among the listed videos
    return Population(
        videos=listed["video"].tolist(),
        truth=listed["label"].to_numpy(np.int64),
        classes=manifest.classes,
        scored=np.array([position[row] for row in dict.fromkeys(scores.rows.tolist())], dtype=np.int64),
        failed=[{"path": str(listed.loc[row, "path"]), "cause": cause} for row, cause in causes.items()],
    )


def _policies(
    points: tuple[str, ...], scores: Scores, assigned: Assigned | None, further: Sequence[Policy], config: Config
) -> list[Policy]:
    policies: list[Policy] = [Fixed(point) for point in points]
    if assigned is not None:
        # Random routing with the same mix runs the same points, so the difference in accuracy is due to the choices.
        choice = assigned.choose(Evidence(len(scores.rows), points, scores.assigned))
        policies += [assigned, Random(mix_of(choice, len(points)), config.run.seed, imitates=assigned.name)]
    return [*policies, *further, Oracle()]


def _speeds(
    model: TimeSformer, manifest: Manifest, scores: Scores, outcomes: list[Outcome], config: Config
) -> dict[str, float]:
    """Measures each policy's clips per second on the same random clips: assigner, routing and model, without decoding.

    Policies run in turn, so that a slow moment of the machine affects all of them. The median of
    `evaluate.speed_repeats` rounds counts, after one round to warm up.
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
                    right=scores.right[drawn],
                    average=config.evaluate.average,
                )
                seconds[outcome.policy.name].append(time.perf_counter() - start)
                bar.step(1, outcome.policy.name)
    return {name: count / float(np.median(times[1:])) for name, times in seconds.items()}  # the first pass warms up


def _decoded(manifest: Manifest, scores: Scores, drawn: Choice, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes some of the scored clips: views `(clips, crops, C, T, S, S)` and thumbnails `(clips, C, A, s, s)`."""
    dataset = EvalVideos(
        manifest,
        config,
        temporal_views=config.evaluate.temporal_views,
        spatial_crops=config.evaluate.spatial_crops,
    )
    rows = list(dict.fromkeys(scores.rows[drawn].tolist()))  # each video once, in order
    videos = {video.video: video for video in stream(dataset, rows) if isinstance(video, VideoViews)}
    missing = [row for row in rows if row not in videos]
    if missing:
        raise RunError(
            f"evaluate: {manifest.row(missing[0]).path} was readable when it was scored, and cannot be read now; run "
            "`evaluate` again"
        )
    wanted = [(videos[row], clip) for row, clip in zip(scores.rows[drawn], scores.clips[drawn], strict=True)]
    return torch.stack([v.views[c] for v, c in wanted]), torch.stack([v.thumbnails[c] for v, c in wanted])
