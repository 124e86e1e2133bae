"""Turns frames into tokens at every length: patch embedding (`resize`, `kernel` or `stem`), position embedding.

In shapes, F = B T is the number of frames in a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from videoadapt.config.cost import STEM_CHANNELS
from videoadapt.config.sections import ModelConfig
from videoadapt.model.norm import SHARED


def resize_frames(frames: Tensor, side: int, *, align_corners: bool = False) -> Tensor:
    """Resizes frames `(F, C, H, W)` to `(F, C, side, side)` bilinearly, in their dtype.

    Args:
        frames: Floating-point frames. They are returned unchanged if they have the size already.
        side: Height and width of the result, in pixels.
        align_corners: Map corner pixels onto corner pixels, without antialiasing, as SuperViT's code does. Otherwise
            the result is antialiased.
    """
    if frames.shape[-2:] == (side, side):
        return frames
    small = F.interpolate(
        frames.float(),  # on CPUs antialiasing exists in float32 only; resizing is a small part of the work
        size=(side, side),
        mode="bilinear",
        antialias=not align_corners,
        align_corners=align_corners,
    )
    return small.to(frames.dtype)


class Projection(nn.Module):
    """Maps square patches to tokens by one linear layer (TimeSformer, eq. 1).

    The weight has a convolution's shape `(D, C, kernel, kernel)`, so that pretrained weights fit. It is applied as a
    linear layer to flattened patches: patches do not overlap, so this equals the strided convolution.
    """

    def __init__(self, kernel: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, frames: Tensor, kernel: int) -> Tensor:
        """Maps frames `(F, C, L * kernel, L * kernel)` to tokens `(F, N, D)`.

        Args:
            frames: Normalised frames.
            kernel: Side of a patch in pixels. If the weight is larger, its centre is used.
        """
        start = (self.weight.shape[-1] - kernel) // 2
        weight = self.weight[:, :, start : start + kernel, start : start + kernel]
        patches = rearrange(frames, "f c (h p) (w q) -> f (h w) (c p q)", p=kernel, q=kernel)  # (F, N, C kernel kernel)
        return F.linear(patches, weight.flatten(1), self.bias)


class Stem(nn.Module):
    """Consecutive convolutions (LV-ViT, and ReViT for large patches): three at half size, then one over patches.

    With `share_patch` one stem serves all lengths (SuperViT). BatchNorm then normalises a training pass by the
    statistics of that pass, and the moving averages for inference mix the passes of all lengths.
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
        self.proj = nn.Conv2d(channels, width, patch // 2, stride=patch // 2)  # conv1 has halved the frame already

    def forward(self, frames: Tensor, kernel: int) -> Tensor:  # noqa: ARG002 - called like Projection
        """Maps frames `(F, C, L * patch, L * patch)` to tokens `(F, N, D)`. `kernel` is ignored."""
        x = F.relu(self.bn1(self.conv1(frames)))  # (F, channels, H / 2, W / 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return rearrange(self.proj(x), "f d h w -> f (h w) d")  # (F, N, D)


class PatchEmbed(nn.Module):
    """Maps clips to patch tokens. Each length has its own weights unless `config.share_patch`.

    `resize` and `stem` resize the frames to `L * patch` pixels; `kernel` cuts larger patches from the full frame, which
    is resized only where L does not divide it (220 pixels for length 10 of 224). With `share_patch`, `kernel` uses the
    centre of the largest kernel; `resize` and `stem` use one module for all lengths.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shared, self.align_corners = config.share_patch, config.align_corners
        self.kernels = {length: config.kernel(length) for length in config.lengths}
        kernels = {SHARED: max(self.kernels.values())} if self.shared else {str(k): v for k, v in self.kernels.items()}
        make = Stem if config.embed == "stem" else Projection
        self.proj = nn.ModuleDict({key: make(kernel, config.width) for key, kernel in kernels.items()})

    def forward(self, clips: Tensor, length: int) -> Tensor:
        """Maps clips `(B, C, T, H, W)` to patch tokens `(B, T, N, D)` of a length L, with `N = L * L`."""
        kernel = self.kernels[length]
        frames = rearrange(clips, "b c t h w -> (b t) c h w")  # (F, C, H, W): each frame is embedded separately
        frames = resize_frames(frames, length * kernel, align_corners=self.align_corners)  # (F, C, L kernel, L kernel)
        tokens = self.proj[SHARED if self.shared else str(length)](frames, kernel)  # (F, N, D)
        return rearrange(tokens, "(b t) n d -> b t n d", b=clips.shape[0])  # (B, T, N, D)


class PositionEmbed(nn.Module):
    """A grid of positions per length, with rows for the class token and, for students, the distillation token.

    With `config.share_pos` all lengths use the upper left part of the longest length's grid, as in ReViT's ablation.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shared, self.longest = config.share_pos, config.lengths[0]
        lengths = {SHARED: self.longest} if self.shared else {str(length): length for length in config.lengths}
        self.cls = nn.ParameterDict({key: nn.Parameter(torch.zeros(1, config.width)) for key in lengths})
        self.grid = nn.ParameterDict({k: nn.Parameter(torch.zeros(v * v, config.width)) for k, v in lengths.items()})
        self.dist = nn.ParameterDict()
        if config.distill_token:  # only students have the token: the longest length is the teacher
            students = sorted(map(str, config.lengths[1:]))
            keys = [SHARED] if self.shared and students else students
            self.dist = nn.ParameterDict({key: nn.Parameter(torch.zeros(1, config.width)) for key in keys})

    def forward(self, prefix: Tensor, patches: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Adds the positions of `length` to prefix `(B, P, D)` and patches `(B, T, N, D)`; the shapes stay."""
        key = SHARED if self.shared else str(length)
        grid = self.grid[key]  # (N, D)
        if self.shared and length != self.longest:
            square = rearrange(grid, "(h w) d -> h w d", w=self.longest)  # (longest, longest, D)
            grid = square[:length, :length].flatten(0, 1)  # (N, D)
        rows = self.cls[key]  # (1, D)
        if prefix.shape[1] > 1:
            rows = torch.cat([rows, self.dist[key]])  # (P, D)
        return prefix + rows, patches + grid  # all frames get the same grid
