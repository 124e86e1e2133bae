"""Generates the demo's data set: small H.264 videos of turning stripes, with a known difficulty for each video.

Each video shows a striped disc with a soft edge that drifts over a smooth background. At a random frame the stripes
change from one orientation to another. The class is the ordered pair of orientations, so no single frame shows it.
Finer and fainter stripes need more tokens per frame, so each level of difficulty needs another operating point. The
demo tests that the assigner finds these levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
import pandas as pd

from videoadapt.errors import UserError
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import read_json, replacing, write_json

SIDE = 64  # height and width in pixels
FRAMES = 8  # frames of each video
FPS = 8
ORIENTATIONS = ("horizontal", "rising", "vertical", "falling")  # 0, 45, 90 and 135 degrees
PAIRS = tuple(itertools.permutations(range(len(ORIENTATIONS)), 2))
CLASSES = tuple(f"{ORIENTATIONS[a]} then {ORIENTATIONS[b]}" for a, b in PAIRS)


@dataclass(frozen=True)
class Level:
    """A level of difficulty."""

    name: str
    fraction: float  # fraction of the videos with this level, in (0, 1)
    periods: tuple[float, float]  # smallest and largest distance of two stripes in pixels
    contrast: float  # relative to the easiest level


LEVELS = (
    Level("easy", 0.50, (4.5, 14.0), 1.0),
    Level("medium", 0.25, (2.7, 3.5), 0.6),
    Level("hard", 0.25, (2.1, 2.5), 0.35),  # below 2 pixels a period stripes cannot be drawn (Nyquist)
)


def draw_video(rng: np.random.Generator, level: Level, pair: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Draws one video.

    Args:
        rng: Random numbers for disc, background, noise and the moment of the change. The number of draws does not
            depend on `pair`, so two classes drawn with equal generators differ only in the orientation.
        level: Period and contrast of the stripes.
        pair: Indices in `ORIENTATIONS` before and after the change.

    Returns:
        Frames (T, H, W, 3) uint8.
    """
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)  # (H, W) each
    background = _background(rng)
    radius = rng.uniform(16, 24)
    position = rng.uniform(radius * 0.9, SIDE - radius * 0.9, 2)
    drift = rng.uniform(-1, 1, 2)  # pixels per frame
    period = rng.uniform(*level.periods)
    contrast = level.contrast * rng.uniform(0.18, 0.32)
    change = rng.integers(2, FRAMES)  # at least two frames of the first orientation, at least one of the second
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.float32)
    for t in range(FRAMES):
        angle = pair[int(t >= change)] * np.pi / len(ORIENTATIONS)
        across = np.cos(angle) * y + np.sin(angle) * x  # (H, W), distance along the normal of the stripes
        # A new random phase for each frame: otherwise the motion of the stripes would reveal their orientation.
        stripes = np.sin(2 * np.pi * (across / period + rng.uniform()))
        distance = np.hypot(y - position[0], x - position[1])
        disc = np.clip((radius - distance) / 4 + 0.5, 0, 1)  # 1 inside, 0 outside, 4 pixels of soft edge
        frames[t] = background + (contrast * stripes * disc)[..., None]  # (H, W, 3)
        position = np.clip(position + drift, radius * 0.8, SIDE - radius * 0.8)
    frames += rng.normal(0, 0.08, frames.shape[:3])[..., None]  # grey noise like a camera's, equal in R, G and B
    return np.clip(frames * 255, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Returns a smooth background of medium colours, (H, W, 3): 4 x 4 random knots, interpolated bilinearly."""
    knots = rng.uniform(0.35, 0.65, (4, 4, 3))
    ramp = np.linspace(0, 3, SIDE)
    low = np.minimum(ramp.astype(int), 2)
    weight = (ramp - low)[:, None]  # (H, 1)
    rows = knots[low] * (1 - weight[..., None]) + knots[low + 1] * weight[..., None]  # (H, 4, 3)
    return (rows[:, low] * (1 - weight) + rows[:, low + 1] * weight).astype(np.float32)  # (H, W, 3)


def write_video(path: Path, frames: npt.NDArray[np.uint8], *, qp: int) -> None:
    """Encodes a video as H.264 in mp4. An interrupted call leaves no unfinished file.

    Args:
        path: The file to write.
        frames: (T, H, W, 3) uint8.
        qp: Constant quantiser of x264, 0 (lossless) to 51.
    """
    with replacing(path, durable=False) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        # One thread: the bytes of a file must not depend on the number of cores.
        stream.options = {"qp": str(qp), "preset": "ultrafast", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # flushes the frames that the encoder still holds


def plan_videos(split: str, count: int, seed: int) -> pd.DataFrame:
    """Draws class, level and seed of each video of a split.

    Classes are equally frequent and levels have their fractions, both up to rounding. Their order is random.

    Args:
        split: Name of the split. Two splits with the same seed have different videos.
        count: Number of videos.
        seed: Seed of the data set.

    Returns:
        A row per video with the columns `path` (relative), `label`, `level` (name) and `seed`.
    """
    stream = np.random.SeedSequence([seed, sum(map(ord, split))])
    rng = np.random.default_rng(stream)
    bounds = np.cumsum([level.fraction for level in LEVELS])
    levels = np.minimum(np.searchsorted(bounds, (np.arange(count) + 0.5) / count), len(LEVELS) - 1)
    return pd.DataFrame(
        {
            "path": [f"{split}/{i:05d}.mp4" for i in range(count)],
            "label": rng.permutation(np.arange(count) % len(PAIRS)),
            "level": [LEVELS[i].name for i in rng.permutation(levels)],
            "seed": stream.generate_state(count),
        }
    )


def generate(folder: Path, sizes: dict[str, int], *, seed: int, workers: int = 2, qp: int = 6) -> None:
    """Writes a data set: videos, `path label` lists `SPLIT.csv`, `classes.txt` and `levels.csv`.

    Existing videos are kept, so an interrupted call continues where it stopped. The files do not depend on `workers`.

    Args:
        folder: Folder of the data set.
        sizes: Number of videos by split.
        seed: Seed of the data set.
        workers: Number of processes.
        qp: Constant quantiser of x264, 0 to 51.

    Raises:
        UserError: The folder has data of another seed, other sizes or another `qp`.
    """
    recipe = {"seed": seed, "sizes": sizes, "qp": qp}
    recipe_path = folder / "recipe.json"
    made_with = read_json(recipe_path, "use another run.dir") if recipe_path.exists() else recipe
    if made_with != recipe:
        raise UserError(f"{folder}: has data made with {made_with}, not {recipe}; use another run.dir")
    write_json(recipe_path, recipe)
    plans = {split: plan_videos(split, count, seed) for split, count in sizes.items()}
    videos = pd.concat(plans.values())
    jobs = [
        _Job(folder / row.path, row.level, PAIRS[row.label], int(row.seed), qp)
        for row in videos.itertuples()
        if not _is_written(folder / row.path)
    ]
    with Bar("generate", total=len(videos), unit="videos", start=len(videos) - len(jobs)) as bar:
        for count in _run_jobs(jobs, workers):
            bar.step(count)
    for split, plan in plans.items():
        (folder / f"{split}.csv").write_text("".join(f"{row.path} {row.label}\n" for row in plan.itertuples()))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    videos[["path", "level"]].to_csv(folder / "levels.csv", index=False)


def _is_written(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0  # a power failure may have left an empty file


class _Job(NamedTuple):
    """One video to write."""

    path: Path
    level: str
    pair: tuple[int, int]
    seed: int
    qp: int


def _run_jobs(jobs: list[_Job], workers: int) -> Iterator[int]:
    """Writes videos in processes. Yields the number of videos of each finished chunk."""
    chunks = [jobs[i : i + 50] for i in range(0, len(jobs), 50)]  # a video takes milliseconds: too short for a task
    if chunks:
        with ProcessPoolExecutor(workers) as pool:
            yield from pool.map(_write_videos, chunks)


def _write_videos(jobs: list[_Job]) -> int:
    levels = {level.name: level for level in LEVELS}
    for job in jobs:
        frames = draw_video(np.random.default_rng(job.seed), levels[job.level], job.pair)
        write_video(job.path, frames, qp=job.qp)
    return len(jobs)
