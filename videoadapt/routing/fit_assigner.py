"""Stage 2, second half: fits the assigner to the labels, and chooses its threshold on clips that it has not seen."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.config.sections import TrainConfig
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import UserError
from videoadapt.model.checkpoint import Checkpoints, load_tensors, optimizer_tensors, require_same, restore_optimizer
from videoadapt.routing.assigner import Assigner, assigner_checkpoints, assigner_loss, assigner_macs
from videoadapt.routing.label_rules import (
    LABEL_SPLITS,
    Bools,
    Choice,
    cheapest_sufficient,
    choose_labels,
    choose_threshold,
    right_matrix,
)
from videoadapt.routing.router import assign_probabilities
from videoadapt.runtime.console import Bar, say
from videoadapt.runtime.files import write_json
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.machine import pick_device
from videoadapt.runtime.ranks import broadcast_result, ranks
from videoadapt.runtime.signals import StopRequest
from videoadapt.training.optim import make_optimizer, make_schedule


@dataclass(frozen=True)
class LabelledClips:
    """Clips with their labels `(n,)` and outcomes `(n, points)`; `rows` says which of the thumbnails are theirs.

    `thumbnails`, `(all, C, A, s, s)` uint8, stay on the disk until a batch of them is needed.
    """

    thumbnails: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int64]
    labels: Choice
    right: Bools

    def take(self, rows: npt.NDArray[np.int64]) -> LabelledClips:
        """Some of the clips."""
        return LabelledClips(self.thumbnails, self.rows[rows], self.labels[rows], self.right[rows])

    def batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Thumbnails `(B, C, A, s, s)` of some of the clips."""
        return torch.from_numpy(self.thumbnails[self.rows[rows]])

    def digest(self) -> str:
        """Changes with the labels and outcomes."""
        return hashlib.sha256(self.labels.tobytes() + self.right.tobytes()).hexdigest()[:12]


def assign(config: Config) -> dict[str, Any]:
    """Fits the assigner on the run's label table, going on from its newest checkpoint; returns the summary.

    A share `assign.select` of the clips is kept apart: on it the threshold is chosen that saves most while losing at
    most `assign.tolerance` of the costliest point's accuracy. One process does it.
    """
    with ranks(config), sole_writer(config, "assign") as guard:
        return broadcast_result(lambda: _assign(config, assigner_checkpoints(config.run.dir, guard)))


def _assign(config: Config, checkpoints: Checkpoints) -> dict[str, Any]:
    start = time.monotonic()
    points = config.model.points
    if len(points) == 1:
        raise UserError("assign: the model has one point only, so there is nothing to choose; see model.points")
    clips = _labelled_clips(config)
    order = np.random.default_rng(config.run.seed).permutation(len(clips.labels))
    kept = max(1, round(len(order) * config.assign.select))
    select, fit = clips.take(np.sort(order[:kept])), clips.take(np.sort(order[kept:]))
    if not len(fit.labels):
        raise UserError(f"assign: {len(order)} labelled clips are too few to fit and to choose a threshold")
    assigner, step = _fit(fit, config, checkpoints)
    costs = np.array([point_macs(config.model)[p] for p in points], dtype=np.float64)
    parts = np.array_split(np.arange(kept), -(-kept // config.assign.batch))
    probabilities = np.concatenate([assign_probabilities(assigner, select.batch(part)) for part in parts])
    threshold = choose_threshold(probabilities, select.right, costs, tolerance=config.assign.tolerance)
    meta = _meta(config, fit) | {"threshold": threshold}
    checkpoints.save(step + 1, _tensors(assigner, None), meta)
    choice = cheapest_sufficient(probabilities, threshold)
    macs = assigner_macs(config.assign, len(points))
    summary = {
        "clips_fitted": len(fit.labels),
        "clips_selecting": len(select.labels),
        "threshold": threshold,
        "label_accuracy": float((probabilities.argmax(-1) == select.labels).mean()),
        "accuracy": float(select.right[np.arange(kept), choice].mean()),
        "accuracy_costliest": float(select.right[:, 0].mean()),
        "macs_saved": float(1 - (costs[choice].mean() + macs) / costs[0]),
        "mix": {p: float((choice == i).mean()) for i, p in enumerate(points)},
        "assigner_macs": macs,
        "assigner_fraction": macs / costs[0],
        "seconds": round(time.monotonic() - start, 1),
    }
    with checkpoints.guard():
        write_json(config.run.dir / "assigner" / "assign.json", summary)
    return summary


def _labelled_clips(config: Config) -> LabelledClips:
    path = config.run.dir / "labels" / "outcomes.parquet"
    if not path.exists():
        raise UserError(f"{path}: no label table; run `videoadapt label` with this config first")
    made = _labelled_by(config)["source"]
    if made != config.label.source:
        raise UserError(
            f"{path}: holds labels of source {made}, but label.source is {config.label.source}; run `label`"
        )
    clips, right = right_matrix(pd.read_parquet(path), config.model.points, source=config.label.source)
    labels = choose_labels(right, config.label.none_right)
    manifest = load_or_index(config)
    labelled = manifest.table["split"].isin(LABEL_SPLITS[config.label.source])  # val may hold the same names
    row_of = {video: row for row, video in manifest.table["video"][labelled].items()}
    unknown = [video for video in clips["video"] if video not in row_of]
    if unknown:
        raise UserError(f"{path}: {unknown[0]} (and {len(unknown) - 1} more) is not in the manifest; run `label` again")
    used = labels >= 0
    rows = np.array([row_of[video] for video in clips["video"]])[used]
    thumbnails, found = _thumbnails(manifest, rows, config)
    return LabelledClips(thumbnails, np.flatnonzero(found), labels[used][found], right[used][found])


def _labelled_by(config: Config) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((config.run.dir / "labels" / "label.json").read_text(encoding="utf-8"))
    return summary


def _thumbnails(manifest: Manifest, rows: npt.NDArray[np.int64], config: Config) -> tuple[Any, Bools]:
    """Every clip's thumbnails in one file, read once, and which clips could be read.

    Goes on where it stopped, and tries again what could not be read then.
    """
    dataset = EvalVideos(manifest, config, temporal_views=1, spatial_crops=1, views=False)
    shape = (len(rows), 3, config.assign.frames, config.assign.size, config.assign.size)
    key = [manifest.hash, rows.tolist(), shape, config.data.reader, config.model.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = config.run.dir / "assigner" / f"thumbnails-{digest}.npy"
    progress = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = {"count": 0, "failed": []}
    if path.exists() and progress.exists():
        done = json.loads(progress.read_text(encoding="utf-8"))
    array = np.lib.format.open_memmap(path, "r+" if done["count"] else "w+", np.uint8, shape)
    found = np.ones(len(rows), dtype=bool)
    found[done["failed"]] = found[done["count"] :] = False
    numbers = np.flatnonzero(~found)
    videos = stream(dataset, rows[numbers].tolist())
    with Bar("thumbnails", total=len(rows), unit="clips", start=len(rows) - len(numbers)) as bar:
        for number, video in zip(numbers.tolist(), videos, strict=True):
            if isinstance(video, VideoViews):
                array[number], found[number] = video.thumbnails[0].numpy(), True
            else:
                say(f"left out: {video.path}: {video.cause}")
            bar.step()
            if (number + 1) % SAVE_EVERY == 0 or number == numbers[-1]:
                array.flush()
                count = max(done["count"], number + 1)
                write_json(progress, {"count": count, "failed": np.flatnonzero(~found[:count]).tolist()})
    return array, found


SAVE_EVERY = 500  # thumbnails


def _fit(clips: LabelledClips, config: Config, checkpoints: Checkpoints) -> tuple[Assigner, int]:
    """Trains the assigner; each epoch's order and flips depend on (seed, epoch) alone. Returns it and its last step."""
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
        warmup_epochs=min(1.0, settings.epochs / 10),
    )
    optimizer = make_optimizer(assigner.named_parameters(), recipe)
    per_epoch = max(1, len(clips.labels) // settings.batch)
    schedule = make_schedule(optimizer, recipe, per_epoch)
    epoch = _resume(checkpoints, assigner, optimizer, config, clips.digest())
    macs = point_macs(config.model)
    costs = torch.tensor([float(macs[p]) for p in config.model.points], device=device)
    with StopRequest() as stop, Bar("assign", total=settings.epochs, unit="epochs", start=epoch) as bar:
        while epoch < settings.epochs:
            losses = []
            assigner.train()
            for number, rows in enumerate(_batches(len(clips.labels), settings.batch, (config.run.seed, epoch))):
                schedule.step_update(epoch * per_epoch + number)
                thumbnails = _flip(clips.batch(rows), (config.run.seed, epoch, number)).to(device)
                wrong = torch.from_numpy(~clips.right[rows]).float().to(device)
                labels = torch.from_numpy(clips.labels[rows]).to(device)
                loss = assigner_loss(assigner(thumbnails), labels, wrong, costs, settings)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            epoch += 1
            bar.step(1, f"loss {np.mean(losses):.3f}")
            checkpoints.save(epoch, _tensors(assigner, optimizer), _meta(config, clips))
            if stop.requested:
                stop.stop()
    return assigner.eval(), epoch


def _batches(count: int, batch: int, seed: tuple[int, ...]) -> list[npt.NDArray[np.int64]]:
    order = np.random.default_rng(seed).permutation(count)
    return [order[i : i + batch] for i in range(0, max(count - batch, 0) + 1, batch)]


def _flip(thumbnails: Tensor, seed: tuple[int, ...]) -> Tensor:
    flips = torch.from_numpy(np.random.default_rng(seed).random(len(thumbnails)) < 0.5)  # noqa: PLR2004
    return torch.where(flips[:, None, None, None, None], thumbnails.flip(-1), thumbnails)


def _tensors(assigner: Assigner, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    tensors = {f"model/{name}": t for name, t in assigner.state_dict().items()}
    if optimizer is not None:
        tensors |= optimizer_tensors(assigner, optimizer)
    return tensors


def _meta(config: Config, clips: LabelledClips) -> dict[str, Any]:
    """What an assigner was fitted with and on; the threshold comes at the end."""
    return {
        "assign": config.assign.model_dump(mode="json"),
        "label": config.label.model_dump(mode="json"),
        "points": list(config.model.points),
        "labels": clips.digest(),
        "model": _labelled_by(config)["model"],
        "threshold": None,
    }


def _resume(
    checkpoints: Checkpoints, assigner: Assigner, optimizer: torch.optim.Optimizer, config: Config, labels: str
) -> int:
    """Goes on from the newest checkpoint; returns the number of epochs that are done.

    An assigner of other labels (the model was trained on, the clips changed) is moved aside, not overwritten.
    """
    found = checkpoints.latest()
    if found is None:
        return 0
    if found.meta["labels"] != labels:
        aside = checkpoints.folder.with_name(f"assigner-{found.meta['labels']}")
        say(f"the labels have changed: the earlier assigner is kept in {aside}, a new one is fitted")
        aside.mkdir(exist_ok=True)
        for path in [*checkpoints.folder.glob("step-*"), checkpoints.folder / "last"]:
            path.replace(aside / path.name)
        return 0
    require_same(found.path, config.assign, found.meta["assign"], "assign", free=("select", "tolerance"))
    require_same(found.path, config.label, found.meta["label"], "label")
    load_tensors(assigner, found.tensors_under("model"), found.path)
    restore_optimizer(assigner, optimizer, found)
    return min(found.meta["step"], config.assign.epochs)
