"""Easy, medium and hard clips, as in Fig. 6 of ReViT: frames of real clips beside the point that each got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.index.manifest import Manifest
from videoadapt.data.pictures import data_uri, jpegs
from videoadapt.reporting.run_data import NOT_RUN

Part = dict[str, Any]

EXAMPLES = 8  # clips shown in each group
FRAMES = 4  # of a clip
SIDE = 112  # pixels of a thumbnail


def groups_of(clips: pd.DataFrame, points: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Splits clips into easy, medium and hard ones. A clip that did not run is left out.

    Where clips got different points: of these points, easy clips got the cheapest, hard ones the costliest, and medium
    ones another.
    Where all got the same point, nothing was chosen, and the cheapest right point decides in its place.

    Args:
        clips: See `run_data.clip_table`.
        points: The points, costliest first.
    """
    clips = clips[clips["point"] != NOT_RUN]
    by = clips["point"]
    if by.nunique() < 2:  # noqa: PLR2004 - one point
        verdicts = clips[[f"right at {point}" for point in points]].to_numpy(bool)
        cheapest = len(points) - 1 - verdicts[:, ::-1].argmax(1)
        by = pd.Series(np.array(points, dtype=object)[np.where(verdicts.any(1), cheapest, 0)], index=clips.index)
    else:
        points = [point for point in points if (by == point).any()]  # a policy may leave out the costliest point
    groups = [("easy", clips[by == points[-1]]), ("medium", clips[~by.isin([points[0], points[-1]])])]
    return [*groups, ("hard", clips[by == points[0]])]


def draw(clips: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Draws clips at random, from as many classes as there are. Nothing is picked by hand or by result."""
    shuffled = clips.sample(frac=1.0, random_state=seed)
    turn = shuffled.groupby("truth", sort=False).cumcount()
    return shuffled.loc[turn.sort_values(kind="stable").index].head(count)


def examples(config: Config, manifest: Manifest, clips: pd.DataFrame) -> list[Part]:
    """Reads a few clips of each group from their files.

    Args:
        config: The config of an evaluated run.
        manifest: The videos that were evaluated.
        clips: See `run_data.clip_table`.

    Returns:
        The groups with their clips: `frames` (JPEG files as data URIs; empty if the video cannot be read), the point,
        and whether each point is right.
    """
    points = list(config.model.points)
    drawn = [(name, len(rows), draw(rows, EXAMPLES, config.run.seed)) for name, rows in groups_of(clips, points)]
    wanted = pd.concat([rows for _, _, rows in drawn])[["video", "clip"]].drop_duplicates()
    frames = read_frames(config, manifest, list(wanted.itertuples(index=False, name=None)))
    return [
        {
            "group": name,
            "clips": size,
            "examples": [
                _example(row, frames.get((row["video"], row["clip"]), []), points) for row in rows.to_dict("records")
            ],
        }
        for name, size, rows in drawn
    ]


def _example(row: dict[str, Any], frames: list[str], points: Sequence[str]) -> Part:
    kept = {key: row[key] for key in ("video", "truth", "prediction", "point")}
    verdicts = [{"point": point, "right": bool(row[f"right at {point}"])} for point in points]
    return {**kept, "right": bool(row["right"]), "macs": float(row["macs"]), "verdicts": verdicts, "frames": frames}


def read_frames(
    config: Config, manifest: Manifest, clips: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], list[str]]:
    """Returns a few frames of clips, as the model sees them, as data URIs. A clip that cannot be read is left out.

    Args:
        config: The run's config.
        manifest: The evaluated videos.
        clips: Id of the video, and number of the clip in it.
    """
    listed = manifest.readable_rows("val")
    row_of = dict(zip(manifest["video"][listed], listed.tolist(), strict=True))
    rows = sorted({row_of[video] for video, _ in clips if video in row_of})
    dataset = EvalVideos(
        manifest, config, temporal_views=config.evaluate.temporal_views, spatial_crops=1, thumbnails=False
    )
    views = {item.video: item.views for item in stream(dataset, rows) if isinstance(item, VideoViews)}
    found = {}
    for video, clip in clips:
        if (row := row_of.get(video)) in views and clip < len(views[row]):
            found[video, clip] = [data_uri(jpeg) for jpeg in jpegs(views[row][clip, 0].numpy(), most=FRAMES, side=SIDE)]
    return found
