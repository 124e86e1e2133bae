"""Attention by shape: one function for tokens within a frame, one for the same position over time.

`attend` takes the kernel that `RULES` name for a device, a precision and a number of tokens. `videoadapt bench
attention` measures the kernels on a machine; the environment variable `VIDEOADAPT_ATTENTION` names the file with its
rules.

Temporal attention has very many very short sequences: one of T tokens for each position of each clip. Kernels for long
sequences compute tiles of 64 or 128 tokens for each of them. On CUDA, `attend_over_time` therefore runs
`kernels/temporal_attention.py`, which packs several positions into one tile and reads the projection's output as it is,
so that nothing is transposed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from videoadapt.errors import UserError, few, shown
from videoadapt.runtime.files import read_json

_MOST_SEQUENCES = 65_535  # in one call: some kernels of CUDA have a block for each in a dimension that ends there
LONGEST = 128  # frames; above it, a tile would no longer fit into registers
# torch's wheels for Linux bring Triton. Before the first call it compiles C, which minimal containers cannot.
_HAS_TRITON = (
    importlib.util.find_spec("triton") is not None
    and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cuda" and len(q) > _MOST_SEQUENCES:
        parts = zip(*(x.split(_MOST_SEQUENCES) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
    return F.scaled_dot_product_attention(q, k, v)


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def _fused_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return _fused(q, k, v)


KERNELS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": _fused,  # torch chooses
    "explicit": _explicit,  # two products of matrices
    "flash": partial(_fused_by, SDPBackend.FLASH_ATTENTION),
    "efficient": partial(_fused_by, SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": partial(_fused_by, SDPBackend.CUDNN_ATTENTION),
}
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Rule(NamedTuple):
    """Which kernel is taken. Of several rules that fit, the first one decides; without any, it is `fused`."""

    device: str  # "cpu" or "cuda"
    precision: str  # "fp32" or "bf16"
    training: bool  # whether gradients are computed
    width: int | None  # of a head; None: any
    longest: int  # most tokens of a sequence
    kernel: str  # a key of `KERNELS`


# torch's fused kernel is slow in bf16 on CPUs: plain products are 2 to 4 times as fast in the forward pass, and 3 to 10
# times with the backward pass (measured, docs/log.md).
DEFAULT_RULES = tuple(Rule("cpu", "bf16", training, None, 2**62, "explicit") for training in (False, True))


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Returns the rules in a file of `videoadapt bench attention`.

    Raises:
        UserError: The file is missing or damaged.
    """
    remedy = "name another file in VIDEOADAPT_ATTENTION, or unset it; `videoadapt bench attention` writes one"
    try:
        found = tuple(Rule(**rule) for rule in read_json(path, remedy, ["rules"])["rules"])
        unknown = {rule.kernel for rule in found} - KERNELS.keys()
    except TypeError:
        raise UserError(f"{path}: damaged, or of another version; {remedy}") from None
    if unknown:
        raise UserError(f"{path}: unknown kernels {few(map(shown, unknown))}; expected {', '.join(KERNELS)}; {remedy}")
    return found


# Read once, when the module is imported: compiled models must not read files. The built-in rules hold for the rest.
_FILE = os.environ.get("VIDEOADAPT_ATTENTION")
RULES = (*(read_rules(Path(_FILE)) if _FILE else ()), *DEFAULT_RULES)


def kernel_for(like: Rule, rules: tuple[Rule, ...]) -> str:
    """Returns the name of the kernel by the first rule that fits.

    Args:
        like: Device, precision, passes, width of a head, and the number of tokens as `longest`; its kernel counts if no
            rule fits.
        rules: The rules.
    """
    for rule in rules:
        if rule[:3] == like[:3] and rule.width in (None, like.width) and like.longest <= rule.longest:
            return rule.kernel
    return like.kernel


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax attention (TimeSformer, eq. 5 to 7) of queries, keys and values `(S, M, N, D / M)`."""
    tokens, width = q.shape[-2:]
    precision = _PRECISIONS.get(q.dtype, "")  # no rule is of another type
    like = Rule(q.device.type, precision, torch.is_grad_enabled() and q.requires_grad, width, tokens, "fused")
    return KERNELS[kernel_for(like, RULES)](q, k, v)


def attend_over_time(qkv: Tensor, heads: int) -> Tensor:
    """Returns the attention of each position to itself in all frames of its clip (TimeSformer, eq. 11).

    Args:
        qkv: Queries, keys and values `(B, T, N, 3 D)`, as one linear layer makes them: D numbers of each, by head.
        heads: M; divides D.

    Returns:
        `(B, T, N, D)`, contiguous.
    """
    if has_kernel(qkv):
        from videoadapt.model.kernels.temporal_attention import attend_over_time as kernel

        return kernel(qkv, heads)
    q, k, v = rearrange(qkv, "b t n (three m d) -> three (b n) m t d", three=3, m=heads)  # (B N, M, T, D / M)
    return rearrange(attend(q, k, v), "(b n) m t d -> b t n (m d)", b=qkv.shape[0]).contiguous()


def has_kernel(x: Tensor) -> bool:
    """Returns whether the kernel runs on a tensor `(B, T, ...)`: on CUDA, up to 128 frames, 16 or 32 bits a number."""
    return x.device.type == "cuda" and x.dtype in _DTYPES and x.shape[1] <= LONGEST and _HAS_TRITON
