"""LayerNorm with parameters per token length (TAL-LN; ReViT, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARED = "shared"  # key of a parameter for all lengths; other keys are the numbers of lengths


class LengthNorm(nn.Module):
    """Token-length-aware LayerNorm: LayerNorm over the last dimension with a weight and a bias `(D,)` per length.

    The mean and the variance are computed from the tokens, as in every LayerNorm. Only the affine is per length:
    activations of different lengths have different statistics, and a shared affine costs accuracy (ReViT, Table 3).

    Args:
        width: D, the size of the last dimension.
        lengths: The token lengths L of the model.
        eps: Added to the variance.
        shared: Use one affine for all lengths (SuperViT).
    """

    def __init__(self, width: int, lengths: Sequence[int], *, eps: float, shared: bool = False) -> None:
        super().__init__()
        self.width, self.eps, self.shared = width, eps, shared
        keys = [SHARED] if shared else [str(length) for length in lengths]
        # One parameter per length, not one tensor (lengths, D): an optimizer skips parameters without a gradient, so a
        # length that a step does not draw gets no weight decay and no momentum.
        self.weight = nn.ParameterDict({key: nn.Parameter(torch.ones(width)) for key in keys})
        self.bias = nn.ParameterDict({key: nn.Parameter(torch.zeros(width)) for key in keys})

    def affine(self, length: int) -> tuple[Tensor, Tensor]:
        """Returns the weight and the bias `(D,)` of a length."""
        key = SHARED if self.shared else str(length)
        return self.weight[key], self.bias[key]

    def forward(self, x: Tensor, length: int) -> Tensor:
        """Normalises `(..., D)` with the affine of `length`; the shape stays."""
        return F.layer_norm(x, (self.width,), *self.affine(length), self.eps)
