"""Token labels (LV-ViT): for each cell of a training image, the classes that a teacher network predicts.

In LV-ViT's public format each image has a file `CLASS/NAME.pt` with a tensor (2, 5, 18, 18). The 18 x 18 cells cover
the whole image. Index 0 of the first axis holds the five best scores of each cell, index 1 their classes.
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

from videoadapt.data.clips.augment import Box, Crop
from videoadapt.errors import VideoError

SHAPE = (2, 5, 18, 18)  # (scores and classes, best five, rows, columns)
MAP_BYTES = 2 * math.prod(SHAPE) + 4 * 8  # a map in float16 and its box in float64: see `LabelMap.to_bytes`


class LabelMap(NamedTuple):
    """The label map of one training clip.

    Attributes:
        cells: (2, 5, 18, 18) float16, the whole image, mirrored if the clip is mirrored. A numpy array, because a
            worker sends arrays by value; each tensor would hold an open file.
        box: Left, top, right and bottom of the clip's crop, as fractions of the map.
    """

    cells: np.ndarray
    box: Box

    def to_bytes(self) -> bytes:
        """Returns `MAP_BYTES` bytes, from which `from_bytes` makes an equal map."""
        return self.cells.tobytes() + np.array(self.box).tobytes()

    @classmethod
    def from_bytes(cls, row: bytes) -> LabelMap:
        """Reads the result of `to_bytes`."""
        cells = np.frombuffer(row, np.float16, math.prod(SHAPE)).reshape(SHAPE)
        left, top, right, bottom = np.frombuffer(row, np.float64, offset=cells.nbytes).tolist()
        return cls(cells, (left, top, right, bottom))


class TokenLabels(NamedTuple):
    """The label maps of a batch: `maps` (B, 2, 5, 18, 18) and `boxes` (B, 4), both float32, on the training device."""

    maps: Tensor
    boxes: Tensor


def label_map_file(folder: Path, image: str) -> Path:
    """Returns the file of an image's map: `folder`, then the image's last folder, then its name up to the first dot."""
    path = Path(image)
    return folder / path.parent.name / f"{path.name.partition('.')[0]}.pt"


def read_label_map(file: Path, crop: Crop, num_classes: int) -> LabelMap:
    """Reads the map of an image.

    Args:
        file: The map's file.
        crop: The part of the image that the clip shows.
        num_classes: Number of classes of the model.

    Raises:
        VideoError: The file is missing, damaged or not a label map; a score is not finite in float16; or a class is not
            an integer in [0, num_classes - 1].
    """
    cells = _read_cells(file)
    scores, classes = cells  # each (5, 18, 18)
    if not scores.half().isfinite().all():
        raise VideoError(f"label map {file}: holds scores that are not finite in float16 (the largest is 65504)")
    valid = (classes >= 0) & (classes < num_classes) & (classes == classes.floor())  # False for NaN
    if not valid.all():
        raise VideoError(
            f"label map {file}: names the class {classes[~valid][0].item():g}, but the model has the classes 0 to "
            f"{num_classes - 1} (model.num_classes)"
        )
    left, top, right, bottom = crop.box
    if crop.flipped:  # the crop is cut before it is mirrored, so the box is mirrored with the map
        return LabelMap(cells.flip(-1).half().numpy(), (1.0 - right, top, 1.0 - left, bottom))
    return LabelMap(cells.half().numpy(), crop.box)


def _read_cells(file: Path) -> Tensor:
    """Reads (2, 5, 18, 18) as float64, which represents every stored dtype without rounding."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        found = f"{tuple(content.shape)} of {content.dtype}" if isinstance(content, Tensor) else type(content).__name__
        fits = isinstance(content, Tensor) and content.is_floating_point() and tuple(content.shape) == SHAPE
        cells = torch.from_numpy(content.detach().double().numpy()) if fits else None
    except OSError as error:
        raise VideoError(f"label map {file}: {error.strerror or error}") from None
    except Exception as error:  # the unpickler raises any class on damaged bytes
        raise VideoError(
            f"label map {file}: torn, or not a plain tensor saved by torch.save ({type(error).__name__})"
        ) from None
    if cells is None:
        raise VideoError(f"label map {file}: expected a floating-point tensor of shape {SHAPE}, got {found}")
    return cells


def collate_label_maps(labels: Sequence[LabelMap], device: torch.device) -> TokenLabels:
    """Stacks B label maps, B at least 1, on a device."""
    maps = torch.from_numpy(np.stack([label.cells for label in labels])).to(device)  # (B, 2, 5, 18, 18)
    # Converted to float32 on the device, because float16 has half the bytes to copy.
    return TokenLabels(maps.float(), torch.tensor([label.box for label in labels], device=device))


def token_targets(labels: TokenLabels, length: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Makes soft targets from label maps (LV-ViT, section 3.2).

    Scores are averaged over each patch, and over the crop, by ROI align; the softmax follows. A class outside the five
    best of a cell has score 0 in that cell.

    Args:
        labels: The maps and boxes of B clips.
        length: Patches per side.
        num_classes: Width of the targets.

    Returns:
        Targets of the whole crops (B, num_classes) and of their patches (B, N, num_classes), float32; rows add to 1.
    """
    scores, classes = labels.maps.unbind(1)  # each (B, 5, 18, 18)
    dense = scores.new_zeros(len(scores), num_classes, *SHAPE[2:]).scatter_(1, classes.long(), scores)
    batch_index = torch.arange(len(scores), device=scores.device, dtype=scores.dtype)
    boxes = torch.cat([batch_index[:, None], labels.boxes], dim=1)  # (B, 5), the form that roi_align expects
    whole, patches = (
        roi_align(dense, boxes, side, spatial_scale=SHAPE[-1], aligned=True).softmax(1) for side in (1, length)
    )  # (B, classes, 1, 1) and (B, classes, length, length)
    return whole.flatten(1), rearrange(patches, "b classes h w -> b (h w) classes")
