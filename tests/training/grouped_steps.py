"""A program that tests start on several ranks: optimizer steps on made-up batches, gradients and parameters saved.

`python grouped_steps.py RANKS CONFIG FOLDER`; rank r writes FOLDER/rankR.pt, with what it holds after so many steps in
such a precision. The ranks are forked from a process that has imported all they need. Not a test by itself.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from rank_jobs import as_step
from videoadapt.config.load import Config, load_config
from videoadapt.data.clips.datasets import Failure
from videoadapt.data.clips.loader import Batch
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.ranks import rank, rank0_then_all, ranks, world_size
from videoadapt.training.ddp import share_statistics
from videoadapt.training.groups import make_plan
from videoadapt.training.optim import make_optimizer
from videoadapt.training.state import State
from videoadapt.training.step import RankRole, train_step

UNREADABLE = 5  # position of a clip that nobody can read
TRAININGS = [(1, torch.float64), (1, torch.float32), (5, torch.float64)]  # steps, precision


def batches(config: Config, role: RankRole, step: int) -> list[Batch]:
    """This rank's share of a step's parts, the same clips for any plan."""
    generator = torch.Generator().manual_seed(step)
    model, clips = config.model, config.train.batch // config.train.accumulate
    found = []
    for part in range(config.train.accumulate):
        shape = (clips, 3, model.num_frames, model.size, model.size)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, model.num_classes, (clips,), generator=generator)
        own = [i for i in role.positions(clips, pairs=config.data.mixes) if part * clips + i != UNREADABLE]
        failures = [Failure(0, "gone.mp4", "gone")] * (len(role.positions(clips, pairs=config.data.mixes)) - len(own))
        rows = torch.tensor(own, dtype=torch.int64)
        found.append(Batch(frames[rows], labels[rows], rows, [part * clips + i for i in own], failures))
    return found


def trained(config: Config, manifest: Manifest, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    state = State.start(config, manifest)
    state.model = TimeSformer(config.model).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in state.model.parameters():  # off the zeros that it starts with
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.05)
    state.optimizer = make_optimizer(state.model.named_parameters(), config.train)
    role = RankRole.from_plan(config, state.model, make_plan(config, world_size(), {}))
    values = {}
    for step in range(steps):
        values = train_step(state, role, batches(config, role, step))
        state.step += 1
    share_statistics(state.model, role.plan)
    named = dict(state.model.named_parameters())
    return {
        "gradients": {name: parameter.grad for name, parameter in named.items()},
        "parameters": {name: parameter.detach() for name, parameter in named.items()},
        "buffers": dict(state.model.named_buffers()),
        "values": values,
        "skipped": state.skipped,
    }


def main(number: int, world: int, path: str, folder: str) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # where it is, should it hang
    os.environ |= as_step(number, world)
    torch.set_num_threads(1)
    config = load_config(path)
    with ranks(config):
        manifest = rank0_then_all(lambda: load_or_index(config))
        held = {(steps, str(dtype)): trained(config, manifest, steps, dtype) for steps, dtype in TRAININGS}
        torch.save(held, Path(folder) / f"rank{rank()}.pt")


if __name__ == "__main__":
    world, *paths = sys.argv[1:]
    start_processes(main, (int(world), *paths), int(world), start_method="fork")
