"""The logits of every point on every view of a split: each video decoded once, in parts that survive an interruption.

Labels, policies and reports are all derived from these scores.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from videoadapt.assigner import Assigner
from videoadapt.checkpoint import load_model
from videoadapt.config import Config
from videoadapt.data.datasets import EvalVideos, Failure, VideoViews
from videoadapt.data.loader import stream
from videoadapt.data.manifest import Manifest
from videoadapt.labels import Floats
from videoadapt.log import Bar, replacing
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing import assign_probabilities, view_logits
from videoadapt.runtime import pick_device, precision_dtype

VIDEOS_PER_PART = 32
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Scores of n clips: manifest row, number within the video, start, truth, and logits `(n, crops, points, classes)`.

    `assigned` are the assigner's probabilities `(n, points)`, absent without one. `failures` are the videos that could
    not be read.
    """

    rows: Ints
    clips: Ints
    starts_s: Floats
    truth: Ints
    logits: Floats
    assigned: Floats | None
    failures: list[Failure]


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
) -> Scores:
    """Scores of the videos in some rows of a manifest, all views and points; goes on where an earlier call stopped."""
    dataset = EvalVideos(
        manifest,
        config,
        temporal_views=temporal_views,
        spatial_crops=config.evaluate.spatial_crops,
        thumbnails=assigner is not None,
    )
    settings = [
        model.config.model_dump(mode="json"),
        manifest.hash,
        list(map(int, rows)),
        [temporal_views, config.evaluate.spatial_crops, config.data.reader, str(model.head.weight.dtype)],
    ]
    folder = config.run.dir / "scores" / f"{name}-{_fingerprint((model, assigner), settings)}"
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [list(rows[i : i + VIDEOS_PER_PART]) for i in range(0, len(rows), VIDEOS_PER_PART)]
    parts = [folder / f"part-{i:05d}.npz" for i in range(len(chunks))]
    missing = [i for i, part in enumerate(parts) if not part.exists()]
    wanted = list(itertools.chain.from_iterable(chunks[i] for i in missing))
    videos = stream(dataset, wanted)
    with Bar(name, total=len(rows), unit="videos", start=len(rows) - len(wanted)) as bar:
        for i in missing:
            read = list(itertools.islice(videos, len(chunks[i])))
            _save(parts[i], model, assigner, read, config.evaluate.batch)
            bar.step(len(read))
    return _load(parts)


def _save(
    path: Path, model: TimeSformer, assigner: Assigner | None, read: list[VideoViews | Failure], batch: int
) -> None:
    videos = [video for video in read if isinstance(video, VideoViews)]
    failures = [video for video in read if isinstance(video, Failure)]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "failures": np.array(json.dumps([[f.video, f.path, f.cause] for f in failures]))
    }
    if videos:
        views = torch.cat([video.views for video in videos])  # (clips, crops, C, T, S, S)
        flat = views.flatten(0, 1)
        logits = torch.stack([view_logits(model, flat, p, batch=batch) for p in model.config.points], dim=1)
        counts = [len(video.starts_s) for video in videos]
        arrays |= {
            "rows": np.repeat([video.video for video in videos], counts),
            "clips": np.concatenate([np.arange(count) for count in counts]),
            "starts_s": np.concatenate([video.starts_s for video in videos]).astype(np.float64),
            "truth": np.repeat([video.label for video in videos], counts),
            "logits": logits.unflatten(0, views.shape[:2]).numpy(),
        }
        if assigner is not None:
            arrays["assigned"] = assign_probabilities(assigner, torch.cat([video.thumbnails for video in videos]))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _load(parts: Sequence[Path]) -> Scores:
    loaded = [dict(np.load(part, allow_pickle=False)) for part in parts]
    full = [part for part in loaded if "rows" in part]
    failures = [Failure(*fields) for part in loaded for fields in json.loads(str(part["failures"]))]
    if not full:
        nothing = np.empty(0)
        return Scores(nothing.astype(int), nothing.astype(int), nothing, nothing.astype(int), nothing, None, failures)

    def joined(key: str) -> Any:
        return np.concatenate([part[key] for part in full])

    return Scores(
        rows=joined("rows"),
        clips=joined("clips"),
        starts_s=joined("starts_s"),
        truth=joined("truth"),
        logits=joined("logits"),
        assigned=joined("assigned") if "assigned" in full[0] else None,
        failures=failures,
    )


def _fingerprint(modules: Sequence[nn.Module | None], settings: list[Any]) -> str:
    """What the scores depend on, so that parts of another model or population are never mixed in."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for module in modules:
        if module is not None:
            _hash_weights(digest, module)
    return digest.hexdigest()[:12]


def _hash_weights(digest: hashlib._Hash, module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
