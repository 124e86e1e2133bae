"""Fills a model with pretrained weights, and reports the status of every tensor.

All new values are computed before the first is copied, so that a refused source does not change the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from videoadapt.config.sections import ModelConfig, Resample, WhichWeights
from videoadapt.errors import CheckpointError, few, plural
from videoadapt.model.norm import SHARED
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.facts import Normalisation, dense_head_of, require_layout, stated_normalisation
from videoadapt.model.weights.layouts import NO_LENGTH, SUPERVIT, Entry, Layout, pick, split_length
from videoadapt.model.weights.sources import Weights, read_weights

LOADED, RESAMPLED, COPIED, NEW, UNUSED = "loaded", "resampled", "copied", "new", "unused"
TO_EACH_LENGTH = "copied to each length"
LEAST_FILLED = 0.99  # smallest fraction of attention and MLP weights that must be filled: only biases may be missing
# Tensors that change the tokens, and that some ViTs have besides: norms before the blocks (CLIP) or of queries and
# keys, relative positions (BEiT). An image model may leave out attention over time.
BESIDES = re.compile(r"norm_pre\..+|blocks\.\d+\.(?!temporal_).+")
CORE = re.compile(r"blocks\.\d+\.(\w*attn|mlp)\.")  # attention and MLP weights, which all lengths share


class Row(NamedTuple):
    """The status of one tensor."""

    name: str  # its name in our model; empty if `unused`
    status: str  # `loaded` and so on, see `LoadReport`
    source: str  # its name in the source; empty if `new`
    detail: str  # the reason or the change of size; may be empty


@dataclass(frozen=True)
class LoadReport:
    """The status of every tensor of the model and of the source.

    The status of a tensor is `loaded` (unchanged), `resampled` (to the model's grid, number of frames or patch size),
    `copied to each length`, `copied` (from spatial to temporal attention), `new` (the model's tensor keeps its
    initialisation) or `unused` (the source's tensor is not in the model).
    """

    source: str  # names the source and its layout
    rows: tuple[Row, ...]  # the model's tensors in the model's order, then the unused tensors of the source
    filled: float  # fraction of the elements of the model's attention and MLP weights that were filled
    normalisation: Normalisation | None  # of frames, as the source states it; None if it does not

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors by status."""
        return dict(Counter(row.status for row in self.rows))

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.filled:.1%} of the attention and MLP weights filled"]
        for status in (LOADED, RESAMPLED, TO_EACH_LENGTH, COPIED, NEW, UNUSED):
            rows = [row for row in self.rows if row.status == status]
            for detail in dict.fromkeys(row.detail for row in rows):
                names = [row.name or row.source for row in rows if row.detail == detail]
                reason = f" ({detail})" if detail else ""
                lines.append(f"  {status:{len(TO_EACH_LENGTH)}} {len(names):4}  {_abridge(names)}{reason}")
        return "\n".join(lines)


def _abridge(names: Iterable[str]) -> str:
    """Shortens some hundred names to one line: without block number, length, weight or bias, and each only once."""
    short = (re.sub(r"\b(blocks|layer)\.\d+", r"\1.*", split_length(name)[0]) for name in names)
    return ", ".join(dict.fromkeys(re.sub(r"\.(weight|bias|gamma)$", "", name) for name in short))


def load_weights(
    model: TimeSformer,
    source: str | Path | Mapping[str, Tensor],
    *,
    which: WhichWeights = "ema",
    resample: Resample = "bicubic",
) -> LoadReport:
    """Fills a model with pretrained weights.

    The known sources are ViT, DeiT (also distilled) and DINOv2 in timm; LV-ViT; SuperViT on DeiT and LV-ViT;
    facebookresearch's TimeSformer (`.pyth`); Hugging Face's TimeSformer (file or folder); and our models and
    checkpoints. SuperViT's weights are trained for certain lengths, patch embedding and heads: the model must have the
    same. Torch files are read with `weights_only=True` only; beside tensors they may
    hold an `argparse.Namespace`, as the files of timm and DeiT do.

    Tensors of another size are resampled: position grids and time embeddings by `resample`, patch kernels by
    pseudo-inverse (FlexiViT, section 3.4). From an image model, temporal attention starts as a copy of
    spatial attention, with its norm and LayerScale, and without effect: `temporal_fc` is zero in all blocks, as in
    TimeSformer's code. A head with another number of classes is not changed.

    Some settings are not in the file, and the user must set them. One is the normalisation. The report has it where
    the source states it; stage 1 refuses to start from weights whose normalisation the config contradicts by
    default. Others are `model.norm_eps`, `residual_scale` and `align_corners`: configs/supervit_*.yaml set SuperViT's
    values.

    Args:
        model: Filled in place.
        source: A file, a folder, a timm model's name, or a state dict.
        which: The weights of a source that has both: `ema`, their moving average, or `last`, those of the last step.
            The report names the choice. A source without an average has only the last weights.
        resample: Method for position grids; time embeddings are resampled linearly with `bicubic`, and otherwise by
            nearest neighbour. `bicubic`: with antialiasing. `nearest`: as TimeSformer's code when it meets a larger
            clip. `nearest_flat`: as TimeSformer's code when it loads weights for training: the grid is resampled as
            one line of positions, which mixes its rows.

    Returns:
        The status of every tensor of the model and of the source.

    Raises:
        CheckpointError: The source cannot be read or is of another architecture. The model is unchanged.
        UserError: `source` is a timm name, and its weights cannot be downloaded. The model is unchanged.
    """
    weights = read_weights(source, which)
    layout = require_layout(weights)
    _check_architecture(model, layout, weights)
    filled, rows = _match_tensors(model, layout, resample)
    stated = None if isinstance(source, Mapping) else stated_normalisation(source, layout)
    report = LoadReport(f"{weights.label} ({layout.kind})", tuple(rows), _fraction_filled(model, filled), stated)
    if report.filled < LEAST_FILLED:
        raise CheckpointError(
            f"{weights.label}: it fills only {report.filled:.0%} of the model's attention and MLP weights; "
            + _first_misfit(report)
        )
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name in filled:
                target.copy_(filled[name])  # converts to the model's dtype and device
            elif ".temporal_fc." in name and not layout.temporal:
                target.zero_()
    return report


def _check_architecture(model: TimeSformer, layout: Layout, weights: Weights) -> None:
    config, label = model.config, weights.label
    if (layout.width, layout.depth) != (config.width, config.depth):
        raise CheckpointError(
            f"{label}: the file has width {layout.width} and {plural(layout.depth, 'block')}, "
            f"the model {config.width} and {config.depth}; set model.width and model.depth"
        )
    if weights.heads not in (None, config.heads):
        raise CheckpointError(f"{label}: made for {weights.heads} attention heads, the model has {config.heads}")
    if layout.layer_scale and config.layer_scale is None:
        raise CheckpointError(f"{label}: the file has LayerScale, the model does not; set model.layer_scale=1e-5")
    if config.layer_scale is not None and not layout.layer_scale:
        raise CheckpointError(f"{label}: the file has no LayerScale, the model does; set model.layer_scale=null")
    if layout.qkv_bias and not config.qkv_bias:
        raise CheckpointError(
            f"{label}: the file has biases for queries, keys and values, the model does not; set model.qkv_bias=true"
        )
    known = {split_length(name)[0] for name in model.state_dict()}
    besides = [base for base in layout.tensors if BESIDES.fullmatch(base) and base not in known]
    if besides:
        raise CheckpointError(
            f"{label}: of another architecture: it has {few(_abridge(besides).split(', '))}, and the other tensors are "
            "worth little without them; use the weights of a plain ViT or of TimeSformer"
        )
    if layout.dense_head and config.dense_head is None:
        raise CheckpointError(
            f"{label}: the file has an aux_head, the model does not; set model.dense_head={dense_head_of(layout):g}"
        )
    if layout.kind == SUPERVIT:
        _check_supervit(config, layout, label)


def _check_supervit(config: ModelConfig, layout: Layout, label: str) -> None:
    """Refuses a model with lengths, patch embeddings or heads that SuperViT did not train."""
    if not set(config.lengths) <= set(layout.lengths):
        raise CheckpointError(
            f"{label}: the file has positions for the lengths {_listed(layout.lengths)}, the model has "
            f"{_listed(config.lengths)}; leave the others out of model.points"
        )
    embed = "stem" if layout.stem else "resize"
    if config.embed != embed:
        raise CheckpointError(
            f"{label}: the file's patch embedding is {embed}, the model's {config.embed}; set model.embed={embed}"
        )
    if config.dense_head is not None and not layout.dense_head:
        raise CheckpointError(f"{label}: the file has no aux_head, the model does; set model.dense_head=null")


def _listed(lengths: Iterable[int]) -> str:
    return ", ".join(map(str, lengths)) or "none"


def _match_tensors(model: TimeSformer, layout: Layout, resample: Resample) -> tuple[dict[str, Tensor], list[Row]]:
    """Returns the new values of the model's tensors by name, and the rows of the report."""
    filled: dict[str, Tensor] = {}
    rows: list[Row] = []
    misfits: dict[str, str] = {}  # the reason why a source tensor does not fit, by base name
    lengths = len(model.config.lengths)
    for name, target in model.state_dict().items():
        base, key = split_length(name)
        origin = base if layout.temporal else spatial_origin(base)
        found = layout.tensors.get(origin)
        if found is None:
            rows.append(Row(name, NEW, "", ""))
            continue
        from_key, entry = pick(found, key)
        tensor = adapt(base, entry.tensor, target.shape, resample)
        if tensor is None:
            misfits[base] = _misfit(base, entry.tensor, target)
            rows.append(Row(name, NEW, "", misfits[base]))
            continue
        filled[name] = tensor
        each = lengths > 1 and key not in (NO_LENGTH, SHARED, from_key)  # one source tensor fills several lengths
        rows.append(_row(name, entry, tensor, copied=origin != base, each=each))
    return filled, rows + _unused(model, layout, {row.source for row in rows}, misfits)


def _row(name: str, entry: Entry, tensor: Tensor, *, copied: bool, each: bool) -> Row:
    if tensor.shape != entry.tensor.shape:
        return Row(name, RESAMPLED, entry.name, f"{_size(name, entry.tensor)} to {_size(name, tensor)}")
    return Row(name, COPIED if copied else TO_EACH_LENGTH if each else LOADED, entry.name, "")


def _size(name: str, tensor: Tensor) -> str:
    if name == "time_embed":
        return plural(len(tensor), "frame")
    side = round(len(tensor) ** 0.5) if name.startswith("pos_embed") else tensor.shape[-1]
    return f"{side} x {side}"


def spatial_origin(base: str) -> str:
    """Returns the base name of the spatial tensor that a temporal tensor is copied from. Other names are unchanged.

    `blocks.0.temporal_attn.qkv.weight` is copied from `blocks.0.attn.qkv.weight`. `temporal_fc` has no counterpart.
    """
    for temporal, spatial in (("temporal_norm", "norm1"), ("temporal_attn", "attn"), ("temporal_scale", "scale1")):
        base = base.replace(f".{temporal}.", f".{spatial}.")
    return base


def adapt(base: str, tensor: Tensor, shape: torch.Size, resample: Resample = "bicubic") -> Tensor | None:
    """Resamples a source tensor to the shape of the model's tensor.

    Args:
        base: The base name, which decides how to resample.
        tensor: The source's tensor.
        shape: The shape of the model's tensor.
        resample: How grids and times are resampled; see `load_weights`.

    Returns:
        The tensor itself if it has the shape already; the resampled tensor (float32) for position grids, time
        embeddings and patch kernels of the same width; otherwise None.
    """
    if tensor.shape == shape:
        return tensor
    fitting: dict[str, Callable[[Tensor, torch.Size, Resample], Tensor]] = {
        "pos_embed.grid": _resample_grid,
        "time_embed": _resample_times,
        "patch_embed.proj.weight": _resample_kernel,
    }
    fixed = slice(0, 2) if base == "patch_embed.proj.weight" else slice(-1, None)  # (D, C) and D must agree
    if base not in fitting or tensor.ndim != len(shape) or tensor.shape[fixed] != shape[fixed]:
        return None
    return fitting[base](tensor.float(), shape, resample)


def _resample_grid(grid: Tensor, shape: torch.Size, resample: Resample) -> Tensor:
    if resample == "nearest_flat":
        return _nearest_rows(grid, shape[0])
    side = round(shape[0] ** 0.5)
    return resample_abs_pos_embed(  # takes and returns (1, N, D)
        grid[None], [side, side], num_prefix_tokens=0, interpolation=resample, antialias=resample == "bicubic"
    )[0]


def _resample_times(times: Tensor, shape: torch.Size, resample: Resample) -> Tensor:
    if resample != "bicubic":
        return _nearest_rows(times, shape[0])
    return F.interpolate(times.T[None], size=shape[0], mode="linear")[0].T  # (T, D) as (1, D, T) and back


def _nearest_rows(rows: Tensor, count: int) -> Tensor:
    return F.interpolate(rows.T[None], size=count, mode="nearest")[0].T  # (N, D) as (1, D, N) and back


def _resample_kernel(kernel: Tensor, shape: torch.Size, resample: Resample) -> Tensor:  # noqa: ARG001 - called like the two above
    return resample_patch_embed(kernel, list(shape[-2:]))


def _misfit(base: str, theirs: Tensor, ours: Tensor) -> str:
    if base.startswith(("head", "aux_head")):
        return f"the file has {plural(len(theirs), 'class')}, the model {len(ours)}"
    return f"{tuple(theirs.shape)} in the file, {tuple(ours.shape)} in the model"


def _unused(model: TimeSformer, layout: Layout, used: set[str], misfits: dict[str, str]) -> list[Row]:
    entries = ((base, entry) for base, found in layout.tensors.items() for entry in found.values())
    return [
        Row("", UNUSED, entry.name, misfits.get(base) or _why_unused(base, model))
        for base, entry in entries
        if entry.name not in used
    ]


_NO_PLACE = {  # patterns of base names, and the reason why they are unused; the first match applies
    r"mask_token": "serves pretraining only",
    r"reg_token|register_tokens": "the model has no register tokens",
    r"dist_token|head_dist\..*|pos_embed\.dist": "the model has no distillation token",
    r"pos_embed": "not a square grid of positions",
    r"time_embed|.*\.temporal_\w+\..*": "the model has no temporal attention",
    r"patch_embed\.proj\.(weight|bias)": "the model has a convolutional stem",
    r"patch_embed\.proj\.(conv|bn|proj).*": "the model has no convolutional stem",
}


def _why_unused(base: str, model: TimeSformer) -> str:
    if base in {split_length(name)[0] for name in model.state_dict()}:
        return "a length that the model lacks"
    return next(
        (reason for pattern, reason in _NO_PLACE.items() if re.fullmatch(pattern, base)), "no place in the model"
    )


def _fraction_filled(model: TimeSformer, filled: Mapping[str, Tensor]) -> float:
    core = {name: tensor.numel() for name, tensor in model.state_dict().items() if CORE.match(name)}
    return sum(size for name, size in core.items() if name in filled) / sum(core.values())


def _first_misfit(report: LoadReport) -> str:
    rows = [row for row in report.rows if row.status == NEW and CORE.match(row.name)]
    row = next((row for row in rows if row.detail), rows[0])  # a wrong shape explains more than a missing tensor
    return f"{row.name} {'is ' + row.detail if row.detail else 'is not in the file'}"
