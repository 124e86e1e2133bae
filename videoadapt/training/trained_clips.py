"""The clips that a model was trained on: recorded in its checkpoint, so that later stages know them again.

Labels of the source `holdout` are only sound on clips that the model has not seen, and so is an accuracy. Settings such
as `run.seed` and `data.holdout` draw the split anew, and the manifest of the run is replaced; the checkpoint remembers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import UserError
from videoadapt.model.checkpoint import Checkpoint
from videoadapt.runtime.console import say

# Names in a checkpoint: the clips of its training, and those of the checkpoints that it began with.
TENSOR, INITIAL = "trained/clips", "trained/initial_clips"
_COLUMNS = ("video", "source", "content")  # each identifies a clip; files may be renamed, moved or encoded again
Keys = dict[str, npt.NDArray[np.int64]]


def clip_keys(manifest: Manifest) -> Tensor:
    """Returns the keys of all readable clips of the train split, sorted int64: what a checkpoint records."""
    return keys_of(manifest.split("train").readable)


def keys_of(videos: Manifest) -> Tensor:
    """Returns the keys of all rows, sorted int64."""
    keys = _keys(videos)
    return torch.from_numpy(np.unique(np.concatenate(list(keys.values()))))


def clips_of_weights(source: str | None) -> Tensor:
    """Returns the clips that initial weights were trained on, sorted int64; none if `train.init` does not say.

    Only our checkpoints do.
    """
    found = torch.empty(0, dtype=torch.int64)
    if source is None or not Path(source).is_file() or Path(source).suffix != ".safetensors":
        return found
    with safe_open(source, framework="pt") as file:
        for name in {TENSOR, INITIAL} & set(file.keys()):
            found = torch.cat([found, file.get_tensor(name).to(torch.int64)])
    return found.unique()


def trained_clips(checkpoint: Checkpoint, manifest: Manifest, columns: Iterable[str] = _COLUMNS) -> int | None:
    """Returns how many rows of a manifest are clips that a model was trained on.

    Args:
        checkpoint: The model's checkpoint.
        manifest: The rows.
        columns: What identifies a clip: `video` (its id, unique only within one list), `source` (its YouTube id, or
            what `data.source_pattern` finds), `content` (the bytes of its file).

    Returns:
        The number; None if the checkpoint has no record, because an older version wrote it.
    """
    recorded = checkpoint.tensors.get(TENSOR)
    if recorded is None or recorded.dtype != torch.int64:
        return None
    initial = checkpoint.tensors.get(INITIAL, torch.empty(0, dtype=torch.int64))
    seen = np.zeros(len(manifest), dtype=bool)
    for column, keys in _keys(manifest).items():
        # Ids and sources are unique within a list, and the initial weights may be of another one.
        known = torch.cat([recorded, initial]) if column == "content" else recorded
        if column in columns:
            seen |= np.isin(keys, known.numpy()) & (manifest[column] != "")
    return int(seen.sum())


def require_held_out(checkpoint: Checkpoint, manifest: Manifest, config: Config) -> None:
    """Checks that the clips of the split `holdout` were kept out of the training of a model.

    Prints a message if that cannot be found out, because an older version wrote the checkpoint.

    Raises:
        UserError: The model was trained on some of them.
    """
    if checkpoint.meta.get("manifest") == manifest.hash and not len(checkpoint.tensors.get(INITIAL, ())):
        return  # the same clips in the same splits
    held_out = manifest.split("holdout")
    count = trained_clips(checkpoint, held_out)
    changed = _redrawn(checkpoint, config)
    if count is None and not changed:
        say(
            f"{checkpoint.path}: an older version wrote it, without the clips of its training, and the manifest has "
            "changed since; whether clips of the split holdout were among them cannot be found out"
        )
    elif count is None or count > 0:
        found = f"{count} of" if count is not None else "probably many of"
        raise UserError(
            f"label.source: holdout must label clips that the model was not trained on, but {found} the "
            f"{len(held_out)} clips of the split holdout were in the training of {checkpoint.path}"
            f"{'; since then ' + ', '.join(changed) if changed else ''}. Undo the change, train again in another "
            f"run.dir, or set label.source=train{_or_of_init(checkpoint)}"
        )


def require_unseen(checkpoint: Checkpoint, manifest: Manifest, config: Config) -> None:
    """Checks that no clip of the split `calibrate` was in the training of a model or of an assigner.

    Prints a message if that cannot be found out, because an older version wrote the checkpoint.

    Args:
        checkpoint: The checkpoint of the model, or of the assigner, which also records the clips of its threshold.
        manifest: The present manifest.
        config: The run's config.

    Raises:
        UserError: Some of them were.
    """
    unseen = manifest.split("calibrate")
    count = trained_clips(checkpoint, unseen)
    if count is None and checkpoint.meta.get("manifest") != manifest.hash:
        say(
            f"{checkpoint.path}: an older version wrote it, without the clips of its training; whether clips of the "
            "split calibrate were among them cannot be found out"
        )
    if count:
        changed = _redrawn(checkpoint, config)
        raise UserError(
            f"data.calibrate: a calibration needs clips that nothing was fitted to, but {count} of the {len(unseen)} "
            f"clips of the split calibrate were in the training of {checkpoint.path}"
            f"{'; since then ' + ', '.join(changed) if changed else ''}. Undo the change, or train again in another "
            f"run.dir{_or_of_init(checkpoint)}"
        )


def _or_of_init(checkpoint: Checkpoint) -> str:
    """Returns the remedy if the clips may be those of the checkpoint that the training began with."""
    if not len(checkpoint.tensors.get(INITIAL, ())):
        return ""
    return ". If nothing has changed, they were in the training of train.init: begin with other weights"


def _redrawn(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Returns the changes of the settings that draw the splits `holdout` and `calibrate`."""
    now = {
        ("run", "seed"): config.run.seed,
        ("data", "holdout"): config.data.holdout,
        ("data", "calibrate"): config.data.calibrate,
    }
    sections = {name: values for name, values in checkpoint.meta.items() if isinstance(values, dict)}
    then = {(section, key): sections.get(section, {}).get(key) for section, key in now}
    return [
        f"{section}.{key} changed from {then[section, key]} to {value}"
        for (section, key), value in now.items()
        if then[section, key] not in (None, value)
    ]


def _keys(manifest: Manifest) -> Keys:
    """Returns a number for each row, by column; equal numbers mean equal clips."""
    return {column: _hashes(column, manifest[column]) for column in _COLUMNS}


def _hashes(column: str, values: Iterable[str]) -> npt.NDArray[np.int64]:
    # The column's name is hashed too: an id that equals a YouTube id is not the same thing.
    digests = (hashlib.blake2b(f"{column} {value}".encode(), digest_size=8).digest() for value in values)
    return np.frombuffer(b"".join(digests), dtype=np.int64)
