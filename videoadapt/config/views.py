"""The order in which the views of a video run where not all of them may be needed."""

from __future__ import annotations


def view_order(clips: int, crops: int) -> list[int]:
    """Returns the views of a video in the order in which they run.

    First the centre crop of the middle clip, then the other crops of that clip, then the other clips from the middle
    outwards, each with its centre crop first. Of two that are equally near, the earlier one comes first.

    Args:
        clips: Clips of the video.
        crops: Crops of a clip.

    Returns:
        Numbers of the views, counted as `clip * crops + crop`.
    """
    return [clip * crops + crop for clip in _outwards(clips) for crop in _outwards(crops)]


def clip_order(clips: int, crops: int) -> list[int]:
    """Returns the clip of each view, in the order of `view_order`."""
    return [view // crops for view in view_order(clips, crops)]


def _outwards(count: int) -> list[int]:
    return sorted(range(count), key=lambda number: (abs(2 * number - (count - 1)), number))
