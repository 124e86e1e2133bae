"""Evaluates all policies on the val split: accuracy, cost and measured speed, with the population stated."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import UserError, plural
from videoadapt.evaluation.against_fixed import proven_policy
from videoadapt.evaluation.evaluated import VIEWS, evaluation_path, has_text, read_evaluation, reported_policy
from videoadapt.evaluation.logits_file import write_logits
from videoadapt.evaluation.outcomes import PolicyRow, Population, outcomes_of, policy_rows
from videoadapt.evaluation.result_tables import write_tables
from videoadapt.evaluation.speed import Speed, measure_speed
from videoadapt.model.checkpoint import Checkpoint, Guard, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import assigner_macs
from videoadapt.routing.label_inputs import label_inputs
from videoadapt.routing.policy import (
    Assigned,
    Evidence,
    Fixed,
    Oracle,
    Policy,
    Random,
    mix_of,
    parse_cascade,
    parse_leap,
    parse_policy,
)
from videoadapt.routing.policy_file import OF_RUN, PolicyFile, is_policy_file, say_other_inputs
from videoadapt.routing.scores import (
    Scores,
    files_digest,
    inference_model,
    score_split,
    trained_checkpoint,
)
from videoadapt.routing.threshold import have_several
from videoadapt.runtime.console import macs, percent, percent_interval, say, signed_points
from videoadapt.runtime.files import Summary, write_json
from videoadapt.runtime.inputs import Inputs
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.machine import device_name, machine, peak_memory_bytes, versions
from videoadapt.runtime.ranks import broadcast_result, ranks
from videoadapt.runtime.results import Result, ShardResult, Table
from videoadapt.training.exchange import broadcast_checkpoint
from videoadapt.training.trained_clips import trained_clips
from videoadapt.training.validate import selected_on_val

HARDEST = 5  # classes shown; all are in classes.csv


@dataclass(frozen=True)
class ClassRow:
    """The figures of one policy on one class."""

    name: str
    videos: int
    top1: float
    taken_for: str  # the most frequent wrong answer; empty if there is none


@dataclass(frozen=True, repr=False)
class EvaluationSummary(Result):
    """The contents of `evaluate.json`; the names are its keys."""

    split: str
    kind: str  # of the files of the split: `videos` or `images`
    manifest: str  # hash of the manifest
    files: str  # digest of the files that were read
    model: str  # digest of the weights
    inputs: dict[str, Any]  # what the result depends on, by `Inputs.to_json`
    trained_on: int | None  # videos of the split whose file or source the training had; None if no checkpoint says it
    selected_on_val: str | None  # how the split had a part in the choice of the checkpoint; see `selected_on_val`
    listed: int  # videos of the split
    largest_class: str  # of the listed videos
    largest_class_fraction: float  # the top-1 of a model that always answers with it
    scored: int  # videos that could be read
    sources: int | None  # of the listed videos, which intervals draw as a whole; None: no two are of one source
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
    hardest_policy: str  # whose figures these are; see `reported_policy`
    favoured: str | None  # the policy that is proven to route well (`proven_policy`); None: none is
    classes: int  # classes of the manifest
    promises: dict[str, str]  # of the policies that come from a file of `calibrate`, by their names
    speed: Speed | None  # how the speed was measured; None if `evaluate.speed_seconds` or `speed_clips` is 0
    stages: dict[str, float]  # seconds of scoring, of measuring the speed, and of writing tables
    date: str
    machine: dict[str, str | int]  # CPU, CPUs that the process may use, system and device
    versions: dict[str, str]  # of Python, videoadapt and torch
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
            "speed": asdict(self.speed) if self.speed else None,
        }

    def table(self) -> Table:
        """Returns accuracy, cost and speed of each policy."""
        rows = [
            (
                name,
                percent_interval(row.top1, row.accuracies.top1_low, row.accuracies.top1_high),
                signed_points(row.difference_to_costliest),
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


def evaluate(config: Config, policies: Sequence[Policy | str] = ()) -> EvaluationSummary | ShardResult:
    """Evaluates the fixed, assigned, random, cascade and oracle policies on the val split.

    Writes tables per view, clip and video (Parquet), per class and of confusions (CSV), the logits (`logits.npz`) and
    `evaluate.json` into `evaluate/` of the run folder. Every listed video counts; `evaluate.failed` decides how a
    failed one counts. The ranks of a job share the videos; their number changes no result. A shard (`parallel.shard`)
    only scores its videos.

    Args:
        config: The run's config.
        policies: Further policies: policies, their texts, or the file that `calibrate` wrote. The file of this run is
            evaluated always, if it is of the same weights.

    Returns:
        The contents of `evaluate.json`, or the name of the shard.

    Raises:
        UserError: No video can be read, a policy does not fit the model, or two policies have the same name.
        CheckpointError: There is no model, or the run's assigner does not fit it.
        RunError: A video could be read while it was scored, and cannot be read for the speed measurement.
    """
    path = evaluation_path(config.run.dir)
    with ranks(config), sole_writer(config, "evaluate") as guard:
        checkpoint = broadcast_checkpoint(lambda: trained_checkpoint(config))
        model = inference_model(config, checkpoint)
        selected = selected_on_val(checkpoint, chosen=config.run.checkpoint not in (None, Path("last")))
        assigned = Assigned.for_model(config.run.dir, model, config.assign)
        routed: list[Policy] = [
            *(parse_cascade(text, config.model, config.run.dir, model) for text in config.evaluate.cascade),
            *(parse_leap(text, config.model, config.run.dir, model) for text in config.evaluate.leap),
        ]
        policies = [*policies, *_calibrated(policies, assigned, model, config)]
        further, promises = _further(policies, routed, assigned, model, config)
        _require_usable(further, routed, model, assigned)  # before indexing and scoring, which may take hours
        manifest = broadcast_result(lambda: load_or_index(config))
        trained_on = _trained_on(checkpoint, manifest)
        if assigned is not None:
            assigned.say_other_inputs(label_inputs(config, manifest.hash, None))
        for text in filter(is_policy_file, policies):
            say_other_inputs(Path(text), config, manifest.hash)
        if not len(manifest.readable_rows("val")):
            raise UserError("data.val.annotations: the val split has no readable video; set it, and data.root")
        scored = score_split(model, manifest, "val", config, name="evaluate", assigned=assigned)
        scored_at = time.monotonic()
        if scored is None:
            return ShardResult(str(config.parallel.shard))

        def write() -> EvaluationSummary:
            scores = scored.load("data.val.annotations")
            before = _evaluation_before(config.run.dir)
            every = _policies(model.config.points, scores, assigned, [*routed, *further], config)
            found = _summary(
                model, manifest, scores, every, guard, config=config, trained_on=trained_on, selected=selected
            )
            # An earlier call may have scored some of the videos, or all.
            seconds = scores.seconds + time.monotonic() - scored_at
            stages = {"score": round(scores.seconds, 1)} | found.stages
            summary = replace(found, promises=promises, stages=stages, seconds=round(seconds, 1))
            with guard():
                write_json(path, summary.to_json())
            _say_replaced(before, summary)
            return summary

        return broadcast_result(write)


def _evaluation_before(run: Path) -> Summary:
    """Returns the `evaluate.json` that the run has; an empty one if it has no readable one."""
    try:
        return read_evaluation(run)
    except UserError:
        return {"policies": {}}


def _say_replaced(before: Summary, now: EvaluationSummary) -> None:
    """Prints which policies and views the evaluation before had, and this one has not."""
    if gone := [name for name in before["policies"] if has_text(name) and name not in now.policies]:
        kept = " ".join(f"--policy {name}" for name in gone)
        say(f"the evaluation before had more policies, which this one has replaced; {kept} brings them back")
    views = {f"evaluate.{key}": before[key] for key in VIEWS if before.get(key, getattr(now, key)) != getattr(now, key)}
    if views:
        keys = " ".join(f"{key}={value}" for key, value in views.items())
        say(
            f"the evaluation before had other views ({keys}); this one has replaced it. To keep both, evaluate a copy "
            "of the run folder"
        )


def _calibrated(
    policies: Sequence[Policy | str], assigned: Assigned | None, model: TimeSformer, config: Config
) -> list[str]:
    """Returns the run's own file of `calibrate`, unless it is given already, or of other weights."""
    path = config.run.dir / OF_RUN
    if not path.exists() or path in [Path(given) for given in policies if is_policy_file(given)]:
        return []
    try:
        parse_policy(str(path), assigned, model.config, config.run.dir, model)
    except UserError as error:
        say(f"evaluate: without the calibrated policy: {error}")
        return []
    return [str(path)]


def _further(
    policies: Sequence[Policy | str],
    routed: Sequence[Policy],
    assigned: Assigned | None,
    model: TimeSformer,
    config: Config,
) -> tuple[list[Policy], dict[str, str]]:
    """Returns the further policies, and the promises of those that come from a file.

    A text or file whose policy is evaluated anyway adds none.
    """
    evaluated: list[Policy] = [*map(Fixed, model.config.points), *([assigned] if assigned else []), *routed]
    known: dict[str, Policy] = {policy.name: policy for policy in evaluated}
    further: list[Policy] = []
    promises = {}
    for given in policies:
        policy = given
        if isinstance(policy, str):
            policy = parse_policy(policy, assigned, model.config, config.run.dir, model)
        other = known.get(policy.name)
        # A leap of other labels has the same name, and other numbers.
        if other is not None and other != policy and given == str(config.run.dir / OF_RUN):
            say(f"evaluate: without the calibrated policy: another one here is named {policy.name}")
            continue
        if is_policy_file(given):
            promises[policy.name] = PolicyFile.read(Path(given)).promise
        if isinstance(given, str):
            if other == policy:
                continue
            known[policy.name] = policy  # the run's own file of `calibrate` may hold the policy of a text
        further.append(policy)
    return further, promises


def _trained_on(checkpoint: Checkpoint, manifest: Manifest) -> int | None:
    """Returns how many videos of the val split the training had, or others of their sources. Prints what it finds."""
    videos = manifest.split("val").readable
    # Without the id: folders of classes often hold train/a/1.png and val/a/1.png.
    files = trained_clips(checkpoint, videos, ("content",))
    count = trained_clips(checkpoint, videos, ("source", "content"))
    if files:
        say(
            f"files of the val split that were in the training of {checkpoint.path}: {files} of {len(videos)}; they "
            "count in the accuracy. `videoadapt index` lists equal files, and whether their classes differ"
        )
    if count and count > (files or 0):
        say(
            f"videos of the val split whose source had other videos in the training: {count - (files or 0)} of "
            f"{len(videos)}; they may be easier than others. A source is a YouTube id, or by data.source_pattern"
        )
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
    before = time.monotonic()
    speed = measure_speed(model, manifest, scores, outcomes, config)
    measured = time.monotonic()
    path = evaluation_path(config.run.dir)
    with guard():
        # The old summary is removed first: if writing the tables fails, it must not stand beside the new tables.
        path.unlink(missing_ok=True)
        classes = write_tables(config, scores, population, outcomes)
        write_logits(path.with_name("logits.npz"), scores, population, dict(enumerate(manifest["path"])), points)
    stages = {"speed": measured - before, "tables": time.monotonic() - measured}
    evaluated, labels = config.evaluate, manifest.split("val")["label"]
    largest = np.bincount(labels).argmax()
    rows = policy_rows(outcomes, population, speed.clips_per_s if speed else {}, config)
    texts = {name: row.to_json() for name, row in rows.items()}
    reported = reported_policy(texts)
    return EvaluationSummary(
        split="val",
        kind="images" if set(manifest.split("val").readable["reader"]) == {"image"} else "videos",
        manifest=manifest.hash,
        files=files_digest(manifest, sorted(set(scores.rows.tolist()))),
        model=scores.model,
        inputs=Inputs.of(config, manifest.hash, scores.model, "run", "data", "model", "evaluate").to_json(),
        trained_on=trained_on,
        selected_on_val=selected,
        listed=len(population.videos),
        largest_class=manifest.classes[int(largest)],
        largest_class_fraction=float((labels == largest).mean()),
        scored=len(population.scored),
        sources=len(np.unique(population.sources)) if have_several(population.sources) else None,
        failed=population.failed,
        failed_count_as=evaluated.failed,
        temporal_views=evaluated.temporal_views,
        spatial_crops=evaluated.spatial_crops,
        views_per_video=evaluated.views,
        views=describe_views(config),
        macs_per_view=point_macs(config.model),
        assigner_macs=assigner_macs(config.assign, len(points)) if any(p.assigner for p in policies) else None,
        policies=rows,
        hardest_classes=_hardest(classes, reported),
        hardest_policy=reported,
        favoured=proven_policy(texts),
        classes=len(manifest.classes),
        promises={},
        speed=speed,
        stages={name: round(seconds, 1) for name, seconds in stages.items()},
        date=datetime.date.today().isoformat(),
        machine=machine() | {"device": device_name(model.head.weight.device)},
        versions=versions(("videoadapt", "torch")),
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


def _hardest(classes: pd.DataFrame, policy: str) -> list[ClassRow]:
    """Returns the worst classes of a policy. Classes with a single video are left out."""
    own = classes[(classes["policy"] == policy) & (classes["videos"] > 1)]
    shown = own.head(HARDEST)[["class", "videos", "top1", "taken_for"]]
    return [ClassRow(*row) for row in shown.itertuples(index=False, name=None)]


def _require_usable(
    further: Sequence[Policy], routed: Sequence[Policy], model: TimeSformer, assigned: Assigned | None
) -> None:
    """Raises an error if a further policy does not fit the run."""
    names = [*(Fixed(point).name for point in model.config.points), "assigned", Random.name, Oracle.name]
    names += [policy.name for policy in routed]
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
        sources=pd.factorize(manifest.split("val").sources)[0],
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
