"""Translates the names of other projects' (video) ViT weights to one set of base names.

A base name is the name of our own parameter without its length: `blocks.0.norm1.weight` for
`blocks.0.norm1.weight.14`. All functions are pure: they map names and tensors to names and tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from videoadapt.model.norm import SHARED

# In the order of their rows in a position table.
TOKENS = {"cls_token": "pos_embed.cls", "dist_token": "pos_embed.dist"}
MOST_PREFIX_TOKENS = 5  # a class token and four registers (DINOv2)
SUPERVIT = "SuperViT"
NO_LENGTH = ""  # the key of a tensor that is not per length in its layout
_PREFIXES = re.compile(r"^((module|_orig_mod|model|timesformer)\.)+")  # DDP, compile, TimeSformer, Hugging Face


class Entry(NamedTuple):
    """A tensor of the source."""

    name: str  # its name in the source
    tensor: Tensor


class Layout(NamedTuple):
    """The tensors of a source by base name, and the architecture that they imply."""

    kind: str  # the project whose names the source uses
    tensors: dict[str, dict[str, Entry]]  # by base name, then by length key: `NO_LENGTH`, `"14"` or `"shared"`

    @property
    def width(self) -> int:
        """D, the width of the tokens."""
        return self.tensors["blocks.0.attn.qkv.weight"][NO_LENGTH].tensor.shape[1]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return 1 + max(int(name.split(".")[1]) for name in self.tensors if re.match(r"blocks\.\d+\.", name))

    @property
    def layer_scale(self) -> bool:
        """Whether the residual branches have LayerScale."""
        return "blocks.0.scale1.gamma" in self.tensors

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return "blocks.0.attn.qkv.bias" in self.tensors

    @property
    def dense_head(self) -> bool:
        """Whether there is an auxiliary head on patch tokens (LV-ViT)."""
        return "aux_head.weight" in self.tensors

    @property
    def stem(self) -> bool:
        """Whether patches are embedded by consecutive convolutions (LV-ViT)."""
        return "patch_embed.proj.conv1.weight" in self.tensors

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that have separate position grids, longest first."""
        keys = self.tensors.get("pos_embed.grid", {})
        return tuple(sorted((int(key) for key in keys if key.isdigit()), reverse=True))

    @property
    def temporal(self) -> bool:
        """Whether there is temporal attention, as in a video model."""
        return "blocks.0.temporal_attn.qkv.weight" in self.tensors


_OURS = (
    re.compile(r"(?P<head>patch_embed\.proj)\.(?P<key>\d+|shared)\.(?P<tail>.+)"),
    re.compile(r"(?P<head>pos_embed\.(cls|grid|dist))\.(?P<key>\d+|shared)(?P<tail>)"),
    re.compile(r"(?P<head>(.+\.)?(temporal_norm|norm\d?)\.(weight|bias))\.(?P<key>\d+|shared)(?P<tail>)"),
)


def split_length(name: str) -> tuple[str, str]:
    """Splits the name of one of our parameters: `norm.weight.14` into base name `norm.weight` and length key `"14"`.

    Returns:
        The base name and the length key: a number, `"shared"`, or `NO_LENGTH` if the parameter is not per length.
    """
    for pattern in _OURS:
        if match := pattern.fullmatch(name):
            return f"{match['head']}.{match['tail']}".rstrip("."), match["key"]
    return name, NO_LENGTH


_VIT_BLOCK = {"ls1": "scale1", "ls2": "scale2", "temporal_norm1": "temporal_norm"}


def from_vit(name: str) -> str:
    """Returns the base name for a name of timm's ViT, DeiT, DINOv2, LV-ViT, SuperViT or facebookresearch/TimeSformer.

    Only LayerScale and the temporal norm have names that differ from ours.
    """
    block = re.fullmatch(r"(blocks\.\d+)\.(\w+)\.(.+)", name)
    return f"{block[1]}.{_VIT_BLOCK.get(block[2], block[2])}.{block[3]}" if block else name


_HF_BLOCK = {
    "temporal_layernorm": "temporal_norm",
    "temporal_attention.attention.qkv": "temporal_attn.qkv",
    "temporal_attention.output.dense": "temporal_attn.proj",
    "temporal_dense": "temporal_fc",
    "layernorm_before": "norm1",
    "attention.attention.qkv": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.time_embeddings": "time_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}


def from_hugging_face(name: str) -> str:
    """Returns the base name for a name of the TimeSformer in Hugging Face's transformers."""
    block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if block and block[2] in _HF_BLOCK:
        return f"blocks.{block[1]}.{_HF_BLOCK[block[2]]}.{block[3]}"
    return _HF_TOP.get(name, name)


def to_hugging_face(base: str) -> str:
    """Returns the name in Hugging Face's `TimesformerForVideoClassification` for a base name: `from_hugging_face` back.

    Raises:
        ValueError: Their TimeSformer has no such tensor.
    """
    for name, ours in _HF_TOP.items():
        if ours == base:
            return name if base.startswith("head.") else f"timesformer.{name}"
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", base)
    for name, ours in _HF_BLOCK.items():
        if block and ours == block[2]:
            return f"timesformer.encoder.layer.{block[1]}.{name}.{block[3]}"
    raise ValueError(f"{base}: Hugging Face's TimeSformer has no such tensor")


def split_positions(name: str, table: Tensor, tokens: Collection[str]) -> dict[str, Entry]:
    """Splits a table of positions into the grid of the patches and the rows of the prefix tokens.

    Args:
        name: The name of the table in the source.
        table: `(1, P + N, D)`, with the prefix first and N a square number.
        tokens: The base names of the source. Each name that is also in `TOKENS` gets a row.

    Returns:
        Tensors by base name: `pos_embed.grid` `(N, D)`, and a row `(1, D)` for each token. A token without a row in the
        table gets zeros (the class token of DeiT III has no position). A table of another shape is returned whole as
        `pos_embed`, a name that no model has, so it is reported as unused.
    """
    if table.ndim != 3 or len(table) != 1:  # noqa: PLR2004 - (1, P + N, D)
        return {"pos_embed": Entry(name, table)}
    rows = table[0]  # (P + N, D)
    prefix = len(rows) - math.isqrt(len(rows)) ** 2  # P: the rows beside the largest square
    if prefix > MOST_PREFIX_TOKENS:
        return {"pos_embed": Entry(name, table)}
    split = {"pos_embed.grid": Entry(f"{name}[{prefix}:]", rows[prefix:])}  # (N, D)
    for row, token in enumerate(token for token in TOKENS if token in tokens):
        no_row = Entry("zero, as in the source", torch.zeros_like(rows[:1]))
        split[TOKENS[token]] = Entry(f"{name}[{row}]", rows[row : row + 1]) if row < prefix else no_row  # (1, D)
    return split


def recognise(state: Mapping[str, Tensor]) -> Layout | None:
    """Finds the project whose names a state dict uses.

    Args:
        state: Tensors by their names in the source, with or without prefixes of wrappers such as `module.`.

    Returns:
        The layout with the tensors by base name, or None if no known ViT has these names.
    """
    names = {_PREFIXES.sub("", name): name for name in state}
    if any(name.startswith("pos_embed.grid.") for name in names):
        return _checked("videoadapt", _by_length(names, state))
    if any(name.startswith("encoder.layer.0.") for name in names):
        return _checked("Hugging Face TimeSformer", _translate(names, state, from_hugging_face))
    if "pos_embed_list.0" in names:
        return _checked(SUPERVIT, _translate(names, state, from_vit))
    kind = "TimeSformer" if "blocks.0.temporal_norm1.weight" in names else "ViT"
    return _checked(kind, _translate(names, state, from_vit))


def _by_length(names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, dict[str, Entry]]:
    """Returns the tensors of one of our models by base name and length key."""
    tensors: dict[str, dict[str, Entry]] = {}
    for stripped, name in names.items():
        base, key = split_length(stripped)
        tensors.setdefault(base, {})[key] = Entry(name, state[name])
    return tensors


def _translate(
    names: Mapping[str, str], state: Mapping[str, Tensor], rename: Callable[[str], str]
) -> dict[str, dict[str, Entry]]:
    """Returns another project's tensors by base name, with position tables split. Only SuperViT has length keys."""
    flat = {rename(stripped): Entry(name, state[name]) for stripped, name in names.items()}
    # A stem's last convolution has the name of a plain patch embedding. Our stem is below `patch_embed.proj`.
    if "patch_embed.conv1.weight" in flat:
        flat = {re.sub(r"^patch_embed\.", "patch_embed.proj.", base): entry for base, entry in flat.items()}
    tables = [flat.pop(base) for base in sorted(flat) if base.startswith("pos_embed_list.")]  # SuperViT: per length
    if "pos_embed" in flat:
        flat |= split_positions(*flat.pop("pos_embed"), flat.keys())
    if "time_embed" in flat:
        name, table = flat["time_embed"]
        flat["time_embed"] = Entry(name, table.flatten(0, -2))  # (1, T, D) to (T, D)
    tensors = {base: {NO_LENGTH: entry} for base, entry in flat.items()}
    for name, table in tables:
        split = split_positions(name, table, TOKENS.keys() & flat.keys())
        length = str(math.isqrt(len(split["pos_embed.grid"].tensor))) if "pos_embed.grid" in split else name
        for base, entry in split.items():
            tensors.setdefault(base, {})[length] = entry
    return tensors


def _checked(kind: str, tensors: dict[str, dict[str, Entry]]) -> Layout | None:
    qkv = tensors.get("blocks.0.attn.qkv.weight", {}).get(NO_LENGTH)
    return Layout(kind, tensors) if qkv and qkv.tensor.ndim == 2 else None  # noqa: PLR2004 - (3 D, D)


def pick(entries: Mapping[str, Entry], key: str) -> tuple[str, Entry]:
    """Picks the tensor that a length starts from.

    The order of preference is the tensor of the same length, the shared tensor, the tensor of the longest length.

    Args:
        entries: Tensors by length key, at least one.
        key: The length key that needs a tensor.

    Returns:
        The length key of the tensor, and the tensor.
    """
    for candidate in (key, SHARED):
        if candidate in entries:
            return candidate, entries[candidate]
    longest = max(entries, key=lambda k: int(k or 0))  # `NO_LENGTH` is the empty string
    return longest, entries[longest]
