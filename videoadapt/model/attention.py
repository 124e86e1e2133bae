"""Attention by shape: one function for tokens within a frame, one for the same position over time.

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
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_MOST_SEQUENCES = 65_535  # in one call: some kernels of CUDA have a block for each in a dimension that ends there
LONGEST = 128  # frames; above it, a tile would no longer fit into registers
# torch's wheels for Linux bring Triton. Before the first call it compiles C, which minimal containers cannot.
_HAS_TRITON = (
    importlib.util.find_spec("triton") is not None
    and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax attention (TimeSformer, eq. 5 to 7) of queries, keys and values `(S, M, N, D / M)`."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused kernel is slow here: plain products are 2 to 4 times as fast in the forward pass, and 3 to 10
        # times with the backward pass (measured, docs/log.md).
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    if q.device.type == "cuda" and len(q) > _MOST_SEQUENCES:
        parts = zip(*(x.split(_MOST_SEQUENCES) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
    return F.scaled_dot_product_attention(q, k, v)


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
