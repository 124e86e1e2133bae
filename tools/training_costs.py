"""What it takes to train configs, from their MACs alone: a markdown table, one line a config.

    python tools/training_costs.py configs/*_k400.yaml configs/*_in1k.yaml --utilisation 0.4 0.06

A backward pass counts twice a forward pass, thrice with activation checkpointing; steps are those of `videoadapt plan`
on one GPU, the mean over what `train.draw` may draw. Reading clips and sending gradients are not in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, load_config
from videoadapt.errors import UserError
from videoadapt.performance.forecast import Forecast, Network, forecast
from videoadapt.performance.plan import analytic_passes, gpu_hours, work_of
from videoadapt.training.groups import Group, GroupPlan

A100_MACS_PER_S = 156e12  # its peak in bf16
UTILISATIONS = (0.4, 0.06)  # assumed where GPUs are well fed; what the days of training that SuperViT gives come to
TRAIN_CLIPS = {400: 240_436, 1000: 1_281_167}  # by classes: Kinetics-400 as MMAction2's copy has it, ImageNet-1k
COLUMNS = ("config", "points: GMACs a view", "step", "epochs", "clips an epoch")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument(
        "--peak-macs-per-s", type=float, default=A100_MACS_PER_S, help="of a GPU [default: 156e12, an A100's in bf16]"
    )
    parser.add_argument(
        "--utilisation", type=float, nargs="+", default=UTILISATIONS, help="shares of the peak [default: 0.4 0.06]"
    )
    given = parser.parse_args()
    try:
        lines = [row(path, given.peak_macs_per_s, given.utilisation) for path in given.configs]
    except UserError as error:
        sys.exit(f"error: {error}")
    columns = (*COLUMNS, *(f"GPU-hours at {share:.0%}" for share in given.utilisation))
    for cells in (columns, ("---",) * len(columns), *lines):
        print(f"| {' | '.join(cells)} |")


def row(path: Path, peak_macs_per_s: float, utilisations: Sequence[float]) -> tuple[str, ...]:
    """The cells of a config's line. Raises `UserError` where the clips of an epoch are not known."""
    config = load_config(path, [f"plan.macs_per_s={peak_macs_per_s}"])
    clips = config.plan.clips or TRAIN_CLIPS.get(config.model.num_classes)
    if clips is None:
        raise UserError(
            f"{path}: set plan.clips, the clips of an epoch; known are those of Kinetics-400 and ImageNet-1k"
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
        *(f"{hours / share:,.0f}" for share in utilisations),
    )


def one_gpu(config: Config) -> Forecast:
    """A step of one GPU, at `plan.macs_per_s`."""
    everything = GroupPlan((Group(config.model.points, range(1)),))
    nothing_sent = Network(bytes_per_s=float("inf"), overlaps=True)
    return forecast(everything, work_of(config, analytic_passes(config), optimizer_s=0.0), nothing_sent)


if __name__ == "__main__":
    main()
