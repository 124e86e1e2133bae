"""The demo's data: real H.264 files of discs whose stripes turn, with a difficulty that is known for every video.

A softly edged striped disc drifts over a smooth background. At some moment its stripes switch from one orientation to
another; the class is the ordered pair, so that no single frame shows it. The finer and fainter the stripes, the more
tokens per frame it takes to see them: the staircase of difficulty is built in, and this is what the demo tests.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from videoadapt.errors import UserError
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import replacing, write_json

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

SIDE = 64  # pixels
FRAMES = 8
FPS = 8
ORIENTATIONS = ("horizontal", "rising", "vertical", "falling")
PAIRS = tuple(itertools.permutations(range(len(ORIENTATIONS)), 2))
CLASSES = tuple(f"{ORIENTATIONS[a]} then {ORIENTATIONS[b]}" for a, b in PAIRS)


@dataclass(frozen=True)
class Level:
    """A level of difficulty: its share of the videos, stripe periods in pixels, and contrast."""

    name: str
    share: float
    periods: tuple[float, float]
    contrast: float


LEVELS = (
    Level("easy", 0.50, (4.5, 14.0), 1.0),
    Level("medium", 0.25, (2.7, 3.5), 0.6),
    Level("hard", 0.25, (2.1, 2.5), 0.35),
)


def render(rng: np.random.Generator, level: Level, pair: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """One video, `(T, H, W, 3)` uint8: stripes of the first orientation, then, from a random frame on, the second."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    background = _smooth(rng)
    radius = rng.uniform(16, 24)
    position = rng.uniform(radius * 0.9, SIDE - radius * 0.9, 2)
    drift = rng.uniform(-1, 1, 2)
    period = rng.uniform(*level.periods)
    contrast = level.contrast * rng.uniform(0.18, 0.32)
    switch = rng.integers(2, FRAMES)
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.float32)
    for t in range(FRAMES):
        angle = pair[int(t >= switch)] * np.pi / len(ORIENTATIONS)
        across = np.cos(angle) * y + np.sin(angle) * x
        stripes = np.sin(2 * np.pi * (across / period + rng.uniform()))  # the phase says nothing
        distance = np.hypot(y - position[0], x - position[1])
        disc = np.clip((radius - distance) / 4 + 0.5, 0, 1)
        frames[t] = background + (contrast * stripes * disc)[..., None]
        position = np.clip(position + drift, radius * 0.8, SIDE - radius * 0.8)
    frames += rng.normal(0, 0.08, frames.shape[:3])[..., None]  # luminance noise, as a camera's
    return np.clip(frames * 255, 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A smooth coloured background in the middle of the range, `(H, W, 3)`."""
    knots = rng.uniform(0.35, 0.65, (4, 4, 3))
    ramp = np.linspace(0, 3, SIDE)
    low = np.minimum(ramp.astype(int), 2)
    part = (ramp - low)[:, None]
    rows = knots[low] * (1 - part[..., None]) + knots[low + 1] * part[..., None]  # (H, 4, 3)
    return (rows[:, low] * (1 - part) + rows[:, low + 1] * part).astype(np.float32)


def write_video(path: Path, frames: npt.NDArray[np.uint8], *, qp: int) -> None:
    """Writes `(T, H, W, 3)` frames as H.264 in mp4, whole or not at all."""
    import av

    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"qp": str(qp), "preset": "ultrafast", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def plan_videos(split: str, count: int, seed: int) -> pd.DataFrame:
    """What the videos of a split show: `path, label, level, seed`; classes and levels in fixed shares, shuffled."""
    stream = np.random.SeedSequence([seed, sum(map(ord, split))])
    rng = np.random.default_rng(stream)
    bounds = np.cumsum([level.share for level in LEVELS])
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
    """Makes the splits of a data set under `folder`, with `SPLIT.csv` lists, `classes.txt` and `levels.csv`.

    Videos that are there already are kept, so an interrupted call goes on where it stopped. Raises `UserError` for a
    folder that holds another seed's or size's data.
    """
    recipe = {"seed": seed, "sizes": sizes, "qp": qp}
    made = folder / "recipe.json"
    if made.exists() and json.loads(made.read_text(encoding="utf-8")) != recipe:
        raise UserError(f"{folder}: holds data made with {made.read_text().strip()}, not {recipe}; use another run.dir")
    write_json(made, recipe)
    plans = {split: plan_videos(split, count, seed) for split, count in sizes.items()}
    videos = pd.concat(plans.values())
    jobs = [
        (folder / row.path, row.level, PAIRS[row.label], int(row.seed), qp)
        for row in videos.itertuples()
        if not (folder / row.path).exists()
    ]
    with Bar("generate", total=len(videos), unit="videos", start=len(videos) - len(jobs)) as bar:
        for done in _run(jobs, workers):
            bar.step(done)
    for split, plan in plans.items():
        (folder / f"{split}.csv").write_text("".join(f"{r.path} {r.label}\n" for r in plan.itertuples()))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    videos[["path", "level"]].to_csv(folder / "levels.csv", index=False)


Job = tuple[Path, str, tuple[int, int], int, int]


def _run(jobs: list[Job], workers: int) -> Iterator[int]:
    chunks = [jobs[i : i + 50] for i in range(0, len(jobs), 50)]
    if chunks:
        with ProcessPoolExecutor(workers) as pool:
            yield from pool.map(_make, chunks)


def _make(jobs: list[Job]) -> int:
    levels = {level.name: level for level in LEVELS}
    for path, level, pair, seed, qp in jobs:
        write_video(path, render(np.random.default_rng(seed), levels[level], pair), qp=qp)
    return len(jobs)


def open_encoder(context: VideoCodecContext) -> None:
    """Opens it; afterwards every thread of this process has the scheduling policy that the caller had before.

    SVT-AV1, run as root, makes its threads and the caller's real-time ones (SCHED_FIFO 99). So would be every process
    started after that, and one that polls would leave no time to any other on its core. Raises `av.FFmpegError`.
    """
    if not hasattr(os, "sched_setscheduler"):
        context.open()
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        context.open()
    finally:
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(ProcessLookupError):  # it has ended
                if os.sched_getscheduler(thread) != before[0]:
                    os.sched_setscheduler(thread, *before)
