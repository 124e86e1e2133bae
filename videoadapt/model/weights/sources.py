"""Reads pretrained weights from files, folders and timm names. Of Python objects only a `Namespace` is unpickled."""

from __future__ import annotations

import hashlib
import pickle
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from videoadapt.config.parse import MAX_CONFIG_BYTES, parse_json, read_text
from videoadapt.config.sections import WhichWeights
from videoadapt.errors import CheckpointError, UserError

CONTAINERS = ("model_state", "model", "state_dict")  # keys under which training codes store the weights
EMA_CONTAINERS = ("state_dict_ema", "model_ema", "ema_state")  # the same for their moving average: timm, DeiT, SlowFast
_PIECE_BYTES = 16 * 1024**2  # read at once
TORCH_SUFFIXES = (".pth", ".pt", ".pyth", ".bin", ".tar")


class Weights(NamedTuple):
    """The weights of a source, with untranslated names."""

    tensors: dict[str, Tensor]  # by the names in the source
    label: str  # names the source in messages
    heads: int | None = None  # number of attention heads, if the source states it: tensor shapes do not show it


def read_weights(source: str | Path | Mapping[str, Tensor], which: WhichWeights = "ema") -> Weights:
    """Reads the weights of a source, onto the CPU if it is a file.

    Args:
        source: A state dict, a file (safetensors or torch), a folder with a Hugging Face model, or a timm model's name.
            A file or folder of that name takes precedence over timm.
        which: The weights of a source that has both: `ema`, the moving average, or `last`, the weights of the last
            step (`train.weights`). The label names the choice. A source without an average has only the last weights.

    Raises:
        CheckpointError: The source does not exist, cannot be read, or has no tensors.
        UserError: timm cannot download the weights.
    """
    if isinstance(source, Mapping):
        return _chosen(source, "the state dict", which)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, which)
    if path.is_file():
        return _chosen(_read_file(path), path.name, which)
    if isinstance(source, str) and timm.is_model(source):
        return _download(source)
    raise CheckpointError(f"{source}: no such file or folder, and no model that timm knows by this name")


def source_digest(source: str) -> str | None:
    """Returns 64 hex digits of SHA-256 over the file that `read_weights` reads; None if the source is no file."""
    path = Path(source)
    file = next((each for each in (path, *_files_of(path)) if each.is_file()), None)
    if file is None:
        return None
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while piece := opened.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _files_of(folder: Path) -> tuple[Path, ...]:
    return folder / "model.safetensors", folder / "pytorch_model.bin"


def _read_folder(folder: Path, which: WhichWeights) -> Weights:
    for path in _files_of(folder):
        if path.is_file():
            weights = _chosen(_read_file(path), str(folder), which)
            return weights._replace(heads=_stated_heads(folder / "config.json"))
    of_a_run = ("step-*", "checkpoints/step-*", "run/checkpoints/step-*")
    ours = max((file for name in of_a_run for file in folder.glob(f"{name}.safetensors")), default=None)
    raise CheckpointError(
        f"{folder}: expected model.safetensors or pytorch_model.bin in this folder, found neither"
        + (f"; of a run, name the file of a checkpoint: {ours}" if ours else "")
    )


def _stated_heads(config: Path) -> int | None:
    try:
        values = parse_json(read_text(config, MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return None  # the file is optional: without it, the number of heads is not checked
    heads = values.get("num_attention_heads") if isinstance(values, dict) else None
    return heads if isinstance(heads, int) else None


def _read_file(path: Path) -> Any:
    """Returns the content of a file: a state dict, or containers and other objects around one."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:  # KeyError: an unknown type
            raise CheckpointError(f"{path}: not a whole safetensors file: {str(error)[:200]}") from None
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(f"{path}: expected a file named .safetensors, {', '.join(TORCH_SUFFIXES)}")
    return _read_torch(path)


def _read_torch(path: Path) -> Any:
    try:
        with _namespace_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read this file: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        # torch has one exception type for damaged files and for refused objects; only the messages differ.
        if not re.search(r"GLOBAL |allowlisted|must be imported", str(error)):
            raise CheckpointError(f"{path}: torn, or not a torch file") from None
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors{f' ({found[1]})' if found else ''}, and unpickling them "
            "could run any code. Save the model's state_dict() alone, best as .safetensors"
        ) from None
    except Exception as error:  # damaged bytes can make the unpickler raise any exception
        raise CheckpointError(f"{path}: torn, or not a torch file ({type(error).__name__})") from None


@contextmanager
def _namespace_allowed() -> Iterator[None]:
    """Lets torch's safe unpickler build an `argparse.Namespace`, and nothing else that it would refuse.

    timm and DeiT store the arguments of a training beside its weights. A namespace only holds values, and the unpickler
    checks each of them as it checks all other content.
    """
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Namespace])
    try:
        yield
    finally:
        # torch 2.4 can only clear all; its context manager `safe_globals` is newer.
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _chosen(content: Any, label: str, which: WhichWeights) -> Weights:
    """Returns the weights in the content of a file, without containers, optimizer state and other objects."""
    key, ema = next(((key, found) for key, found in _averages(content) if found), ("", {}))
    last = _last(content)
    if not last and not ema:
        raise CheckpointError(f"{label}: holds no weights; expected a state dict, at the top or under {CONTAINERS}")
    if ema and (which == "ema" or not last):
        also = ", not the last weights" if last else ""
        return Weights(ema, f"{label}, the moving average {key}{also}")
    return Weights(last, f"{label}, the last weights, not the moving average {key}" if ema else label)


def _averages(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields the moving averages of the weights in the content of a file, each with its place."""
    for level in _levels(content):
        for key in EMA_CONTAINERS:
            yield key, _tensors(level.get(key))
        ours = _tensors(level)  # our checkpoints: weights without an average, such as buffers, stay the last ones
        if any(name.startswith("ema/") for name in ours):
            yield "(ema/)", _under("model/", ours) | _under("ema/", ours)


def _last(content: Any) -> dict[str, Tensor]:
    """Returns the last weights in the content of a file; empty if there are none."""
    tensors = _tensors(([{}, *_levels(content)])[-1])
    return _under("model/", tensors) or tensors


def _levels(content: Any) -> list[Mapping[str, Any]]:
    """Returns the content of a file and its nested containers, outermost first: `model_state` may be in `model`."""
    levels = [content] if isinstance(content, Mapping) else []
    for key in CONTAINERS:
        if levels and isinstance(levels[-1].get(key), Mapping):
            levels.append(levels[-1][key])
    return levels


def _tensors(level: Any) -> dict[str, Tensor]:
    if not isinstance(level, Mapping):
        return {}
    return {k: v for k, v in level.items() if isinstance(v, Tensor) and isinstance(k, str)}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _download(name: str) -> Weights:
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub and its HTTP library have many exception types, none in common
        raise UserError(
            f"{name}: timm cannot get these weights ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            "On a machine without internet, download them elsewhere and give the file"
        ) from None
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[0], "attn", None) if blocks else None
    return Weights(_tensors(model.state_dict()), name, getattr(attention, "num_heads", None))
