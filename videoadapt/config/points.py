"""Operating points: how many tokens per side (`length`) and which share of them is kept (`keep`)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from videoadapt.errors import ConfigError

_POINT = re.compile(r"(?P<length>[1-9]\d*)(@(?P<keep>\d*\.?\d+))?")


@dataclass(frozen=True, order=True)
class Point:
    """One operating point, written `14` or `14@0.7`. Sorts by length, then by keep.

    `length` counts patch tokens per side of a frame; `keep` in (0, 1] is the share kept at each dropping block.
    """

    length: int
    keep: float = 1.0

    @classmethod
    def parse(cls, text: str | int | Point) -> Point:
        """`"14"`, `14`, `"14@0.7"` or a `Point`. Raises `ConfigError` for anything else."""
        if isinstance(text, Point):
            return text
        match = _POINT.fullmatch(str(text).strip())
        keep = float(match["keep"] or 1.0) if match else 0.0
        if not match or not 0.0 < keep <= 1.0:
            raise ConfigError(
                f"point {text!r}: expected LENGTH or LENGTH@KEEP with 0 < KEEP <= 1, such as 14 or 14@0.7"
            )
        return cls(int(match["length"]), keep)

    def __str__(self) -> str:
        return str(self.length) if self.keep == 1.0 else f"{self.length}@{self.keep:g}"

    def patches(self, depth: int, drop_blocks: Collection[int]) -> tuple[int, ...]:
        """Patch tokens of a frame that each of `depth` blocks passes on to its MLP and to the blocks after it.

        Of the n that enter a dropping block (counted from 1) `min(n, ceil(keep (n + 1)))` stay (SuperViT).
        The keep is taken for the decimal number that it is written as: 0.55 of 100 are 55, and no rounding makes it 56.
        """
        share, count, counts = Fraction(str(self.keep)), self.length**2, []
        for block in range(1, depth + 1):
            if block in drop_blocks:
                count = min(count, math.ceil(share * (count + 1)))
            counts.append(count)
        return tuple(counts)


def canonical(text: str) -> str:
    """A point as `model.points` writes it, `14@0.7` for `14@0.70`; what is no point stays as it is."""
    try:
        return str(Point.parse(text))
    except ConfigError:
        return text
