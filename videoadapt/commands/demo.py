"""The demo: generates videos, then runs every stage on them, from `index` to `report`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, config_folder, load_config
from videoadapt.data.index.manifest import index
from videoadapt.data.synthetic import LEVELS, generate
from videoadapt.evaluation.costs import flops
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.evaluation.evaluated import read_evaluated_table
from videoadapt.reporting.page import report
from videoadapt.reporting.plots import draw_curves, draw_evaluation
from videoadapt.routing.calibrate import calibrate
from videoadapt.routing.fit_assigner import assign
from videoadapt.routing.label import label
from videoadapt.runtime.console import advice_hidden, say
from videoadapt.runtime.files import Summary, write_json
from videoadapt.runtime.machine import worker_count
from videoadapt.training.train import train

SPLITS = {"train": 5600, "val": 1000}  # videos; `data.holdout` and `data.calibrate` of train are kept out of training

Result = TypeVar("Result")


@dataclass(frozen=True)
class DemoSummary:
    """The content of `summary.json`."""

    seconds: float  # time of the whole demo
    stages: dict[str, float]  # seconds of each stage
    policies: dict[str, Summary]  # as in `evaluate.json`
    levels: dict[str, dict[str, float]]  # see `level_table`


@dataclass(frozen=True)
class DemoResult:
    """The values that the demo prints."""

    folder: Path  # the run folder
    summary: DemoSummary
    costs: Summary  # the result of `flops`
    evaluation: Summary  # the result of `evaluate`
    calibration: Summary  # the result of `calibrate`


def demo(overrides: Sequence[str] = (), sizes: dict[str, int] | None = None) -> DemoResult:
    """Runs every stage. A second call with the same run folder continues where the first one stopped.

    Args:
        overrides: `section.key=value`, for `configs/demo.yaml`.
        sizes: Videos per split. Default: `SPLITS`.

    Raises:
        UserError: The run folder holds a run with another config.
    """
    with advice_hidden():
        return _demo(demo_config(overrides), sizes or SPLITS)


def _demo(config: Config, sizes: dict[str, int]) -> DemoResult:
    start = time.monotonic()
    seconds: dict[str, float] = {}

    def timed(name: str, stage: Callable[[], Result]) -> Result:
        before = time.monotonic()
        result = stage()
        seconds[name] = round(time.monotonic() - before, 1)
        return result

    say(f"videoadapt demo: about 7 minutes on 2 cores with AVX2, less with AVX-512; all files are in {config.run.dir}")
    data = config.run.dir / "data"
    workers = worker_count(config.data.workers)
    timed("generate", lambda: generate(data, sizes, seed=config.run.seed, workers=workers))
    timed("index", lambda: index(config))
    timed("train", lambda: train(config))
    draw_curves(config.run.dir)
    timed("label", lambda: label(config))
    timed("assign", lambda: assign(config))
    calibration = timed("calibrate", lambda: calibrate(config)).to_json()
    evaluation = timed("evaluate", lambda: evaluate(config)).to_json()
    costs = timed("flops", lambda: flops(config))
    draw_evaluation(config.run.dir)
    timed("report", lambda: report(config))
    total_s = round(time.monotonic() - start, 1)
    summary = DemoSummary(total_s, seconds, evaluation["policies"], level_table(config))
    write_json(config.run.dir / "summary.json", asdict(summary))
    return DemoResult(config.run.dir, summary, costs, evaluation, calibration)


def demo_config(overrides: Sequence[str] = ()) -> Config:
    """Returns `configs/demo.yaml` with the data inside the run folder."""
    demo = config_folder() / "demo.yaml"
    data = load_config(demo, overrides).run.dir / "data"
    lists = [f"data.{split}.annotations={data / split}.csv" for split in SPLITS]
    paths = [*lists, f"data.root={data}", f"data.classes={data / 'classes.txt'}"]
    return load_config(demo, [*overrides, *paths])


def level_table(config: Config) -> dict[str, dict[str, float]]:
    """Returns, for each level of difficulty: `videos`, `mean_cost`, and top-1 of each policy.

    `mean_cost` is the mean MACs of the assigned points, as a fraction of the costliest point's.
    """
    levels = pd.read_csv(config.run.dir / "data" / "levels.csv").set_index("path")["level"]
    clips = read_evaluated_table(config.run.dir, "clips", ["policy", "video", "point"])
    videos = read_evaluated_table(config.run.dir, "videos", ["policy", "video", "right"])
    clips = clips[clips["policy"] == "assigned"]
    macs = point_macs(config.model)
    costs = clips["point"].map(macs) / max(macs.values())
    table: dict[str, dict[str, float]] = {}
    for level in (level.name for level in LEVELS):
        of_level = videos[videos["video"].map(levels) == level]
        row = {"videos": float(of_level["video"].nunique())}
        row["mean_cost"] = float(np.mean(costs[clips["video"].map(levels) == level]))
        table[level] = row | of_level.groupby("policy", sort=False)["right"].mean().to_dict()
    return table
