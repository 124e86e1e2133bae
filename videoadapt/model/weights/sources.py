"""Reads pretrained weights from files, folders and timm names. Python objects are never unpickled."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from videoadapt.config.parse import MAX_CONFIG_BYTES, parse_json, read_text
from videoadapt.errors import CheckpointError, UserError

CONTAINERS = ("model_state", "model", "state_dict")  # keys under which training codes store the weights
TORCH_SUFFIXES = (".pth", ".pt", ".pyth", ".bin", ".tar")


class Weights(NamedTuple):
    """The weights of a source, with untranslated names."""

    tensors: dict[str, Tensor]  # by the names in the source
    label: str  # names the source in messages
    heads: int | None = None  # number of attention heads, if the source states it: tensor shapes do not show it


def read_weights(source: str | Path | Mapping[str, Tensor]) -> Weights:
    """Reads the weights of a source, onto the CPU if it is a file.

    Args:
        source: A state dict, a file (safetensors or torch), a folder with a Hugging Face model, or a timm model's name.
            A file or folder of that name takes precedence over timm.

    Raises:
        CheckpointError: The source does not exist, cannot be read, or has no tensors.
        UserError: timm cannot download the weights.
    """
    if isinstance(source, Mapping):
        return Weights(_tensors(source, "the state dict"), "the state dict")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return Weights(_read_file(path), path.name)
    if isinstance(source, str) and timm.is_model(source):
        return _download(source)
    raise CheckpointError(f"{source}: no such file or folder, and no model that timm knows by this name")


def _read_folder(folder: Path) -> Weights:
    for path in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if path.is_file():
            return Weights(_read_file(path), str(folder), _stated_heads(folder / "config.json"))
    raise CheckpointError(f"{folder}: expected model.safetensors or pytorch_model.bin in this folder, found neither")


def _stated_heads(config: Path) -> int | None:
    try:
        values = parse_json(read_text(config, MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return None  # the file is optional: without it, the number of heads is not checked
    heads = values.get("num_attention_heads") if isinstance(values, dict) else None
    return heads if isinstance(heads, int) else None


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return _tensors(load_file(path), path.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(f"{path}: expected a file named .safetensors, {', '.join(TORCH_SUFFIXES)}")
    return _tensors(_read_torch(path), path.name)


def _read_torch(path: Path) -> Any:
    try:
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


def _tensors(content: Any, label: str) -> dict[str, Tensor]:
    """Returns the weights in the content of a file, without containers, optimizer state and other objects."""
    for key in CONTAINERS:  # they may be nested: `model_state` in `model`
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{label}: holds no weights; expected a state dict, at the top or under {CONTAINERS}")
    return _model_of_checkpoint(tensors)


def _model_of_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the model in one of our checkpoints (averaged weights if it has them); other tensors unchanged."""
    prefixes = ("model/", "ema/")  # in this order: an averaged weight replaces the weight of the same name
    if not any(name.startswith(prefixes) for name in tensors):
        return tensors
    return {name.removeprefix(p): tensor for p in prefixes for name, tensor in tensors.items() if name.startswith(p)}


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
    return Weights(_tensors(model.state_dict(), name), name, getattr(attention, "num_heads", None))
