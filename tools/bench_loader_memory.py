"""Checks whether reading leaks: draws clips through the training loader and records the memory of every process.

    python tools/bench_loader_memory.py --clips 10000
    python tools/bench_loader_memory.py --manifest runs/base/manifest.parquet --reader pyav --json

Without a manifest it generates 32 videos of 10 s and lists each 8 times. Linux only. USS counts the pages of a process
alone, PSS also its part of shared pages, and RSS shared pages (libraries) in full. A line is fitted to the USS after
the first fifth of the clips, in which caches fill; its slope is the leak.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import typer

from videoadapt.config.load import Config, make_config
from videoadapt.data.clips.loader import train_batches
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.performance.bench.memory import ProcessMemory, peak, process_memory
from videoadapt.runtime.console import Bar, print_table

FILES, COPIES, SECONDS, FPS = 32, 8, 10, 30  # size of the set of generated videos
BATCH = 8  # clips
WARM_UP = 0.2  # fraction of the clips, left out of the fit


@dataclass(frozen=True)
class Trend:
    """The memory of one process while clips were drawn, in KiB."""

    process: str
    first_uss: int  # after the warm-up
    last_uss: int
    peak: ProcessMemory
    slope: float  # growth of the USS per 1,000 clips
    slope_error: float  # standard error


def trend(process: str, clips: list[int], samples: list[ProcessMemory]) -> Trend:
    """Fits a line to the USS of a process by least squares.

    Args:
        process: Its name.
        clips: Number of clips drawn at each sample.
        samples: Its memory. The standard error assumes that neighbouring samples are independent.
    """
    warm = int(len(samples) * WARM_UP)
    x, y = np.array(clips[warm:]) / 1000, np.array([sample.uss for sample in samples[warm:]], dtype=float)
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return Trend(process, int(y[0]), int(y[-1]), peak(samples), float(slope), float(covariance[0, 0] ** 0.5))


def watch(manifest: Manifest, config: Config, clips: int, every: int) -> list[Trend]:
    """Draws `clips` clips and samples the main process and each worker after every `every` clips."""
    samples: dict[str, list[ProcessMemory]] = {}
    drawn, drawn_at_samples = 0, list[int]()
    with Bar(f"reader {config.data.reader}", total=clips, unit="clips") as bar:
        for micro_batches in train_batches(manifest, config):
            count = sum(len(batch.labels) for batch in micro_batches)
            drawn += count
            bar.step(count)
            if drawn // every > len(drawn_at_samples):
                drawn_at_samples.append(drawn)
                workers = sorted(process.pid or 0 for process in multiprocessing.active_children())
                names = {os.getpid(): "main", **{pid: f"worker {i}" for i, pid in enumerate(workers)}}
                for pid, name in names.items():
                    samples.setdefault(name, []).append(process_memory(pid))
            if drawn >= clips:
                break
    return [trend(name, drawn_at_samples, of_process) for name, of_process in samples.items()]


def write_videos(folder: Path, height: int, width: int) -> Path:
    """Writes videos of moving noise. Returns the path of a list that names each of them `COPIES` times."""
    rng = np.random.default_rng(0)
    for number in range(FILES):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            # Blocks of 8 pixels: noise in single pixels would make huge files.
            picture = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            for image in _moving(picture, height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    for copy in range(COPIES):  # links, because a manifest lists each path once
        for number in range(FILES):
            (folder / f"{number}-{copy}.mp4").symlink_to(folder / f"{number}.mp4")
    lines = [f"{number}-{copy}.mp4 0\n" for copy in range(COPIES) for number in range(FILES)]
    listed = folder / "train.txt"
    listed.write_text("".join(lines), encoding="utf-8")
    return listed


def _moving(picture: np.ndarray, height: int, width: int) -> Iterator[np.ndarray]:
    still = np.resize(picture, (height, width, 3))
    for shift in range(SECONDS * FPS):
        yield np.roll(still, shift, axis=1)


def run_config(folder: Path, listed: Path | None, *, reader: str, workers: int, crop: int) -> Config:
    """Returns a config with eight clips per step and so many epochs that the loader does not end."""
    return make_config(
        {
            "run": {"dir": folder, "device": "cpu"},
            "data": {"train": {"annotations": listed}, "workers": workers, "reader": reader},
            "model": {"size": crop, "points": [crop // 16]},
            "train": {"batch": BATCH, "epochs": 1_000_000},
        }
    )


def main(
    *,
    clips: int = 10_000,
    workers: int = 2,
    size: Annotated[tuple[int, int], typer.Option(help="Height and width of the generated videos.")] = (96, 128),
    crop: Annotated[int, typer.Option(help="Side of the clips, in pixels.")] = 224,
    reader: Annotated[list[str] | None, typer.Option(help="auto, decord or pyav; may be repeated.")] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="The manifest of an indexed run, instead of generated videos.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Draws clips with each reader, and prints the memory as a table or JSON."""
    trends: dict[str, list[Trend]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listed = None if manifest else write_videos(folder, *size)
        for kind in reader or ["auto", "pyav"]:
            config = run_config(folder / "run", listed, reader=kind, workers=workers, crop=crop)
            population = Manifest.load(manifest) if manifest else load_or_index(config)
            trends[kind] = watch(population, config, clips, every=max(BATCH, clips // 100))
    if as_json:
        print(
            json.dumps({kind: [asdict(trend) for trend in by_process] for kind, by_process in trends.items()}, indent=2)
        )
        return
    columns = ["reader", "process", "USS first", "last", "peak", "PSS peak", "RSS peak", "KiB per 1,000 clips"]
    rows = [
        [kind, t.process, *(f"{kb / 1024:.1f}" for kb in (t.first_uss, t.last_uss, t.peak.uss, t.peak.pss, t.peak.rss))]
        + [f"{t.slope:+.1f} ± {t.slope_error:.1f}"]
        for kind, by_process in trends.items()
        for t in by_process
    ]
    print_table(f"Memory in MiB while {workers} workers drew {clips} clips", columns, rows)


if __name__ == "__main__":
    typer.run(main)
