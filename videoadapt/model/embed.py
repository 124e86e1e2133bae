"""Frames to tokens at every length: patch embedding (`resize`, `kernel` or `stem`) and position embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from videoadapt.config.cost import STEM_CHANNELS
from videoadapt.config.sections import ModelConfig
from videoadapt.model.norm import SHARED


def resize_frames(frames: Tensor, side: int, *, align_corners: bool = False) -> Tensor:
    """`(F, C, H, W)` to `(F, C, side, side)`, bilinear; unchanged where the size is right already.

    With antialiasing or, as SuperViT, with `align_corners` and without.
    """
    if frames.shape[-2:] == (side, side):
        return frames
    # antialiased resizing exists in float32 only (CPU), and is a small share of the work
    small = F.interpolate(
        frames.float(), size=(side, side), mode="bilinear", antialias=not align_corners, align_corners=align_corners
    )
    return small.to(frames.dtype)


class Projection(nn.Module):
    """Square patches to tokens by one linear map, its weight shaped `(D, C, kernel, kernel)` as a convolution's."""

    def __init__(self, kernel: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, frames: Tensor, kernel: int) -> Tensor:
        """`(F, C, L * kernel, L * kernel)` to `(F, N, D)`; a kernel below the weight's own is its centre."""
        start = (self.weight.shape[-1] - kernel) // 2
        weight = self.weight[:, :, start : start + kernel, start : start + kernel]
        patches = rearrange(frames, "f c (h p) (w q) -> f (h w) (c p q)", p=kernel, q=kernel)
        return F.linear(patches, weight.flatten(1), self.bias)


class Stem(nn.Module):
    """Consecutive convolutions (LV-ViT's, and ReViT's for large patches): three at half size, then the patches.

    Each length has its own, BatchNorm statistics included. One that is shared (`share_patch`, SuperViT) normalises a
    training pass by that pass's statistics; those of inference are the moving average over passes of all lengths.
    """

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        channels = STEM_CHANNELS
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.proj = nn.Conv2d(channels, width, patch // 2, stride=patch // 2)

    def forward(self, frames: Tensor, kernel: int) -> Tensor:  # noqa: ARG002 - same call as Projection
        """`(F, C, L * patch, L * patch)` to `(F, N, D)`."""
        x = F.relu(self.bn1(self.conv1(frames)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return rearrange(self.proj(x), "f d h w -> f (h w) d")


class PatchEmbed(nn.Module):
    """Clips to patch tokens. Each length has its own weights unless `share_patch`.

    `resize` and `stem` resize frames to `length * patch`; `kernel` cuts larger patches from (nearly) the full frame.
    Shared, `kernel` takes the centre of the largest kernel; the others use one module for all lengths.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shared, self.align_corners = config.share_patch, config.align_corners
        self.kernels = {length: config.kernel(length) for length in config.lengths}
        kernels = {SHARED: max(self.kernels.values())} if self.shared else {str(k): v for k, v in self.kernels.items()}
        make = Stem if config.embed == "stem" else Projection
        self.proj = nn.ModuleDict({key: make(kernel, config.width) for key, kernel in kernels.items()})

    def forward(self, clips: Tensor, length: int) -> Tensor:
        """`(B, C, T, H, W)` to `(B, T, N, D)`."""
        kernel = self.kernels[length]
        frames = rearrange(clips, "b c t h w -> (b t) c h w")
        frames = resize_frames(frames, length * kernel, align_corners=self.align_corners)
        tokens = self.proj[SHARED if self.shared else str(length)](frames, kernel)  # (B T, N, D)
        return rearrange(tokens, "(b t) n d -> b t n d", b=clips.shape[0])


class PositionEmbed(nn.Module):
    """A grid of positions per length, with rows for the class token and, for students, the distillation token.

    Shared, all lengths use the upper left part of the longest one's grid (ReViT's ablation cuts it too).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shared, self.longest = config.share_pos, config.lengths[0]
        lengths = {SHARED: self.longest} if self.shared else {str(length): length for length in config.lengths}
        self.cls = nn.ParameterDict({key: nn.Parameter(torch.zeros(1, config.width)) for key in lengths})
        self.grid = nn.ParameterDict({k: nn.Parameter(torch.zeros(v * v, config.width)) for k, v in lengths.items()})
        self.dist = nn.ParameterDict()
        if config.distill_token:  # the longest length has no such token
            students = sorted(map(str, config.lengths[1:]))
            keys = [SHARED] if self.shared and students else students
            self.dist = nn.ParameterDict({key: nn.Parameter(torch.zeros(1, config.width)) for key in keys})

    def forward(self, prefix: Tensor, patches: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Adds the positions of `length` to `(B, P, D)` and `(B, T, N, D)`."""
        key = SHARED if self.shared else str(length)
        grid = self.grid[key]  # (N, D)
        if self.shared and length != self.longest:
            grid = rearrange(grid, "(h w) d -> h w d", w=self.longest)[:length, :length].flatten(0, 1)
        rows = self.cls[key]  # (1, D)
        if prefix.shape[1] > 1:
            rows = torch.cat([rows, self.dist[key]])  # (P, D)
        return prefix + rows, patches + grid
