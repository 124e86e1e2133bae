"""The logits of every point on every view of a split: each video decoded once, in parts that survive an interruption.

Parts are files of few videos, shared out over the ranks; what is in one depends neither on the rank that wrote it nor
on the batch size. Labels, policies and reports are all derived from these parts, one after the other: the memory that
a split needs does not grow with its logits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import EvalVideos, Failure, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import Manifest
from videoadapt.data.video.files import reason
from videoadapt.model.checkpoint import load_model, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.label_rules import Bools, Floats, confidences
from videoadapt.routing.router import assign_probabilities, clip_probabilities, view_logits
from videoadapt.runtime.console import Bar, say
from videoadapt.runtime.files import replacing
from videoadapt.runtime.machine import pick_device, precision_dtype
from videoadapt.runtime.ranks import any_requested, rank, wait_for_file, world_size
from videoadapt.runtime.signals import StopRequest

VIDEOS_PER_SHARD = 32
VERSION = 1  # raised when the same videos and weights give other scores: other frames, crops or arithmetic
# of a manifest: what decides which pixels are read
_FILE_COLUMNS = ["content", "frames", "fps", "rotation", "reader", "damage"]
_TORN = (OSError, ValueError, KeyError, EOFError, BadZipFile)  # what numpy raises for a file that is not whole
_APPEARS_S = 90.0  # that a file of another node may take to be seen through a network file system
Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Scored:
    """Scores of n clips of whole videos: logits `(n, crops, points, classes)` float32, and whose they are.

    `rows` are the clips' manifest rows, `clips` their numbers within the video, all `(n,)`.
    """

    rows: Ints
    clips: Ints
    truth: Ints
    logits: Floats

    def probabilities(self) -> Floats:
        """The mean over a clip's crops, `(n, points, classes)`."""
        return clip_probabilities(self.logits)


@dataclass(frozen=True)
class Scores:
    """Scores of the n clips of a split, in the order of the manifest's rows; the logits stay on the disk.

    `right` says whether the model is right on each clip at each point, by the mean over its crops, `(n, points)`, and
    `confidence`, by measure, how sure it is.
    `assigned` are the assigner's probabilities `(n, points)`, absent without one. `failures` are the videos that could
    not be read. `model` is a digest of the weights that made the scores.
    """

    rows: Ints
    clips: Ints
    starts_s: Floats
    truth: Ints
    right: Bools
    confidence: Mapping[Measure, Floats]
    assigned: Floats | None
    failures: list[Failure]
    model: str
    files: Sequence[Path]

    def shards(self) -> Iterator[Scored]:
        """The scores with their logits, part by part, in order."""
        for file in self.files:
            part = _read(file)
            if "rows" in part:
                yield _scored(part)


def inference_model(config: Config) -> TimeSformer:
    """The trained model of a run, on its device and with its weights in the run's precision.

    Weights are converted beforehand: autocast would convert them again at every call.
    """
    model = load_model(config.run.checkpoint or config.run.dir, config.model)
    return model.to(pick_device(config.run.device), precision_dtype(config.run.precision))


def score(
    model: TimeSformer,
    manifest: Manifest,
    rows: Sequence[int],
    config: Config,
    *,
    name: str,
    temporal_views: int,
    assigner: Assigner | None = None,
) -> Scores | None:
    """Scores of the videos in some rows (ascending) of a manifest, all views and points.

    Goes on where an earlier call stopped, and tries again what could not be read then. Every rank calls it, does its
    share, and returns the whole; of a shard (`parallel.shard`), all do the shard's part, and nothing is returned.
    Ctrl-C and a job's signals end it after a part: `Stopped` on every rank.
    """
    dataset = EvalVideos(
        manifest,
        config,
        temporal_views=temporal_views,
        spatial_crops=config.evaluate.spatial_crops,
        thumbnails=assigner is not None,
    )
    weights = weights_digest(model)
    settings = [
        VERSION,
        model.config.model_dump(mode="json"),
        manifest.hash,
        files_digest(manifest, rows),
        list(map(int, rows)),
        [temporal_views, config.evaluate.spatial_crops, config.evaluate.crop_pct, config.data.interpolation],
        [config.data.reader, str(model.head.weight.dtype)],
        [weights, weights_digest(assigner) if assigner else None],
    ]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    chunks = [list(rows[i : i + VIDEOS_PER_SHARD]) for i in range(0, len(rows), VIDEOS_PER_SHARD)]
    files = [config.run.dir / "scores" / f"{name}-{digest}" / f"part-{i:05d}.npz" for i in range(len(chunks))]
    number, count = config.parallel.shard_of
    share = slice(number * world_size() + rank(), None, count * world_size())
    mine = [(file, _unread(file, chunk)) for file, chunk in list(zip(files, chunks, strict=True))[share]]
    wanted = list(itertools.chain.from_iterable(unread for _, unread in mine))
    videos = stream(dataset, wanted)
    total = sum(map(len, chunks[share]))
    with StopRequest() as stop, Bar(name, total=total, unit="videos", start=total - len(wanted)) as bar:
        for file, unread in mine:
            if not unread or stop.requested:
                continue
            found = [_earlier(file)]
            failures: list[Failure] = []
            for videos_read in _batches(itertools.islice(videos, len(unread)), config.evaluate.batch):
                whole = [video for video in videos_read if isinstance(video, VideoViews)]
                failures += [video for video in videos_read if isinstance(video, Failure)]
                found.append(_scores_of(whole, model, assigner, config.evaluate.batch) if whole else {})
                bar.step(len(videos_read))
            _write(file, _joined(found) | {"failures": np.array(json.dumps(failures))})
    if any_requested(stop):
        stop.stop()
    return None if config.parallel.shard else _load(files, weights)


def files_digest(manifest: Manifest, rows: Sequence[int]) -> str:
    """12 hex digits of the files behind some rows: of their bytes, and of how they are read.

    Other copies of the same videos have the same `Manifest.hash`, but not this.
    """
    table = manifest.table.loc[list(rows), _FILE_COLUMNS]
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()[:12]


def _unread(file: Path, chunk: list[int]) -> list[int]:
    """The rows of a part that are still to be read: all of them, or those that failed."""
    if not file.exists():
        return chunk
    try:
        return [failure.video for failure in _failures(_read(file))]
    except _TORN as error:
        say(f"{file}: torn ({reason(error)}); its videos are scored again")
        file.unlink(missing_ok=True)
        return chunk


def _batches(videos: Iterable[VideoViews | Failure], views: int) -> Iterator[list[VideoViews | Failure]]:
    """The same videos in lists of so many views, or a few more: a list is all that is in memory at once."""
    batch: list[VideoViews | Failure] = []
    count = 0
    for video in videos:
        batch.append(video)
        count += video.views.shape[0] * video.views.shape[1] if isinstance(video, VideoViews) else 0
        if count >= views:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _scores_of(videos: list[VideoViews], model: TimeSformer, assigner: Assigner | None, batch: int) -> Arrays:
    views = torch.cat([video.views for video in videos])  # (clips, crops, C, T, S, S)
    flat = views.flatten(0, 1)
    logits = torch.stack([view_logits(model, flat, p, batch=batch) for p in model.config.points], dim=1)
    counts = [len(video.starts_s) for video in videos]
    arrays: Arrays = {
        "rows": np.repeat([video.video for video in videos], counts),
        "clips": np.concatenate([np.arange(count) for count in counts]),
        "starts_s": np.concatenate([video.starts_s for video in videos]).astype(np.float64),
        "truth": np.repeat([video.label for video in videos], counts),
        "logits": logits.unflatten(0, views.shape[:2]).numpy(),
    }
    if assigner is not None:
        arrays["assigned"] = assign_probabilities(assigner, torch.cat([video.thumbnails for video in videos]))
    return arrays


def _earlier(file: Path) -> Arrays:
    """The scores that a part holds already."""
    part = _read(file) if file.exists() else {}
    part.pop("failures", None)
    return part


def _joined(found: Sequence[Arrays]) -> Arrays:
    """All scores of a part, in the order of the rows, whenever they were read."""
    full = [arrays for arrays in found if arrays]
    if not full:
        return {}
    joined = {key: np.concatenate([arrays[key] for arrays in full]) for key in full[0]}
    order = np.lexsort([joined["clips"], joined["rows"]])
    return {key: values[order] for key, values in joined.items()}


def _write(file: Path, arrays: Arrays) -> None:
    with replacing(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]


def _read(file: Path) -> Arrays:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _failures(part: Arrays) -> list[Failure]:
    return [Failure(*fields) for fields in json.loads(str(part["failures"]))]


def _scored(part: Arrays) -> Scored:
    return Scored(part["rows"], part["clips"], part["truth"], part["logits"])


def _load(files: Sequence[Path], weights: str) -> Scores:
    small: dict[str, list[npt.NDArray[Any]]] = {}
    failures: list[Failure] = []
    for file in files:
        part = _read(wait_for_file(file))
        failures += _failures(part)
        if "rows" in part:
            probabilities = _scored(part).probabilities()
            part["right"] = probabilities.argmax(-1) == part["truth"][:, None]
            for measure, values in confidences(probabilities).items():
                part[measure] = values
            for key in part.keys() - {"logits", "failures"}:
                small.setdefault(key, []).append(part[key])

    def joined(key: str) -> Any:
        return np.concatenate(small[key]) if key in small else np.empty(0, np.int64)

    return Scores(
        rows=joined("rows"),
        clips=joined("clips"),
        starts_s=joined("starts_s"),
        truth=joined("truth"),
        right=joined("right"),
        confidence={measure: joined(measure) for measure in MEASURES},
        assigned=joined("assigned") if "assigned" in small else None,
        failures=failures,
        model=weights,
        files=files,
    )
