"""Estimates the GPU-hours of training from MACs alone, and prints a markdown table with a row for each config.

    python tools/training_costs.py configs/*_k400.yaml configs/*_ssv2.yaml configs/*_in1k.yaml --utilisation 0.4 0.06

The steps come from `videoadapt plan` on one GPU, the mean over the draws of `train.draw`. A backward pass has twice
the MACs of a forward pass, three times with activation checkpointing. Reading and communication are not included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, load_config
from videoadapt.errors import UserError
from videoadapt.performance.plan import analytic_passes, gpu_hours, work_of
from videoadapt.training.forecast import Forecast, Network, forecast
from videoadapt.training.groups import Group, GroupPlan

A100_MACS_PER_S = 156e12  # peak in bf16: 312 TFLOP/s, two per MAC
UTILISATIONS = (0.4, 0.06)  # an assumption for well-fed GPUs, and the value from the training days in SuperViT
# By number of classes: Something-Something V2, Kinetics-400 (MMAction2's copy), ImageNet-1k.
TRAIN_CLIPS = {174: 168_913, 400: 240_436, 1000: 1_281_167}
COLUMNS = (
    "config",
    "points: GMACs a view",
    "step",
    "epochs",
    "clips an epoch",
)  # step: relative to the costliest point


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument(
        "--peak-macs-per-s", type=float, default=A100_MACS_PER_S, help="of a GPU [default: 156e12, an A100's in bf16]"
    )
    parser.add_argument(
        "--utilisation", type=float, nargs="+", default=UTILISATIONS, help="fractions of the peak [default: 0.4 0.06]"
    )
    given = parser.parse_args()
    try:
        lines = [row(path, given.peak_macs_per_s, given.utilisation) for path in given.configs]
    except UserError as error:
        sys.exit(f"error: {error}")
    columns = (*COLUMNS, *(f"GPU-hours at {fraction:.0%}" for fraction in given.utilisation))
    for cells in (columns, ("---",) * len(columns), *lines):
        print(f"| {' | '.join(cells)} |")


def row(path: Path, peak_macs_per_s: float, utilisations: Sequence[float]) -> tuple[str, ...]:
    """Returns the cells of a config.

    Raises:
        UserError: The config cannot be loaded, or the number of clips in an epoch is unknown.
    """
    config = load_config(path, [f"plan.macs_per_s={peak_macs_per_s}"])
    clips = config.plan.clips or TRAIN_CLIPS.get(config.model.num_classes)
    if clips is None:
        raise UserError(
            f"{path}: set plan.clips, the clips of an epoch; they are only known for Kinetics-400 and ImageNet-1k"
        )
    points = point_macs(config.model)
    step = one_gpu(config)
    hours = gpu_hours(step, config, clips)
    alone = analytic_passes(config)[config.model.points[0]].seconds(config.train.batch)
    return (
        f"`{path}`",
        ", ".join(f"{point}: {macs / 1e9:.2f}" for point, macs in points.items()),
        f"{step.step_s / alone:.2f}",
        str(config.train.epochs),
        f"{clips:,}",
        *(f"{hours / fraction:,.0f}" for fraction in utilisations),
    )


def one_gpu(config: Config) -> Forecast:
    """Predicts a step on one GPU that runs at `plan.macs_per_s`."""
    plan = GroupPlan((Group(config.model.points, range(1)),))
    network = Network(bytes_per_s=float("inf"), overlaps=True)  # one GPU sends nothing
    return forecast(plan, work_of(config, analytic_passes(config), optimizer_s=0.0), network)


if __name__ == "__main__":
    main()
