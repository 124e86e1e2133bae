"""Token-length-aware LayerNorm (TAL-LN; ReViT, section 3.2): one affine per length, statistics as ever."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARED = "shared"  # the key of a parameter that serves all lengths


class LengthNorm(nn.Module):
    """LayerNorm over the last dimension with a weight and a bias `(D,)` per length.

    Each is a parameter of its own, so that an optimizer skips those of the lengths that a step did not draw.
    """

    def __init__(self, width: int, lengths: Sequence[int], *, eps: float, shared: bool = False) -> None:
        super().__init__()
        self.width, self.eps, self.shared = width, eps, shared
        keys = [SHARED] if shared else [str(length) for length in lengths]
        self.weight = nn.ParameterDict({key: nn.Parameter(torch.ones(width)) for key in keys})
        self.bias = nn.ParameterDict({key: nn.Parameter(torch.zeros(width)) for key in keys})

    def forward(self, x: Tensor, length: int) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        key = SHARED if self.shared else str(length)
        return F.layer_norm(x, (self.width,), self.weight[key], self.bias[key], self.eps)
