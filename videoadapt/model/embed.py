"""Turns frames into tokens at every length: patch embedding (`resize`, `kernel` or `stem`), position embedding.

In shapes, F = B T is the number of frames in a batch.
"""

from __future__ import annotations

from functools import lru_cache

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
    # On CPUs antialiasing exists in float32 only.
    resized = _resize_on_cpu if frames.device.type == "cpu" and not _traced(frames) else _resize
    return resized(frames.float(), side, align_corners).to(frames.dtype)


def _resize(frames: Tensor, side: int, align_corners: bool) -> Tensor:
    return F.interpolate(
        frames, size=(side, side), mode="bilinear", antialias=not align_corners, align_corners=align_corners
    )


def _traced(frames: Tensor) -> bool:
    """Returns whether torch compiles, exports or only counts: it then knows `interpolate`, not its parts.

    A tensor of another type has no values, such as those of `performance.memory`.
    """
    return type(frames) is not Tensor or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _resize_on_cpu(frames: Tensor, side: int, align_corners: bool) -> Tensor:
    """Computes `_resize` up to rounding, 1.2 to 3 times as fast (docs/log.md): rows first, then columns as rows.

    At short lengths of a small model, torch's loop over single pixels took a fifth of the forward pass.
    """
    planes = frames.flatten(0, 1)  # (F C, H, W)
    planes = _resize_rows(planes, side, align_corners).transpose(1, 2)  # (F C, W, side)
    planes = _resize_rows(planes, side, align_corners).transpose(1, 2)  # (F C, side, side)
    return planes.unflatten(0, frames.shape[:2])  # (F, C, side, side)


def _resize_rows(planes: Tensor, side: int, align_corners: bool) -> Tensor:
    """Resizes planes `(P, H, W)` to `(P, side, W)`: each new row is a weighted sum of a few rows."""
    count, height, width = planes.shape
    rows, weights = _row_weights(height, side, align_corners)  # (side, taps) each
    first_rows = torch.arange(0, count * height, height)[:, None, None]  # of each plane
    # A bag of embeddings is such a sum, and vectorised.
    bags = F.embedding_bag(
        (first_rows + rows).flatten(0, 1),  # (P side, taps)
        planes.reshape(-1, width),  # (P H, W)
        per_sample_weights=weights.repeat(count, 1),  # (P side, taps)
        mode="sum",
    )
    return bags.view(count, side, width)


@lru_cache(maxsize=64)
def _row_weights(height: int, side: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Returns the rows that make each new row, and their weights, `(side, taps)`: those of `_resize`."""
    with torch.inference_mode(False):  # the cached tensors may be used in training later
        # A resized identity matrix has the weights of each new row.
        matrix = F.interpolate(
            torch.eye(height)[None, None],
            size=(side, height),
            mode="bilinear",
            antialias=not align_corners,
            align_corners=align_corners,
        )[0, 0]  # (side, H)
        used = matrix != 0
        taps = int(used.sum(1).max())
        first = used.float().argmax(1).clamp(max=height - taps)  # (side,)
        rows = first[:, None] + torch.arange(taps)  # (side, taps)
        return rows, matrix.gather(1, rows)


class Projection(nn.Module):
    """Maps square patches to tokens by one linear layer (TimeSformer, eq. 1).

    The weight has a convolution's shape `(D, C, kernel, kernel)`, so that pretrained weights fit. It is applied as a
    linear layer to flattened patches: patches do not overlap, so this equals the strided convolution.
    """

    def __init__(self, kernel: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, clips: Tensor, kernel: int) -> Tensor:
        """Maps clips `(B, C, T, L * kernel, L * kernel)` to tokens `(B, T, N, D)`.

        Args:
            clips: Normalised clips.
            kernel: Side of a patch in pixels. If the weight is larger, its centre is used.
        """
        start = (self.weight.shape[-1] - kernel) // 2
        weight = self.weight[:, :, start : start + kernel, start : start + kernel]
        patches = rearrange(clips, "b c t (h p) (w q) -> b t (h w) (c p q)", p=kernel, q=kernel)
        return F.linear(patches, weight.flatten(1), self.bias)  # (B, T, N, C kernel kernel) to (B, T, N, D)


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

    def forward(self, clips: Tensor, kernel: int) -> Tensor:  # noqa: ARG002 - called like Projection
        """Maps clips `(B, C, T, L * patch, L * patch)` to tokens `(B, T, N, D)`. `kernel` is ignored."""
        frames = rearrange(clips, "b c t h w -> (b t) c h w")  # (F, C, H, W): each frame is embedded separately
        x = F.relu(self.bn1(self.conv1(frames)))  # (F, channels, H / 2, W / 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return rearrange(self.proj(x), "(b t) d h w -> b t (h w) d", b=clips.shape[0])  # (B, T, N, D)


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

    def side(self, length: int) -> int:
        """Returns the height and width of the resized frames at a length, in pixels."""
        return length * self.kernels[length]

    def forward(self, clips: Tensor, length: int) -> Tensor:
        """Maps clips `(B, C, T, H, W)` to patch tokens `(B, T, N, D)` of a length L, with `N = L * L`."""
        kernel = self.kernels[length]
        planes = clips.flatten(1, 2)  # (B, C T, H, W), a view: only the resized clips are copied into another order
        planes = resize_frames(planes, self.side(length), align_corners=self.align_corners)  # (B, C T, L k, L k)
        resized = planes.unflatten(1, clips.shape[1:3])  # (B, C, T, L kernel, L kernel)
        tokens: Tensor = self.proj[SHARED if self.shared else str(length)](resized, kernel)  # (B, T, N, D)
        return tokens


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
