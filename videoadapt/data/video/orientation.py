"""How a stored frame is turned for display: phones store pictures on their side, and front cameras mirrored ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from videoadapt.errors import VideoError

if TYPE_CHECKING:
    from av.sidedata.sidedata import SideDataContainer
    from av.video.frame import VideoFrame

_TOLERANCE_DEGREES = 0.5  # of a quarter turn, as in the ffmpeg program


class Orientation(NamedTuple):
    """One of the eight ways to turn or mirror a frame. Axes are exchanged first, then the order of rows and columns."""

    transposed: bool = False
    bottom_first: bool = False
    right_first: bool = False
    degrees: int = 0  # anticlockwise, of the display matrix; a mirrored frame is mirrored besides

    @classmethod
    def of(cls, frame: VideoFrame, path: Path) -> Orientation:
        """Reads the display matrix of a frame, as the ffmpeg program does. One that has no inverse turns nothing.

        Args:
            frame: A decoded frame.
            path: Its file, for the message.

        Raises:
            VideoError: The matrix turns the frame by another angle than a quarter turn.
        """
        found = cast("SideDataContainer", frame.side_data)  # PyAV's own annotation is narrower
        if "DISPLAYMATRIX" not in found:
            return UPRIGHT
        # A pixel at (x, y), y downwards, is displayed at (a x + c y, b x + d y).
        a, b, _, c, d = np.frombuffer(bytes(found["DISPLAYMATRIX"]), np.int32)[:5].tolist()
        across, down = math.hypot(a, c), math.hypot(b, d)
        if not (across and down and a * d - b * c):
            return UPRIGHT
        clockwise = math.degrees(math.atan2(b / down, a / across))
        quarters = round(clockwise / 90)
        if abs(clockwise - 90 * quarters) > _TOLERANCE_DEGREES:
            raise VideoError(
                f"{path}: it is to be turned by {abs(clockwise):.0f} degrees for display, but only quarter turns are "
                "read; encode it upright"
            )
        transposed = quarters % 2 == 1
        columns, rows = (c, b) if transposed else (a, d)
        return cls(transposed, rows < 0, columns < 0, -90 * quarters % 360)

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (height, width) of the displayed frame for those of the stored one, and the other way round."""
        return (size[1], size[0]) if self.transposed else size

    def turned(self, frame: np.ndarray) -> np.ndarray:
        """Returns a view of a stored frame (H, W, C) as it is displayed."""
        turned = frame.swapaxes(0, 1) if self.transposed else frame
        return turned[:: -1 if self.bottom_first else 1, :: -1 if self.right_first else 1]


UPRIGHT = Orientation()
