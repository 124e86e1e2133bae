"""The whole main job on data that it makes: generate, index, train, label, assign, evaluate, report; in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.load import Config, load_config
from videoadapt.config.points import Point
from videoadapt.data.index.manifest import index
from videoadapt.data.synthetic import LEVELS, generate
from videoadapt.evaluation.costs import flops
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.report.plots import draw_costs, plot_accuracy_cost, save_figure
from videoadapt.routing.fit_assigner import assign
from videoadapt.routing.label import label
from videoadapt.runtime.console import percent, print_table, say
from videoadapt.runtime.files import write_json
from videoadapt.runtime.machine import worker_count
from videoadapt.training.train import train

SPLITS = {"train": 5000, "val": 1000}  # of train, data.holdout is kept for the assigner's labels


def demo_config(overrides: Sequence[str] = ()) -> Config:
    """The demo's config, `configs/demo.yaml`, with its data inside the run folder."""
    package = Path(__file__).parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    config = load_config(folder / "demo.yaml", overrides)
    data = config.run.dir / "data"
    lists = [f"data.{split}.annotations={data / split}.csv" for split in SPLITS]
    return load_config(
        folder / "demo.yaml", [*overrides, *lists, f"data.root={data}", f"data.classes={data / 'classes.txt'}"]
    )


def demo(overrides: Sequence[str] = (), sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """Runs every stage, going on where an earlier call stopped; returns what `summary.json` in the run folder holds."""
    start = time.monotonic()
    config = demo_config(overrides)
    seconds: dict[str, float] = {}

    def timed(name: str, stage: Callable[[], Any]) -> Any:
        before = time.monotonic()
        result = stage()
        seconds[name] = round(time.monotonic() - before, 1)
        return result

    say(f"videoadapt demo: about 3 minutes on 2 cores; everything stays in {config.run.dir}")
    data = config.run.dir / "data"
    workers = worker_count(config.data.workers)
    timed("generate", lambda: generate(data, sizes or SPLITS, seed=config.run.seed, workers=workers))
    timed("index", lambda: index(config))
    timed("train", lambda: train(config))
    timed("label", lambda: label(config))
    timed("assign", lambda: assign(config))
    result = timed("evaluate", lambda: evaluate(config))
    costs = timed("flops", lambda: flops(config))
    draw_costs(config.run.dir, costs)
    save_figure(config.run.dir / "accuracy_cost.png", plot_accuracy_cost(result["policies"]))
    summary = {
        "seconds": round(time.monotonic() - start, 1),
        "stages": seconds,
        "policies": result["policies"],
        "levels": level_table(config),
    }
    write_json(config.run.dir / "summary.json", summary)
    return summary


def level_table(config: Config) -> dict[str, dict[str, float]]:
    """By level of difficulty: clips, top-1 of each policy, and the mean length that the assigner chose."""
    folder = config.run.dir / "evaluate"
    levels = pd.read_csv(config.run.dir / "data" / "levels.csv").set_index("path")["level"]
    clips, videos = pd.read_parquet(folder / "clips.parquet"), pd.read_parquet(folder / "videos.parquet")
    clips = clips[clips["policy"] == "assigned"]
    lengths = clips["point"].map(lambda point: Point.parse(point).length)
    table: dict[str, dict[str, float]] = {}
    for level in (level.name for level in LEVELS):
        here = videos[videos["video"].map(levels) == level]
        row = {"videos": float(here["video"].nunique())}
        row["mean_length"] = float(np.mean(lengths[clips["video"].map(levels) == level]))
        table[level] = row | here.groupby("policy", sort=False)["right"].mean().to_dict()
    return table


def print_demo(summary: dict[str, Any], folder: Path) -> None:
    """The levels, the times, and where everything is."""
    policies = list(summary["policies"])
    rows = [
        (level, int(v["videos"]), f"{v['mean_length']:.2f}", *(percent(v[p]) for p in policies))
        for level, v in summary["levels"].items()
    ]
    print_table("By level: mean assigned length, and top-1 %", ("level", "videos", "mean length", *policies), rows)
    say("The levels (stripe period and contrast) were built so that each needs more tokens than the one before.")
    stages = ", ".join(f"{name} {value:.0f}" for name, value in summary["stages"].items())
    say(f"{summary['seconds']:.0f} s in all ({stages}); see {folder / 'summary.json'}, {folder / 'accuracy_cost.png'}")
