"""Scores: the logits of every point on every view of a split. Each video is decoded once.

Scores are kept in shards: files of `VIDEOS_PER_SHARD` videos, shared among the ranks. The contents of a shard depend
neither on the rank that writes it nor on the batch size. Labels, policies and reports are derived from one shard after
the other, so that memory does not grow with the number of logits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.config.load import Config
from videoadapt.config.sections import Average
from videoadapt.config.views import view_order
from videoadapt.data.clips.datasets import EvalVideos, Failure, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.clips.views import pixel_draws
from videoadapt.data.index.manifest import Manifest
from videoadapt.data.index.sources import Split
from videoadapt.data.video.files import reason
from videoadapt.errors import UserError, few, plural
from videoadapt.model.checkpoint import Checkpoint, find_checkpoint, restore_model, train_checkpoints, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.label_rules import (
    Bools,
    Choice,
    Floats,
    average_views,
    confidences,
    predictions,
    running_answers,
)
from videoadapt.routing.policy import NO_STEP, Assigned, Evidence, Policy
from videoadapt.routing.router import RoutedVideo, Router
from videoadapt.runtime.console import Bar, say
from videoadapt.runtime.files import replacing
from videoadapt.runtime.inputs import Inputs
from videoadapt.runtime.machine import pick_device, precision_dtype
from videoadapt.runtime.ranks import any_requested, rank, wait_for_file, world_size
from videoadapt.runtime.signals import StopRequest

VIDEOS_PER_SHARD = 32  # few, so that an interrupted job loses little; many, so that a split has few files
VERSION = 4  # raise it when other frames, crops or arithmetic give other scores
_FILE_COLUMNS = ["content", "frames", "fps", "rotation", "reader", "damage"]  # manifest columns that decide the pixels
_TORN = (OSError, ValueError, KeyError, EOFError, BadZipFile)  # numpy raises one of these for an incomplete file
Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Scored:
    """The scores of one shard: n clips of whole videos.

    Attributes:
        rows: Manifest row of each clip's video, `(n,)`.
        clips: Number of each clip within its video, `(n,)`.
        truth: Class number of each clip's video, `(n,)`.
        logits: Float32 `(n, crops, points, classes)`.
    """

    rows: Ints
    clips: Ints
    truth: Ints
    logits: Floats

    def probabilities(self, average: Average) -> Floats:
        """Returns the probabilities of each clip, averaged over its crops, `(n, points, classes)`."""
        return average_views(self.logits, 1, average)

    def by_video(self) -> Floats:
        """Returns the logits of the views of each video in the order in which they run.

        Returns:
            `(videos, views, points, classes)`; see `config.views.view_order`.
        """
        clips = len(self.rows) // max(len(np.unique(self.rows)), 1)  # all videos have the same number
        views = self.logits.reshape(-1, clips * self.logits.shape[1], *self.logits.shape[2:])
        return views[:, view_order(clips, self.logits.shape[1])]


@dataclass(frozen=True)
class Scores:
    """Scores of the n clips of a split, in the order of the manifest's rows. The logits stay on the disk.

    Attributes:
        rows: Manifest row of each clip's video, `(n,)`.
        clips: Number of each clip within its video, `(n,)`.
        starts_s: Start of each clip in seconds, `(n,)`.
        truth: Class number of each clip's video, `(n,)`.
        right: Whether the model is right on each clip at each point, by the average over crops, `(n, points)`.
        confidence: The model's confidence at each point, by measure, `(n, points)`.
        assigned: The assigner's probabilities, `(n, points)`; None without an assigner.
        draws: `pixel_draws` of each clip, `(n,)`; None in scores of an older version.
        failures: The videos that could not be read.
        model: `weights_digest` of the model.
        files: The files of the shards, in order.
        seconds: Time of scoring, in all calls that wrote the shards.
    """

    rows: Ints
    clips: Ints
    starts_s: Floats
    truth: Ints
    right: Bools
    confidence: Mapping[Measure, Floats]
    assigned: Floats | None
    draws: Floats | None
    failures: list[Failure]
    model: str
    files: Sequence[Path]
    seconds: float = 0.0

    @property
    def clips_per_video(self) -> int:
        """Number of clips of a video, the same for all."""
        return len(self.rows) // max(len(np.unique(self.rows)), 1)

    def shards(self) -> Iterator[Scored]:
        """Yields the scores with their logits, one shard after the other, in order."""
        for file in self.files:
            arrays = _read(file)
            if "rows" in arrays:  # a shard whose videos all failed has no scores
                yield _scored(arrays)


@dataclass(frozen=True)
class ScoreFiles:
    """The complete shards of a split, on every rank.

    Attributes:
        files: The files of the shards, in order.
        model: `weights_digest` of the model.
        average: Mean over the crops of a clip.
    """

    files: Sequence[Path]
    model: str
    average: Average

    def load(self, key: str) -> Scores:
        """Reads all shards, and returns the scores without their logits.

        Rank 0 alone should call it: the logits of a large split are gigabytes.

        Args:
            key: The key of the config that names the videos, for the message.

        Raises:
            UserError: None of the videos could be read.
        """
        return require_scored(_load(self.files, self.model, self.average), key)


@dataclass(frozen=True)
class ViewScores:
    """How the answer to each scored video develops while its views run, at each point.

    Attributes:
        right: Whether the mean over the views 0 to v is right, `(videos, views, points)`, views in the order in which
            they run.
        confidence: The confidence of this mean, by measure, `(videos, views, points)`.
    """

    right: Bools
    confidence: Mapping[Measure, Floats]


def view_scores(scores: Scores, average: Average) -> ViewScores:
    """Reads the logits of all shards and returns what a cascade over views sees of them."""
    right: list[Bools] = []
    sure: dict[Measure, list[Floats]] = {measure: [] for measure in MEASURES}
    for shard in scores.shards():
        probabilities = running_answers(shard.by_video(), average)  # (videos, views, points, classes)
        truth = shard.truth[:: scores.clips_per_video]
        right.append(predictions(probabilities) == truth[:, None, None])
        for measure, values in confidences(probabilities).items():
            sure[measure].append(values)
    return ViewScores(np.concatenate(right), {measure: np.concatenate(values) for measure, values in sure.items()})


def trained_checkpoint(config: Config) -> Checkpoint:
    """Loads the checkpoint of the run's model: the one that `run.checkpoint` names, or the newest of the run.

    Prints the settings by which its training saw a video otherwise.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    chosen = config.run.checkpoint
    if chosen == Path("best"):
        found = train_checkpoints(config.run.dir).best()
    else:
        source = config.run.dir if chosen is None or chosen == Path("last") else chosen
        found = find_checkpoint(source, train_checkpoints)
        if source == config.run.dir and not (source / "train.json").exists():
            say(f"{found.path}: the training of this run is not finished")
    differences = Inputs.of(config, None, None, "data").differences({"settings": found.meta})
    if differences:
        say(f"{found.path}: was trained with other settings: {few(differences, separator='; ')}")
    return found


def inference_model(config: Config, checkpoint: Checkpoint | None = None) -> TimeSformer:
    """Builds the trained model of a run, on the run's device and with weights in the run's precision.

    Args:
        config: The run's config.
        checkpoint: The result of `trained_checkpoint`. None: it is loaded here.

    Raises:
        CheckpointError: There is no model, it does not fit `config.model`, or its weights are NaN or infinite.
    """
    model = restore_model(checkpoint or trained_checkpoint(config), config.model)
    # Weights are converted here, once: autocast would convert them again in every forward pass.
    return model.to(pick_device(config.run.device), precision_dtype(config.run.precision))


def score_split(
    model: TimeSformer,
    manifest: Manifest,
    split: Split,
    config: Config,
    *,
    name: str,
    assigned: Assigned | None,
) -> ScoreFiles | None:
    """Scores the readable videos of a split by the views of an evaluation, with the run's assigner if there is one.

    Videos that failed in indexing are not read again. See `score`.
    """
    return score(
        model,
        manifest,
        manifest.readable_rows(split).tolist(),
        config,
        name=name,
        temporal_views=config.evaluate.temporal_views,
        assigner=assigned.assigner if assigned else None,
    )


def score(
    model: TimeSformer,
    manifest: Manifest,
    rows: Sequence[int],
    config: Config,
    *,
    name: str,
    temporal_views: int,
    assigner: Assigner | None = None,
) -> ScoreFiles | None:
    """Runs all points on all views of some videos, and resumes where an earlier call stopped.

    Every rank calls it and scores its fraction of the shards. Videos that failed earlier are tried again. Ctrl-C and a
    job's signals end it after a shard, on every rank.

    Args:
        model: The model.
        manifest: The manifest.
        rows: Manifest rows of the videos, ascending.
        config: The run's config.
        name: `label`, `evaluate` or `calibrate`; begins the folder's name.
        temporal_views: Clips of a video.
        assigner: Scored on the clips' thumbnails as well.

    Returns:
        The files of all scores, on every rank. None if this job only scores one part of the split (`parallel.shard`).

    Raises:
        Stopped: A signal asked for a stop.
    """
    dataset = EvalVideos(
        manifest,
        config,
        temporal_views=temporal_views,
        spatial_crops=config.evaluate.spatial_crops,
        thumbnails=assigner is not None,
    )
    weights = weights_digest(model)
    # Whatever changes a score is in the folder's name, so that other scores are never resumed or mixed in.
    thumbnails = [weights_digest(assigner), config.assign.frames, config.assign.size] if assigner else None
    digest = Inputs.of(config, manifest.hash, weights, "run", "data", "model", "evaluate").digest(
        *(VERSION, files_digest(manifest, rows), list(map(int, rows)), temporal_views, thumbnails),
        without=["evaluate.average"],  # applied to stored logits
    )
    chunks = [list(rows[i : i + VIDEOS_PER_SHARD]) for i in range(0, len(rows), VIDEOS_PER_SHARD)]
    files = [config.run.dir / "scores" / f"{name}-{digest}" / f"part-{i:05d}.npz" for i in range(len(chunks))]
    number, count = config.parallel.shard_of
    mine = slice(number * world_size() + rank(), None, count * world_size())  # every (jobs x ranks)-th shard
    stopped = _score_shards(
        dataset, model, assigner, list(zip(files, chunks, strict=True))[mine], config, name=name, count=len(chunks)
    )
    if any_requested(stopped):  # all ranks stop together: one that goes on would wait for shards that never come
        stopped.stop()
    return None if config.parallel.shard else ScoreFiles(files, weights, config.evaluate.average)


def _score_shards(
    dataset: EvalVideos,
    model: TimeSformer,
    assigner: Assigner | None,
    shards: Sequence[tuple[Path, list[int]]],
    config: Config,
    *,
    name: str,
    count: int,
) -> StopRequest:
    """Writes shards, given as (file, manifest rows), until all are complete or a stop is requested.

    `count` is the number of shards of all ranks.
    """
    unread = [_unread(file, chunk) for file, chunk in shards]
    wanted = list(itertools.chain.from_iterable(unread))
    router = Router(model, _EveryPoint(assigner), batch=config.evaluate.batch)
    videos = stream(dataset, wanted)  # one stream for all shards, so that the workers never run out of work
    total = sum(len(chunk) for _, chunk in shards)
    begun_s = time.monotonic()
    with StopRequest() as stop, Bar(name, total=total, unit="videos", start=total - len(wanted)) as bar:
        for (file, _), rows in zip(shards, unread, strict=True):
            if not rows or stop.requested:
                continue
            before_s, *found = _earlier(file)
            failures: list[Failure] = []
            # Batches do not cross shards, so that the contents of a shard do not depend on the number of ranks.
            for result in router.stream(itertools.islice(videos, len(rows))):
                if isinstance(result, RoutedVideo):
                    found.append(_scores_of(result))
                elif isinstance(result, Failure):
                    failures.append(result)
                bar.step()
            ended_s = time.monotonic()
            # Ranks score at the same time. The jobs of an array are added up.
            seconds = before_s + (ended_s - begun_s) / min(world_size(), count)
            begun_s = ended_s
            _write(file, _joined(found) | {"failures": np.array(json.dumps(failures)), "seconds": np.array(seconds)})
    return stop


def require_scored(scores: Scores, key: str) -> Scores:
    """Returns the scores; raises `UserError`, with the key of the videos, if none of them could be read."""
    if not len(scores.rows):
        first = scores.failures[0]
        count = plural(len(scores.failures), "video")
        raise UserError(f"{key}: none of {count} could be scored; {first.path}: {first.cause}")
    return scores


def files_digest(manifest: Manifest, rows: Sequence[int]) -> str:
    """Returns 12 hex digits of the contents of some videos' files, and of how they are read.

    Other files of the same videos, such as resized copies, have the same `Manifest.hash`, but another digest here.

    Args:
        manifest: The manifest.
        rows: Manifest rows of the videos.
    """
    table = manifest.table.loc[list(rows), _FILE_COLUMNS]
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()[:12]


def labelled_files_digest(manifest: Manifest, rows: Iterable[int]) -> str:
    """Returns `files_digest` of some videos, whatever their order in the manifest."""
    return files_digest(manifest, sorted(set(rows), key=lambda row: str(manifest["video"][row])))


def _unread(file: Path, chunk: list[int]) -> list[int]:
    """Returns the rows of a shard that must still be read: all rows, or the rows that failed earlier."""
    if not file.exists():
        return chunk
    try:
        return [failure.video for failure in _failures(_read(file))]
    except _TORN as error:
        say(f"{file}: incomplete ({reason(error)}); its videos are scored again")
        file.unlink(missing_ok=True)
        return chunk


@dataclass(frozen=True)
class _EveryPoint(Policy):
    """Every clip at every point."""

    assigner: Assigner | None = None
    name = "every point"

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        """Returns the point after the last one; `NO_STEP` is one less than the first point."""
        return np.where(last + 1 < len(evidence.points), last + 1, NO_STEP)


def _scores_of(result: RoutedVideo) -> Arrays:
    video: VideoViews = result.item
    clips = len(video.starts_s)
    arrays: Arrays = {
        "rows": np.repeat(video.video, clips),
        "clips": np.arange(clips),
        "starts_s": np.array(video.starts_s, np.float64),
        "truth": np.repeat(video.label, clips),
        "logits": np.stack([result.by_point[point] for point in sorted(result.by_point)], axis=2),
        "draws": pixel_draws(video.views),
    }
    if result.assigned is not None:
        arrays["assigned"] = result.assigned
    return arrays


def _earlier(file: Path) -> tuple[float, Arrays]:
    """Returns the time of a shard so far, and the scores that it has already."""
    arrays = _read(file) if file.exists() else {}
    arrays.pop("failures", None)  # these videos are tried again
    return _seconds(arrays), arrays


def _joined(found: Sequence[Arrays]) -> Arrays:
    """Returns all scores of a shard in the order of the manifest's rows. The order of reading does not matter."""
    full = [arrays for arrays in found if arrays]
    if not full:
        return {}
    shared = set.intersection(*map(set, full))  # scores of an older version have fewer arrays
    joined = {key: np.concatenate([arrays[key] for arrays in full]) for key in sorted(shared)}
    order = np.lexsort([joined["clips"], joined["rows"]])  # by row, then by clip
    return {key: values[order] for key, values in joined.items()}


def _write(file: Path, arrays: Arrays) -> None:
    # Opened here, since `savez` would add `.npz` to the name of the temporary file.
    with replacing(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]


def _read(file: Path) -> Arrays:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _seconds(arrays: Arrays) -> float:
    """Takes the time of scoring out of the arrays of a shard; 0 in those of an older version."""
    return float(arrays.pop("seconds", 0.0))


def _failures(arrays: Arrays) -> list[Failure]:
    return [Failure(*fields) for fields in json.loads(str(arrays["failures"]))]


def _scored(arrays: Arrays) -> Scored:
    return Scored(arrays["rows"], arrays["clips"], arrays["truth"], arrays["logits"])


def _load(files: Sequence[Path], weights: str, average: Average) -> Scores:
    """Returns the scores of all shards without their logits."""
    kept: dict[str, list[npt.NDArray[Any]]] = {}
    failures: list[Failure] = []
    seconds = 0.0
    for file in files:
        arrays = _read(wait_for_file(file))  # a network file system may show another rank's file late
        seconds += _seconds(arrays)
        failures += _failures(arrays)
        if "rows" in arrays:
            probabilities = _scored(arrays).probabilities(average)
            arrays["right"] = predictions(probabilities) == arrays["truth"][:, None]  # (clips, points)
            for measure, values in confidences(probabilities).items():
                arrays[measure] = values
            # Without the logits, which may not fit into memory together.
            for key in arrays.keys() - {"logits", "failures"}:
                kept.setdefault(key, []).append(arrays[key])

    def joined(key: str) -> Any:
        return np.concatenate(kept[key]) if key in kept else np.empty(0, np.int64)

    whole = len(kept.get("draws", [])) == len(kept.get("rows", []))  # shards of an older version have no draws

    return Scores(
        rows=joined("rows"),
        clips=joined("clips"),
        starts_s=joined("starts_s"),
        truth=joined("truth"),
        right=joined("right"),
        confidence={measure: joined(measure) for measure in MEASURES},
        assigned=joined("assigned") if "assigned" in kept else None,
        draws=joined("draws") if whole else None,
        failures=failures,
        model=weights,
        files=files,
        seconds=seconds,
    )
