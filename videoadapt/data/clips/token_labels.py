"""Token labels (LV-ViT): what another model takes each cell of a training image for.

In their public format every image has a file of its own, `CLASS/NAME.pt`: a tensor (2, 5, 18, 18) of the five best
scores in each cell of a grid over the whole image, and of their classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.ops import roi_align

from videoadapt.data.clips.augment import Crop
from videoadapt.errors import VideoError

SHAPE = (2, 5, 18, 18)
MAP_BYTES = 2 * math.prod(SHAPE) + 4 * 8  # of a map in float16 and its box in float64


class LabelMap(NamedTuple):
    """A map as its file has it, float16, flipped as the clip was, and the crop's left, top, right and bottom in it.

    Sides are shares of the map's. An array goes from a worker by value: a tensor would hold an open file.
    """

    cells: np.ndarray
    box: tuple[float, float, float, float]

    def to_bytes(self) -> bytes:
        """The map and its box, `MAP_BYTES` of them."""
        return self.cells.tobytes() + np.array(self.box).tobytes()

    @classmethod
    def from_bytes(cls, row: bytes) -> LabelMap:
        """What `to_bytes` was made of."""
        cells = np.frombuffer(row, np.float16, math.prod(SHAPE)).reshape(SHAPE)
        left, top, right, bottom = np.frombuffer(row, np.float64, offset=cells.nbytes).tolist()
        return cls(cells, (left, top, right, bottom))


class TokenLabels(NamedTuple):
    """The label maps (B, 2, 5, 18, 18) and boxes (B, 4) of a batch, float32."""

    maps: Tensor
    boxes: Tensor


def label_map_file(folder: Path, image: str) -> Path:
    """Where the map of an image is: the last folder of its path, and its name up to the first dot."""
    path = Path(image)
    return folder / path.parent.name / f"{path.name.partition('.')[0]}.pt"


def read_label_map(file: Path, crop: Crop, num_classes: int) -> LabelMap:
    """The map of an image of which `crop` is shown. Raises `VideoError` for a file that is missing or no such map."""
    cells = _read_cells(file)
    scores, classes = cells
    if not scores.half().isfinite().all():
        raise VideoError(f"label map {file}: holds scores that are not finite in float16, whose largest is 65504")
    known = (classes >= 0) & (classes < num_classes) & (classes == classes.floor())  # false for NaN
    if not known.all():
        raise VideoError(
            f"label map {file}: names the class {classes[~known][0].item():g}, but the model has 0 to "
            f"{num_classes - 1} (model.num_classes)"
        )
    left, top, right, bottom = crop.box
    if crop.flipped:
        return LabelMap(cells.flip(-1).half().numpy(), (1.0 - right, top, 1.0 - left, bottom))
    return LabelMap(cells.half().numpy(), crop.box)


def _read_cells(file: Path) -> Tensor:
    """What a file holds, (2, 5, 18, 18) in float64, in which no format of scores or classes is rounded."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        found = f"{tuple(content.shape)} of {content.dtype}" if isinstance(content, Tensor) else type(content).__name__
        fits = isinstance(content, Tensor) and content.is_floating_point() and tuple(content.shape) == SHAPE
        cells = torch.from_numpy(content.detach().double().numpy()) if fits else None
    except OSError as error:
        raise VideoError(f"label map {file}: {error.strerror or error}") from None
    except Exception as error:  # on damaged bytes the unpickler may stumble over anything
        raise VideoError(
            f"label map {file}: torn, or not a plain tensor that torch has saved ({type(error).__name__})"
        ) from None
    if cells is None:
        raise VideoError(f"label map {file}: expected a floating-point tensor of shape {SHAPE}, got {found}")
    return cells


def gather(labels: Sequence[LabelMap], device: torch.device) -> TokenLabels:
    """The token labels of a batch, on a device."""
    maps = torch.from_numpy(np.stack([label.cells for label in labels])).to(device)
    return TokenLabels(maps.float(), torch.tensor([label.box for label in labels], device=device))


def token_targets(labels: TokenLabels, length: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Soft targets at a length, rows adding to 1: of whole crops (B, classes), and of their patches (B, N, classes).

    A class that is not among the five best of a cell has score 0 there. Scores are averaged over a patch or crop (ROI
    align) before the softmax.
    """
    scores, classes = labels.maps.unbind(1)  # (B, 5, 18, 18)
    sparse = scores.new_zeros(len(scores), num_classes, *SHAPE[2:]).scatter_(1, classes.long(), scores)
    numbers = torch.arange(len(scores), device=scores.device, dtype=scores.dtype)
    boxes = torch.cat([numbers[:, None], labels.boxes], dim=1)
    whole, patches = (
        roi_align(sparse, boxes, side, spatial_scale=SHAPE[-1], aligned=True).softmax(1) for side in (1, length)
    )
    return whole.flatten(1), rearrange(patches, "b classes h w -> b (h w) classes")
