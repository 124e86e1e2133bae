"""How others name and lay out the weights of a (video) ViT, translated to one set of base names.

A base name is the name of our own parameter without its length: `blocks.0.norm1.weight` for
`blocks.0.norm1.weight.14`. Everything here is pure: names and tensors in, names and tensors out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from videoadapt.model.norm import SHARED

TOKENS = {"cls_token": "pos_embed.cls", "dist_token": "pos_embed.dist"}  # in the order of their positions
MOST_PREFIX_TOKENS = 5  # a class token and four registers
SUPERVIT = "SuperViT"
NO_LENGTH = ""  # the key of a tensor whose layout knows one length only
_PREFIXES = re.compile(r"^((module|_orig_mod|model|timesformer)\.)+")  # DDP, compile, TimeSformer, Hugging Face


class Entry(NamedTuple):
    """A tensor of the source, and what it is called there."""

    name: str
    tensor: Tensor


class Layout(NamedTuple):
    """Whose names they are, and the tensors: base name to length key (`NO_LENGTH`, `"14"`, `"shared"`) to tensor."""

    kind: str
    tensors: dict[str, dict[str, Entry]]

    @property
    def width(self) -> int:
        """Of the tokens."""
        return self.tensors["blocks.0.attn.qkv.weight"][NO_LENGTH].tensor.shape[1]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return 1 + max(int(name.split(".")[1]) for name in self.tensors if re.match(r"blocks\.\d+\.", name))

    @property
    def layer_scale(self) -> bool:
        """Whether the residual branches are scaled."""
        return "blocks.0.scale1.gamma" in self.tensors

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return "blocks.0.attn.qkv.bias" in self.tensors

    @property
    def dense_head(self) -> bool:
        """Whether there is a head on patches (LV-ViT)."""
        return "aux_head.weight" in self.tensors

    @property
    def stem(self) -> bool:
        """Whether patches are embedded by consecutive convolutions (LV-ViT)."""
        return "patch_embed.proj.conv1.weight" in self.tensors

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that have position grids of their own, longest first."""
        keys = self.tensors.get("pos_embed.grid", {})
        return tuple(sorted((int(key) for key in keys if key.isdigit()), reverse=True))

    @property
    def temporal(self) -> bool:
        """Whether there is attention over time: a video model."""
        return "blocks.0.temporal_attn.qkv.weight" in self.tensors


_OURS = (
    re.compile(r"(?P<head>patch_embed\.proj)\.(?P<key>\d+|shared)\.(?P<tail>.+)"),
    re.compile(r"(?P<head>pos_embed\.(cls|grid|dist))\.(?P<key>\d+|shared)(?P<tail>)"),
    re.compile(r"(?P<head>(.+\.)?(temporal_norm|norm\d?)\.(weight|bias))\.(?P<key>\d+|shared)(?P<tail>)"),
)


def split_length(name: str) -> tuple[str, str]:
    """Our parameter's name as base name and length key: `norm.weight.14` as `norm.weight` and `"14"`."""
    for pattern in _OURS:
        if match := pattern.fullmatch(name):
            return f"{match['head']}.{match['tail']}".rstrip("."), match["key"]
    return name, NO_LENGTH


_VIT_BLOCK = {"ls1": "scale1", "ls2": "scale2", "temporal_norm1": "temporal_norm"}


def from_vit(name: str) -> str:
    """The base name of a name of timm's ViT, DeiT, DINOv2, LV-ViT, SuperViT, or facebookresearch/TimeSformer."""
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
    """The base name of a name of transformers' TimeSformer."""
    block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if block and block[2] in _HF_BLOCK:
        return f"blocks.{block[1]}.{_HF_BLOCK[block[2]]}.{block[3]}"
    return _HF_TOP.get(name, name)


def split_positions(name: str, table: Tensor, tokens: Collection[str]) -> dict[str, Entry]:
    """A table `(1, P + N, D)` as the grid `(N, D)` and a row `(1, D)` for each of `tokens` (of `TOKENS`).

    A table without rows for the prefix (DeiT III) gives its tokens no position: zero. A grid that is not square
    remains what it is.
    """
    if table.ndim != 3 or len(table) != 1:  # noqa: PLR2004 - (1, P + N, D)
        return {"pos_embed": Entry(name, table)}
    rows = table[0]
    prefix = len(rows) - math.isqrt(len(rows)) ** 2
    if prefix > MOST_PREFIX_TOKENS:
        return {"pos_embed": Entry(name, table)}
    parts = {"pos_embed.grid": Entry(f"{name}[{prefix}:]", rows[prefix:])}
    for row, token in enumerate(token for token in TOKENS if token in tokens):
        no_row = Entry("zero, as in the source", torch.zeros_like(rows[:1]))
        parts[TOKENS[token]] = Entry(f"{name}[{row}]", rows[row : row + 1]) if row < prefix else no_row
    return parts


def recognise(state: Mapping[str, Tensor]) -> Layout | None:
    """The layout of a state dict and its tensors by base name; none if it is no layout that is known here."""
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
    tensors: dict[str, dict[str, Entry]] = {}
    for stripped, name in names.items():
        base, key = split_length(stripped)
        tensors.setdefault(base, {})[key] = Entry(name, state[name])
    return tensors


def _translate(
    names: Mapping[str, str], state: Mapping[str, Tensor], rename: Callable[[str], str]
) -> dict[str, dict[str, Entry]]:
    flat = {rename(stripped): Entry(name, state[name]) for stripped, name in names.items()}
    if "patch_embed.conv1.weight" in flat:  # a stem, whose last convolution has the name of a plain patch embedding
        flat = {re.sub(r"^patch_embed\.", "patch_embed.proj.", base): entry for base, entry in flat.items()}
    lists = [flat.pop(base) for base in sorted(flat) if base.startswith("pos_embed_list.")]
    if "pos_embed" in flat:
        flat |= split_positions(*flat.pop("pos_embed"), flat.keys())
    if "time_embed" in flat:
        name, table = flat["time_embed"]
        flat["time_embed"] = Entry(name, table.flatten(0, -2))  # (1, T, D) to (T, D)
    tensors = {base: {NO_LENGTH: entry} for base, entry in flat.items()}
    for name, table in lists:
        parts = split_positions(name, table, TOKENS.keys() & flat.keys())
        length = str(math.isqrt(len(parts["pos_embed.grid"].tensor))) if "pos_embed.grid" in parts else name
        for base, entry in parts.items():
            tensors.setdefault(base, {})[length] = entry
    return tensors


def _checked(kind: str, tensors: dict[str, dict[str, Entry]]) -> Layout | None:
    qkv = tensors.get("blocks.0.attn.qkv.weight", {}).get(NO_LENGTH)
    return Layout(kind, tensors) if qkv and qkv.tensor.ndim == 2 else None  # noqa: PLR2004 - (3 D, D)


def pick(entries: Mapping[str, Entry], key: str) -> tuple[str, Entry]:
    """The tensor that serves a length: its own, else the shared one, else that of the longest length."""
    for candidate in (key, SHARED):
        if candidate in entries:
            return candidate, entries[candidate]
    longest = max(entries, key=lambda k: int(k or 0))
    return longest, entries[longest]
