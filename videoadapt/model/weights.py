"""Filling a model with other people's weights, or our own, with an account of every tensor.

All is worked out before anything is copied, so that a refused source leaves the model as it was.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from videoadapt.errors import CheckpointError, UserError
from videoadapt.model.layouts import NO_LENGTH, Entry, Layout, pick, recognise, split_length
from videoadapt.model.norm import SHARED
from videoadapt.model.timesformer import TimeSformer

LOADED, RESAMPLED, COPIED, NEW, UNUSED = "loaded", "resampled", "copied", "new", "unused"
TO_EACH_LENGTH = "copied to each length"
LEAST_SHARE = 0.9  # of the attention and MLP weights; below it the file is of another model


class Row(NamedTuple):
    """What became of one tensor. `name` is ours, empty where `unused`; `source` is theirs, empty where `new`."""

    name: str
    fate: str
    source: str
    detail: str


@dataclass(frozen=True)
class LoadReport:
    """The fate of every tensor of the model and of the source.

    `loaded` as it is; `resampled` to the model's grid, frames or patch size; `copied to each length`; `copied` from
    spatial to temporal attention; `new`: keeps its initialisation; `unused`: has no place here. `share` is the share
    of the model's attention and MLP weights, by number of elements, that were filled.
    """

    source: str
    rows: tuple[Row, ...]
    share: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors by fate."""
        return dict(Counter(row.fate for row in self.rows))

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.share:.1%} of the attention and MLP weights filled"]
        for fate in (LOADED, RESAMPLED, TO_EACH_LENGTH, COPIED, NEW, UNUSED):
            rows = [row for row in self.rows if row.fate == fate]
            for detail in dict.fromkeys(row.detail for row in rows):
                names = [row.name or row.source for row in rows if row.detail == detail]
                reason = f" ({detail})" if detail else ""
                lines.append(f"  {fate:{len(TO_EACH_LENGTH)}} {len(names):4}  {_abridge(names)}{reason}")
        return "\n".join(lines)


def _abridge(names: Iterable[str]) -> str:
    """Names without block, length and weight or bias, each once."""
    short = (re.sub(r"\b(blocks|layer)\.\d+", r"\1.*", split_length(name)[0]) for name in names)
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias|gamma)$", "", name) for name in short))


class Weights(NamedTuple):
    """Tensors as they were read, what to call them in messages, and the head count where the source states it."""

    tensors: dict[str, Tensor]
    label: str
    heads: int | None = None


def load_weights(
    model: TimeSformer, source: str | Path | Mapping[str, Tensor], *, nearest: bool = False
) -> LoadReport:
    """Fills a model from a file, a folder, a timm model's name or a state dict, and reports what became of each tensor.

    Understood are the names of timm's ViT, DeiT (distilled too) and DINOv2; facebookresearch's TimeSformer (`.pyth`);
    Hugging Face's TimeSformer (its folder too); and our own, checkpoints included (their EMA, if they have one).
    Torch files are read with `weights_only=True` only.

    Position grids are resampled bicubically with antialiasing, time embeddings linearly; `nearest` takes the nearest
    neighbour for both, as TimeSformer's own code does. Patch kernels are resized by pseudo-inverse (FlexiViT, section
    3.4). From an image model, temporal attention starts as a copy of the spatial one (norm and LayerScale too).
    A head of another class count is left out.

    The normalisation that weights expect is not in the file: the released TimeSformers were trained with mean 0.45 and
    deviation 0.225, DeiT and DINOv2 with ImageNet's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225).

    Raises `CheckpointError` for a source that cannot be read or is of another architecture, `UserError` for a timm name
    whose weights cannot be downloaded. The model is then unchanged.
    """
    weights = read_weights(source)
    layout = recognise(weights.tensors)
    if layout is None:
        raise CheckpointError(
            f"{weights.label}: expected the weights of a ViT (timm's names) or TimeSformer (facebookresearch's, "
            f"Hugging Face's or videoadapt's), got {_sample(weights.tensors)}"
        )
    _check_architecture(model, layout, weights)
    filled, rows = _plan(model, layout, nearest=nearest)
    report = LoadReport(f"{weights.label} ({layout.kind})", tuple(rows), _share(model, filled))
    if report.share < LEAST_SHARE:
        raise CheckpointError(
            f"{weights.label}: it fills only {report.share:.0%} of the model's attention and MLP weights; "
            + _first_misfit(report)
        )
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name in filled:
                target.copy_(filled[name])
    return report


# Reading: to tensors by their own names.

CONTAINERS = ("model_state", "model", "state_dict")  # where training codes keep the weights in their files
TORCH_SUFFIXES = (".pth", ".pt", ".pyth", ".bin")


def read_weights(source: str | Path | Mapping[str, Tensor]) -> Weights:
    """The tensors of a state dict, a file, a folder with a Hugging Face model, or a timm model's name."""
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
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the file is optional, and there is only one thing to learn from it
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
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error):
            raise CheckpointError(f"{path}: torn, or not a torch file") from None
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors, and unpickling those could run any code; "
            "save the model's state_dict() alone, best as .safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: torn, or not a torch file: {str(error).splitlines()[0]}") from None


def _tensors(content: Any, label: str) -> dict[str, Tensor]:
    """The weights in what a file holds: without containers, optimizer and all that is no tensor."""
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{label}: holds no weights; expected a state dict, at the top or under {CONTAINERS}")
    return _of_checkpoint(tensors)


def _of_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of our own checkpoints the model, its averaged weights (EMA) going before the last ones."""
    parts = ("model/", "ema/")
    if not any(name.startswith(parts) for name in tensors):
        return tensors
    return {name.removeprefix(p): tensor for p in parts for name, tensor in tensors.items() if name.startswith(p)}


def _download(name: str) -> Weights:
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # noqa: BLE001 - whatever the hub's and its HTTP library's errors are
        raise UserError(
            f"{name}: timm cannot get these weights ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "on a machine without internet, download them elsewhere and give the file"
        ) from None
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[0], "attn", None) if blocks else None
    return Weights(_tensors(model.state_dict(), name), name, getattr(attention, "num_heads", None))


# Planning: what fills which of our tensors.


def _sample(tensors: Mapping[str, Tensor]) -> str:
    names = list(tensors)[:3]
    return f"{len(tensors)} tensors named {', '.join(names)}{', ...' if len(tensors) > len(names) else ''}"


def _check_architecture(model: TimeSformer, layout: Layout, weights: Weights) -> None:
    config, label = model.config, weights.label
    if (layout.width, layout.depth) != (config.width, config.depth):
        raise CheckpointError(
            f"{label}: the file has width {layout.width} and {layout.depth} blocks, "
            f"the model {config.width} and {config.depth}; set model.width and model.depth"
        )
    if weights.heads not in (None, config.heads):
        raise CheckpointError(f"{label}: made for {weights.heads} attention heads, the model has {config.heads}")
    if layout.layer_scale and config.layer_scale is None:
        raise CheckpointError(f"{label}: the file has LayerScale, the model has not; set model.layer_scale=1e-5")
    if config.layer_scale is not None and not layout.layer_scale:
        raise CheckpointError(f"{label}: the file has no LayerScale, the model has; set model.layer_scale=null")


def _plan(model: TimeSformer, layout: Layout, *, nearest: bool) -> tuple[dict[str, Tensor], list[Row]]:
    """Our tensors' new values, and the rows of the report: ours in the model's order, then what is left of theirs."""
    filled: dict[str, Tensor] = {}
    rows: list[Row] = []
    misfits: dict[str, str] = {}  # their base name: why it does not fit
    lengths = len(model.config.lengths)
    for name, target in model.state_dict().items():
        base, key = split_length(name)
        origin = spatial_origin(base) if not layout.temporal else base
        found = layout.tensors.get(origin)
        if found is None:
            rows.append(Row(name, NEW, "", ""))
            continue
        from_key, entry = pick(found, key)
        tensor = adapt(base, entry.tensor, target.shape, nearest=nearest)
        if tensor is None:
            misfits[base] = _misfit(base, entry.tensor, target)
            rows.append(Row(name, NEW, "", misfits[base]))
            continue
        filled[name] = tensor
        each = lengths > 1 and key not in (NO_LENGTH, SHARED, from_key)
        rows.append(_row(name, entry, tensor, copied=origin != base, each=each))
    return filled, rows + _unused(model, layout, {row.source for row in rows}, misfits)


def _row(name: str, entry: Entry, tensor: Tensor, *, copied: bool, each: bool) -> Row:
    if tensor.shape != entry.tensor.shape:
        return Row(name, RESAMPLED, entry.name, f"{_size(name, entry.tensor)} to {_size(name, tensor)}")
    return Row(name, COPIED if copied else TO_EACH_LENGTH if each else LOADED, entry.name, "")


def _size(name: str, tensor: Tensor) -> str:
    if name == "time_embed":
        return f"{len(tensor)} frames"
    side = round(len(tensor) ** 0.5) if name.startswith("pos_embed") else tensor.shape[-1]
    return f"{side} x {side}"


def spatial_origin(base: str) -> str:
    """The tensor that a temporal one starts from: `temporal_norm` from `norm1`, and so on; others from themselves."""
    for temporal, spatial in (("temporal_norm", "norm1"), ("temporal_attn", "attn"), ("temporal_scale", "scale1")):
        base = base.replace(f".{temporal}.", f".{spatial}.")
    return base


def adapt(base: str, tensor: Tensor, shape: torch.Size, *, nearest: bool = False) -> Tensor | None:
    """A source tensor in the shape of ours: as it is, or resampled where that has a meaning, or none."""
    if tensor.shape == shape:
        return tensor
    fitting: dict[str, Callable[[Tensor, torch.Size, bool], Tensor]] = {
        "pos_embed.grid": _resample_grid,
        "time_embed": _resample_times,
        "patch_embed.proj.weight": _resample_kernel,
    }
    tail = 2 if base == "patch_embed.proj.weight" else -1  # the dimensions that must agree: (D, C), or D
    agree = tensor.shape[:tail] == shape[:tail] if tail > 0 else tensor.shape[-1] == shape[-1]
    if base not in fitting or tensor.ndim != len(shape) or not agree:
        return None
    return fitting[base](tensor.float(), shape, nearest)


def _resample_grid(grid: Tensor, shape: torch.Size, nearest: bool) -> Tensor:
    side = round(shape[0] ** 0.5)
    mode: dict[str, Any] = {"interpolation": "nearest", "antialias": False} if nearest else {}
    return resample_abs_pos_embed(grid[None], [side, side], num_prefix_tokens=0, **mode)[0]


def _resample_times(times: Tensor, shape: torch.Size, nearest: bool) -> Tensor:
    mode = "nearest" if nearest else "linear"
    return F.interpolate(times.T[None], size=shape[0], mode=mode)[0].T


def _resample_kernel(kernel: Tensor, shape: torch.Size, nearest: bool) -> Tensor:  # noqa: ARG001 - same call as above
    return resample_patch_embed(kernel, list(shape[-2:]))


def _misfit(base: str, theirs: Tensor, ours: Tensor) -> str:
    if base.startswith("head"):
        return f"the file has {len(theirs)} classes, the model {len(ours)}"
    return f"{tuple(theirs.shape)} in the file, {tuple(ours.shape)} in the model"


def _unused(model: TimeSformer, layout: Layout, used: set[str], misfits: dict[str, str]) -> list[Row]:
    left = ((base, entry) for base, found in layout.tensors.items() for entry in found.values())
    return [
        Row("", UNUSED, entry.name, misfits.get(base) or _why_unused(base, model))
        for base, entry in left
        if entry.name not in used
    ]


_NO_PLACE = {
    r"mask_token": "serves pretraining only",
    r"reg_token|register_tokens": "the model has no register tokens",
    r"dist_token|head_dist\..*|pos_embed\.dist": "the model has no distillation token",
    r"time_embed|.*\.temporal_\w+\..*": "the model has no temporal attention",
    r"patch_embed\.proj\.(weight|bias)": "the model has a convolutional stem",
}


def _why_unused(base: str, model: TimeSformer) -> str:
    if base in {split_length(name)[0] for name in model.state_dict()}:
        return "a length that the model lacks"
    return next((why for pattern, why in _NO_PLACE.items() if re.fullmatch(pattern, base)), "no place in the model")


def _share(model: TimeSformer, filled: Mapping[str, Tensor]) -> float:
    """The share of the elements of attention and MLP, which all lengths have in common, that are filled."""
    core = {k: v.numel() for k, v in model.state_dict().items() if re.match(r"blocks\.\d+\.(\w*attn|mlp)\.", k)}
    return sum(size for name, size in core.items() if name in filled) / sum(core.values())


def _first_misfit(report: LoadReport) -> str:
    rows = [row for row in report.rows if row.fate == NEW and re.match(r"blocks\.\d+\.(\w*attn|mlp)\.", row.name)]
    row = next((row for row in rows if row.detail), rows[0])
    return f"{row.name} {'is ' + row.detail if row.detail else 'is not in the file'}"
