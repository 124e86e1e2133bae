"""Measures the assigner's time beside the costliest point's: both families, as trained and as prepared for inference.

    python tools/bench_assigner.py configs/demo.yaml [section.key=value ...]

Weights and clips are random: times do not depend on them. The variants take turns. Times are CPU seconds of one thread,
so other programs change them little.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, load_config
from videoadapt.config.sections import AssignConfig
from videoadapt.data.clips.views import preprocess
from videoadapt.evaluation.intervals import median_interval
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner, assigner_macs
from videoadapt.runtime.machine import machine

ROUNDS = 9
CLIP_BATCH = 16  # of the costliest point; the assigner runs on many clips at once
SECONDS_OF_A_BATCH = 2.0  # the costliest point of a large model runs on fewer clips


def main() -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    macs, costliest = point_macs(config.model), config.model.points[0]
    work = {f"point {costliest}": _point(config, costliest)} | _assigners(config)
    rounds: list[dict[str, float]] = []
    with torch.inference_mode():
        for _ in range(1 + ROUNDS):  # the first round is a warm-up
            rounds.append({name: run() for name, (run, _) in work.items()})
    print(f"{machine()['cpu']}, 1 thread, torch {torch.__version__}, {config.assign.frames} frames\n")
    print("| | ms a clip | % of the costliest point's time (95 %) | % of its MACs |\n| --- | --- | --- | --- |")
    first = next(iter(work))
    for name, (_, cost) in work.items():
        ms = 1000 * statistics.median(by[name] for by in rounds[1:])
        middle, low, high = median_interval([100 * by[name] / by[first] for by in rounds[1:]])
        macs_share = 100 * cost / macs[costliest]
        print(f"| {name} | {ms:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {macs_share:.2f} |")


Work = dict[str, tuple[Callable[[], float], int]]  # CPU seconds of a clip, and its MACs


def _point(config: Config, point: str) -> tuple[Callable[[], float], int]:
    model = TimeSformer(config.model).eval()
    shape = (CLIP_BATCH, 3, config.model.num_frames, config.model.size, config.model.size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)

    def run(count: int) -> float:
        begin = time.process_time()
        model(preprocess(model, clips[:count]), point)
        return (time.process_time() - begin) / count

    with torch.inference_mode():
        one = run(1)
    count = max(1, min(CLIP_BATCH, int(SECONDS_OF_A_BATCH / one)))
    return (lambda: run(count)), point_macs(config.model)[point]


def _assigners(config: Config) -> Work:
    """Returns the assigner of the config, and one of the other family with the same settings."""
    families = ("efficientnet", "convolutions")
    found: Work = {}
    for family in sorted(families, key=lambda name: name != config.assign.family):
        settings = config.assign.model_copy(update={"family": family})
        if family == "convolutions":  # EfficientNet's seven stages would be too many: a stage halves the size
            settings = settings.model_copy(update={"stages": min(5, settings.stages)})
        assigner = Assigner(settings, len(config.model.points)).eval()
        cost = assigner_macs(settings, len(config.model.points))
        found[f"{family}, as trained"] = _assigner(assigner, settings), cost
        found[f"{family}, for inference"] = _assigner(assigner.for_inference(), settings), cost
        compiled = assigner.for_inference()
        compiled.compile()
        found[f"{family}, for inference, compiled"] = _assigner(compiled, settings), cost
        found[f"{family}, for inference, bf16"] = _assigner(assigner.for_inference().bfloat16(), settings), cost
    return found


def _assigner(assigner: Assigner, settings: AssignConfig) -> Callable[[], float]:
    count = 64 if settings.size < 64 else 16  # noqa: PLR2004 - pixels
    thumbnails = torch.randint(0, 256, (count, 3, settings.frames, settings.size, settings.size), dtype=torch.uint8)

    def run() -> float:
        begin = time.process_time()
        assigner.probabilities(thumbnails)
        return (time.process_time() - begin) / count

    return run


if __name__ == "__main__":
    main()
