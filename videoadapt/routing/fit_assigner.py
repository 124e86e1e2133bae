"""Stage 2, second half: fits the assigner to the labels, and chooses its threshold on clips that it has not seen."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.config.sections import TrainConfig
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import RunError, UserError, few, plural
from videoadapt.model.checkpoint import (
    Checkpoints,
    load_tensors,
    optimizer_tensors,
    require_same,
    restore_optimizer,
    weights_digest,
)
from videoadapt.routing.assigner import Assigner, assigner_checkpoints, assigner_loss, assigner_macs
from videoadapt.routing.label_inputs import (
    label_inputs,
    outcomes_path,
    read_label_summary,
    read_outcomes,
    require_same_label_inputs,
)
from videoadapt.routing.label_rules import (
    LABEL_SPLITS,
    Bools,
    Choice,
    Interval,
    cheapest_sufficient,
    choose_labels,
    right_matrix,
)
from videoadapt.routing.router import assign_probabilities
from videoadapt.routing.scores import inference_model, labelled_files_digest
from videoadapt.routing.threshold import (
    FixedPoint,
    Rule,
    clips_needed,
    difference,
    fixed_points,
    largest_loss,
    over_random,
    separation,
    supported_threshold,
)
from videoadapt.routing.thumbnails import read_thumbnails
from videoadapt.runtime.console import Bar, percent, say
from videoadapt.runtime.files import write_json, write_parquet
from videoadapt.runtime.inputs import Inputs
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.machine import pick_device
from videoadapt.runtime.ranks import broadcast_result, ranks
from videoadapt.runtime.results import Result, Table
from videoadapt.runtime.signals import StopRequest
from videoadapt.training.optim import make_optimizer, make_schedule
from videoadapt.training.trained_clips import TENSOR, keys_of

SELECTING = "selecting.parquet"  # the assigner's probabilities on the clips that chose its threshold


@dataclass(frozen=True)
class LabelledClips:
    """Clips with labels and outcomes.

    Attributes:
        thumbnails: uint8 `(all, C, A, s, s)`. They stay on the disk until a batch of them is needed.
        rows: Rows of the clips in `thumbnails`, `(n,)`.
        labels: Number of each clip's label, `(n,)`.
        right: Whether the model is right, `(n, points)`.
        inputs: What the labels depend on.
        keys: `trained_clips.keys_of` all labelled clips, those that choose the threshold included.
        names: Columns `video` and `clip`, a row for each of the n clips.
        sources: Number of each clip's source, `(n,)`: clips of one source are alike.
        files: `files_digest` of the labelled videos.
    """

    thumbnails: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int64]
    labels: Choice
    right: Bools
    inputs: Inputs
    keys: Tensor
    names: pd.DataFrame
    sources: Choice
    files: str

    def take(self, rows: npt.NDArray[np.int64]) -> LabelledClips:
        """Returns some of the clips."""
        arrays = {name: getattr(self, name)[rows] for name in ("rows", "labels", "right", "sources")}
        return replace(self, names=self.names.iloc[rows], **arrays)

    def batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Returns the thumbnails of some of the clips, uint8 `(B, C, A, s, s)`."""
        return torch.from_numpy(self.thumbnails[self.rows[rows]])

    def digest(self) -> str:
        """Returns 12 hex digits that change with the labels and outcomes."""
        return hashlib.sha256(self.labels.tobytes() + self.right.tobytes()).hexdigest()[:12]


@dataclass(frozen=True, repr=False)
class AssignSummary(Result):
    """The contents of `assign.json`; the names are its keys. Fractions are of the clips that chose the threshold."""

    clips_fitted: int
    clips_selecting: int  # clips that chose the threshold
    source: str  # of the labels, `label.source`
    loss_first: float | None  # mean loss of the first of several epochs; None if an earlier version ran it
    loss_last: float | None  # mean loss of the last epoch
    threshold: float
    rule: Rule  # what the threshold rests on; see `Threshold`
    confidence: float  # of a proof
    clips_needed: int | None  # about how many selecting clips prove `assign.tolerance`, if none is lost; None: none do
    auc: Interval  # see `separation`
    loss_at_most: float  # clips on which the costliest point is right and the assigned one wrong, with `confidence`
    difference: Interval  # accuracy minus the costliest point's
    over_random: Interval  # accuracy minus that of random routing with the same mix
    fixed: dict[str, FixedPoint]  # what one point for all clips would save and lose
    label_accuracy: float  # the most probable label is the label
    accuracy: float  # the model's accuracy at the assigned points
    accuracy_costliest: float  # the model's accuracy at the costliest point
    macs_saved: float  # against the costliest point, the assigner's cost included
    mix: dict[str, float]  # fraction of the clips at each point
    assigner_macs: int  # MACs of the assigner for one clip
    assigner_fraction: float  # `assigner_macs` over the MACs of a view at the costliest point
    seconds: float

    def table(self) -> Table:
        """Returns what the assigner saves and loses, and its mix of points."""
        rows = [
            ("accuracy, assigned %", percent(self.accuracy)),
            ("accuracy, costliest point %", percent(self.accuracy_costliest)),
            ("MACs saved %", percent(self.macs_saved)),
            ("threshold", f"{self.threshold:.3f}, {self.rule}"),
            ("AUC", "{:.2f} ({:.2f} to {:.2f})".format(*self.auc)),
            *((f"clips at {point} %", percent(fraction)) for point, fraction in self.mix.items()),
        ]
        fitted = plural(self.clips_fitted, "clip")
        title = f"fitted to {fitted}; figures of {self.clips_selecting} others, which chose the threshold"
        return Table(title, ("", ""), rows)


def assign(config: Config) -> AssignSummary:
    """Fits the assigner on the run's label table, and resumes from its newest checkpoint.

    A fraction `assign.select` of the clips is set aside. On them the threshold is chosen that saves most while it loses
    at most `assign.tolerance` of the costliest point's accuracy: by proof where the clips suffice for one, otherwise by
    estimate (`supported_threshold`). One rank does all work.

    Args:
        config: The run's config.

    Returns:
        The contents of `assign.json`.

    Raises:
        UserError: There is no label table, it does not fit the config, or it has too few clips.
        CheckpointError: An earlier assigner of this run was fitted with other settings.
        RunError: The loss is NaN or infinite.
    """
    with ranks(config), sole_writer(config, "assign") as guard:
        return broadcast_result(lambda: _assign(config, assigner_checkpoints(config.run.dir, guard)))


def _assign(config: Config, checkpoints: Checkpoints) -> AssignSummary:
    start = time.monotonic()
    points = config.model.points
    if len(points) == 1:
        raise UserError("assign: the model has one point only, so there is nothing to choose; see model.points")
    clips = _labelled_clips(config)
    order, kept = _whole_sources(clips.sources, config.assign.select, config.run.seed)
    select, fit = clips.take(np.sort(order[:kept])), clips.take(np.sort(order[kept:]))
    if not len(fit.labels):
        raise UserError(f"assign: {plural(len(order), 'labelled clip')}: too few to fit and to choose a threshold")
    assigner, losses = _fit(fit, config, checkpoints)
    costs = np.array(list(point_macs(config.model).values()), dtype=np.float64)  # (points,), costliest first
    # Rounded up. The thumbnails of all clips may not fit into memory together.
    batches = np.array_split(np.arange(kept), -(-kept // config.assign.batch))
    quick = assigner.for_inference()
    probabilities = np.concatenate([assign_probabilities(quick, select.batch(batch)) for batch in batches])
    macs, delta = assigner_macs(config.assign, len(points)), config.calibrate.delta
    tolerance = config.assign.tolerance
    found = supported_threshold(
        probabilities,
        select.right,
        costs,
        assigner_cost=macs,
        tolerance=tolerance,
        delta=delta,
        sources=select.sources,
    )
    threshold = found.value
    tensors, meta = _tensors(assigner, None) | {TENSOR: fit.keys}, _meta(config, fit, losses)
    checkpoints.save(len(losses) + 1, tensors, meta | {"threshold": threshold})
    choice = cheapest_sufficient(probabilities, threshold)
    right = select.right[np.arange(kept), choice]  # (clips,)
    summary = AssignSummary(
        clips_fitted=len(fit.labels),
        clips_selecting=len(select.labels),
        source=config.label.source,
        loss_first=losses[0] if len(losses) > 1 else None,
        loss_last=losses[-1],
        threshold=threshold,
        rule=found.rule,
        confidence=1 - delta,
        clips_needed=clips_needed(tolerance, delta, select.sources),
        auc=separation(probabilities, select.right, select.sources),
        loss_at_most=largest_loss(select.right, choice, delta, select.sources),
        difference=difference(right, select.right[:, 0], select.sources),
        over_random=over_random(select.right, choice, select.sources),
        fixed=fixed_points(select.right, costs, points, select.sources),
        label_accuracy=float((probabilities.argmax(-1) == select.labels).mean()),
        accuracy=float(right.mean()),
        accuracy_costliest=float(select.right[:, 0].mean()),  # column 0 is the costliest point
        macs_saved=float(1 - (costs[choice].mean() + macs) / costs[0]),
        mix={point: float((choice == i).mean()) for i, point in enumerate(points)},
        assigner_macs=macs,
        assigner_fraction=macs / costs[0],
        seconds=round(time.monotonic() - start, 1),
    )
    with checkpoints.guard():
        frame = select.names.reset_index(drop=True).join(pd.DataFrame(probabilities, columns=list(points)))
        write_parquet(config.run.dir / "assigner" / SELECTING, frame)
        write_json(config.run.dir / "assigner" / "assign.json", summary.to_json())
    return summary


def _whole_sources(sources: Choice, fraction: float, seed: int) -> tuple[npt.NDArray[np.int64], int]:
    """Returns an order of clips, source by source, and how many of the first clips are at least a fraction of all.

    The order depends on the seed alone: an interrupted fit sets the same clips aside.
    """
    if not len(sources):
        return np.arange(0), 0
    place = np.argsort(np.random.default_rng(seed).permutation(sources.max() + 1))[sources]  # (clips,)
    order = np.argsort(place, kind="stable")
    last = place[order[max(1, round(len(order) * fraction)) - 1]]
    return order, int((place <= last).sum())


def _labelled_clips(config: Config) -> LabelledClips:
    path = outcomes_path(config.run.dir)
    if not path.exists():
        raise UserError(f"{path}: no label table; run `videoadapt label` with this config first")
    made_from = read_label_summary(config.run.dir)["source"]
    if made_from != config.label.source:
        raise UserError(
            f"{path}: the labels are of source {made_from}, but label.source is {config.label.source}; run `label`"
        )
    weights = _digest_of_model(config)  # checks the device and the checkpoint: indexing may take hours
    manifest = load_or_index(config)
    inputs = label_inputs(config, manifest.hash, weights)
    require_same_label_inputs(config.run.dir, inputs)
    clips, right = right_matrix(read_outcomes(config.run.dir), config.model.points, source=config.label.source)
    labels = choose_labels(right, config.label.none_right)
    labelled = manifest.table["split"].isin(LABEL_SPLITS[config.label.source])  # val may have the same names
    row_of = {video: row for row, video in manifest.table["video"][labelled].items()}
    unknown = [video for video in clips["video"] if video not in row_of]
    if unknown:
        raise UserError(f"{path}: {unknown[0]} (and {len(unknown) - 1} more) is not in the manifest; run `label` again")
    used = labels >= 0  # -1: a clip without a label
    rows = np.array([row_of[video] for video in clips["video"]])
    files = labelled_files_digest(manifest, rows.tolist())
    if read_label_summary(config.run.dir).get("files", files) != files:  # an earlier version did not record it
        raise UserError(f"{path}: the files of its videos have changed since; run `label` again")
    rows = rows[used]
    thumbnails, found = read_thumbnails(manifest, rows, config)
    own = Manifest(manifest.table.iloc[rows], manifest.classes)
    return LabelledClips(
        thumbnails,
        np.flatnonzero(found),
        labels[used][found],
        right[used][found],
        inputs,
        keys_of(own),
        clips[used][found],
        pd.factorize(own.sources[found])[0],
        files,
    )


def _digest_of_model(config: Config) -> str | None:
    """Returns the digest of the weights that `label` would use now; None, with a message, without a checkpoint."""
    if config.run.checkpoint is None and not any((config.run.dir / "checkpoints").glob("step-*")):
        say("the run has no checkpoint, so whether the labels belong to its weights cannot be found out")
        return None
    return weights_digest(inference_model(config))


def _fit(clips: LabelledClips, config: Config, checkpoints: Checkpoints) -> tuple[Assigner, list[float | None]]:
    """Trains the assigner. Returns it and the mean loss of each epoch.

    The order and the flips of an epoch depend on the seed and the epoch alone, so that resuming changes nothing.
    """
    settings = config.assign
    device = pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    assigner = Assigner(settings, len(config.model.points)).to(device)
    recipe = TrainConfig(
        optimizer="adamw",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        schedule="cosine",
        epochs=settings.epochs,
        warmup_epochs=min(1.0, settings.epochs / 10),  # a short fit is not all warm-up
    )
    optimizer = make_optimizer(assigner.named_parameters(), recipe)
    per_epoch = max(1, len(clips.labels) // settings.batch)  # as many as `_batches` makes
    schedule = make_schedule(optimizer, recipe, per_epoch)
    means = _resume(checkpoints, assigner, optimizer, config, clips)
    macs = point_macs(config.model)
    costs = torch.tensor([float(macs[p]) for p in config.model.points], device=device)
    with StopRequest() as stop, Bar("assign", total=settings.epochs, unit="epochs", start=len(means)) as bar:
        while (epoch := len(means)) < settings.epochs:
            losses = []
            assigner.train()
            for number, rows in enumerate(_batches(len(clips.labels), settings.batch, (config.run.seed, epoch))):
                schedule.step_update(epoch * per_epoch + number)
                thumbnails = _flip(clips.batch(rows), (config.run.seed, epoch, number)).to(device)  # (B, C, A, s, s)
                wrong = torch.from_numpy(~clips.right[rows]).float().to(device)  # (B, points)
                labels = torch.from_numpy(clips.labels[rows]).to(device)  # (B,)
                loss = assigner_loss(assigner(thumbnails), labels, wrong, costs, settings)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            mean = float(np.mean(losses))
            means.append(mean)
            _require_finite(assigner, losses, len(means))
            bar.step(1, f"loss {mean:.3f}")
            checkpoints.save(len(means), _tensors(assigner, optimizer), _meta(config, clips, means))
            if stop.requested:
                stop.stop()
    return assigner.eval(), means


def _require_finite(assigner: Assigner, losses: list[float], epoch: int) -> None:
    """Raises `RunError` after an epoch that diverged: its weights must not be saved, and choose no threshold."""
    if not (np.isfinite(losses).all() and all(tensor.isfinite().all() for tensor in assigner.state_dict().values())):
        raise RunError(
            f"assign: epoch {epoch} made the assigner's loss or weights NaN or infinite; they are not saved. "
            "Lower assign.lr"
        )


def _unused_folder(wanted: Path) -> Path:
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([wanted], numbered) if not folder.exists())


def _batches(count: int, batch: int, seed: tuple[int, ...]) -> list[npt.NDArray[np.int64]]:
    """Returns row numbers in random order, in whole batches; if there is no whole batch, in one smaller batch."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[i : i + batch] for i in range(0, max(count - batch, 0) + 1, batch)]


def _flip(thumbnails: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Flips each clip with probability 1/2, and all frames of a clip alike."""
    flips = torch.from_numpy(np.random.default_rng(seed).random(len(thumbnails)) < 0.5)  # noqa: PLR2004
    # (B,) to (B, 1, 1, 1, 1), which broadcasts over channels, frames and pixels
    return torch.where(flips[:, None, None, None, None], thumbnails.flip(-1), thumbnails)


def _tensors(assigner: Assigner, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    tensors = {f"model/{name}": t for name, t in assigner.state_dict().items()}
    if optimizer is not None:
        tensors |= optimizer_tensors(assigner, optimizer)
    return tensors


def _meta(config: Config, clips: LabelledClips, losses: Sequence[float | None]) -> dict[str, Any]:
    """Returns settings, points, digests of labels and model, and the mean loss of each epoch.

    The threshold is added when the fit is complete.
    """
    return {
        "assign": config.assign.model_dump(mode="json"),
        "label": config.label.model_dump(mode="json"),
        "points": list(config.model.points),
        "labels": clips.digest(),
        "model": read_label_summary(config.run.dir)["model"],
        "inputs": clips.inputs.to_json(),
        "files": clips.files,
        "losses": list(losses),
        "threshold": None,
    }


def _resume(
    checkpoints: Checkpoints, assigner: Assigner, optimizer: torch.optim.Optimizer, config: Config, clips: LabelledClips
) -> list[float | None]:
    """Restores the newest checkpoint. Returns the mean loss of each complete epoch, None where it was not kept.

    If the labels or their inputs have changed (the model was trained again, or the clips changed), the earlier assigner
    is moved to another folder.
    """
    found = checkpoints.latest()
    if found is None:
        return []
    recorded = found.meta.get("inputs")
    differences = clips.inputs.differences(recorded if isinstance(recorded, dict) else {})
    if found.meta.get("files", clips.files) != clips.files:
        differences.append("the files of the videos have changed")
    if found.value("labels", str) != clips.digest() or differences:
        digest = "".join(filter(str.isalnum, found.value("labels", str)))[:64]  # it becomes the name of a folder
        aside = _unused_folder(checkpoints.folder.with_name(f"assigner-{digest}"))
        say(
            f"{few(['the labels have changed', *differences], separator='; ')}: the earlier assigner is moved to "
            f"{aside}, and a new one is fitted"
        )
        aside.mkdir()
        for path in [*checkpoints.folder.glob("step-*"), *checkpoints.folder.glob("last")]:
            path.replace(aside / path.name)
        return []
    # These two only choose the threshold, which is computed again after every fit.
    anew = f"move {found.path.parent} away, and a new assigner is fitted"
    free = ("select", "tolerance")
    require_same(found.path, config.assign, found.value("assign", dict), "assign", free=free, otherwise=anew)
    require_same(found.path, config.label, found.value("label", dict), "label", otherwise=anew)
    load_tensors(assigner, found.tensors_under("model"), found.path)
    restore_optimizer(assigner, optimizer, found)
    epochs = min(found.value("step", int), config.assign.epochs)
    losses: list[float | None] = found.meta.get("losses", [None] * epochs)  # earlier versions kept none
    return losses[:epochs]
