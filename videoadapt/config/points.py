"""Operating points: tokens per side of a frame (`length`), and the fraction of them that is kept (`keep`)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from videoadapt.errors import ConfigError, shown

# No leading zero, so that each length has one spelling.
_POINT = re.compile(r"(?P<length>[1-9][0-9]{0,4})(@(?P<keep>[0-9]{0,3}\.?[0-9]{1,30}))?")


@dataclass(frozen=True, order=True)
class Point:
    """An operating point, written `14` or `14@0.7`. Points sort by length, then by keep."""

    length: int  # patch tokens per side of a frame
    keep: float = 1.0  # fraction of the patch tokens kept at each dropping block, in (0, 1]

    @classmethod
    def parse(cls, text: str | int | Point) -> Point:
        """Returns the point of `"14"`, `14`, `"14@0.7"` or a `Point`.

        Raises:
            ConfigError: The text has another form, or the keep is not in (0, 1].
        """
        if isinstance(text, Point):
            return text
        match = _POINT.fullmatch(str(text).strip())
        keep = float(match["keep"] or 1.0) if match else 0.0
        if not match or not 0.0 < keep <= 1.0:
            raise ConfigError(
                f"point {shown(text)}: expected LENGTH or LENGTH@KEEP with 0 < KEEP <= 1, such as 14 or 14@0.7"
            )
        return cls(int(match["length"]), keep)

    def __str__(self) -> str:
        return str(self.length) if self.keep == 1.0 else f"{self.length}@{self.keep:g}"

    def patches(self, depth: int, drop_blocks: Collection[int]) -> tuple[int, ...]:
        """Returns the number of patch tokens of a frame after each block.

        Of the n tokens that enter a dropping block, `min(n, ceil(keep * (n + 1)))` are kept (SuperViT).

        Args:
            depth: Number of blocks.
            drop_blocks: Numbers of the dropping blocks, counted from 1.

        Returns:
            `depth` numbers, for blocks 1, 2, ...
        """
        # Exact decimal arithmetic: with floats, 0.55 * 100 is 55.00000000000001, whose ceiling is 56.
        keep = Fraction(str(self.keep))
        count, counts = self.length**2, []
        for block in range(1, depth + 1):
            if block in drop_blocks:
                count = min(count, math.ceil(keep * (count + 1)))  # + 1: the class token counts, too
            counts.append(count)
        return tuple(counts)


def canonical(text: str) -> str:
    """Returns a point as `model.points` writes it, such as `14@0.7` for `14@0.70`; other text is returned unchanged."""
    try:
        return str(Point.parse(text))
    except ConfigError:
        return text
