"""How the tokens of a clip lie in memory: the three layouts that the branches of a block want."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

TOKENS = 0  # (B, P + T N, D): the prefix, then the patches frame by frame; for the MLP, and between blocks
PATCHES = 1  # (B, T, N, D): no prefix; for temporal attention
FRAMES = 2  # (B T, P + N, D): each frame with a copy of the prefix; for spatial attention


class Shape(NamedTuple):
    """What tells how a tensor `(B, P + T N, D)` of tokens is divided.

    Attributes:
        prefix: P, the number of prefix tokens of a clip.
        frames: T.
    """

    prefix: int
    frames: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the prefix `(B, P, D)` and the patches `(B, T, N, D)` of tokens `(B, P + T N, D)`."""
        prefix, patches = x.split([self.prefix, x.shape[1] - self.prefix], dim=1)
        return prefix, rearrange(patches, "b (t n) d -> b t n d", t=self.frames)

    def to_layout(self, x: Tensor, layout: int) -> Tensor:
        """Returns tokens `(B, P + T N, D)` in another layout."""
        prefix, patches = self.split(x)
        if layout == TOKENS:
            return x
        if layout == PATCHES:
            return patches
        x = torch.cat([repeat(prefix, "b p d -> b t p d", t=self.frames), patches], dim=2)
        return rearrange(x, "b t n d -> (b t) n d")
