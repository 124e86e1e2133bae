"""What ranks do in `test_grouped_training.py`: optimizer steps on random batches, whose results each rank saves.

Not a test by itself. The ranks are forked from a process that has imported this module, see `forked_ranks.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from videoadapt.config.load import Config, load_config, make_config
from videoadapt.data.clips.datasets import Failure
from videoadapt.data.clips.loader import Batch
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import RunError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing import scores
from videoadapt.routing.label import label
from videoadapt.runtime.ranks import broadcast_result, rank, ranks, wait_for_all, world_size
from videoadapt.runtime.signals import StopRequest
from videoadapt.training.ddp import share_statistics, sum_gradients
from videoadapt.training.freeze import freeze
from videoadapt.training.groups import make_plan
from videoadapt.training.metrics import Validation
from videoadapt.training.optim import make_optimizer
from videoadapt.training.overlap import measured_orders
from videoadapt.training.state import State, Tally
from videoadapt.training.step import RankRole, train_step
from videoadapt.training.step_report import StepReport
from videoadapt.training.train import train
from videoadapt.training.validate import Validator

TRAININGS = [(1, torch.float64), (1, torch.float32), (3, torch.float64)]  # steps, precision


def batches(config: Config, role: RankRole, step: int, unreadable: Container[int] = ()) -> list[Batch]:
    """Returns this rank's micro-batches of a step; the global batch is the same for every plan."""
    generator = torch.Generator().manual_seed(step)
    model, clips = config.model, config.train.micro_batch
    found = []
    for micro_batch in range(config.train.accumulate):
        shape = (clips, 3, model.num_frames, model.size, model.size)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, model.num_classes, (clips,), generator=generator)
        positions = role.positions(clips, pairs=config.data.mixes)
        read = [i for i in positions if micro_batch * clips + i not in unreadable]
        failures = [Failure(0, "gone.mp4", "gone")] * (len(positions) - len(read))
        rows = torch.tensor(read, dtype=torch.int64)
        found.append(Batch(frames[rows], labels[rows], rows, [micro_batch * clips + i for i in read], failures))
    return found


def trained(
    config: Config, manifest: Manifest, steps: int, dtype: torch.dtype, unreadable: Container[int]
) -> dict[str, Any]:
    """Returns what this rank has after some steps from a fixed start."""
    state = State.start(config, manifest)
    state.model = TimeSformer(config.model).to(dtype)
    freeze(state.model, config.train.freeze)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in state.model.parameters():  # away from zero, where many of them start
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.05)
    state.optimizer = make_optimizer(state.model.named_parameters(), config.train)
    role = RankRole.from_plan(config, state.model, make_plan(config, world_size(), {}))
    # On CPUs `auto` never chooses this order.
    role = replace(role, costliest_last=config.parallel.overlap == "auto")
    if role.costliest_last and dtype == torch.float32:  # of the clips that are timed
        measured_orders(role, state, 1e9)
    values = {}
    for step in range(steps):
        values = train_step(state, role, batches(config, role, step, unreadable)).read(state)
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


def save_trainings(folder: str, *unreadable: str) -> None:
    """Trains by FOLDER/config.yaml; rank r writes FOLDER/rankR.pt, with a result for each of `TRAININGS`.

    No rank can read the clips at the unreadable positions of each step.
    """
    config = load_config(Path(folder) / "config.yaml")
    with ranks(config):
        manifest = broadcast_result(lambda: load_or_index(config))
        failed = set(map(int, unreadable))
        results = {(steps, str(dtype)): trained(config, manifest, steps, dtype, failed) for steps, dtype in TRAININGS}
        torch.save(results, Path(folder) / f"rank{rank()}.pt")


def save_message_of_a_bad_loss(folder: str) -> None:
    """Reads the report of a step in which the last rank has a clip with a bad loss; rank r writes FOLDER/rankR.txt."""
    config = load_config(Path(folder) / "config.yaml")
    with ranks(config):
        state = State.start(config, broadcast_result(lambda: load_or_index(config)))
        rows = torch.tensor([2 * rank(), 2 * rank() + 1])
        tally = Tally()
        tally.add(torch.tensor([1.0, float("nan") if rank() == world_size() - 1 else 1.0]), rows > 0, rows)
        sums = torch.tensor([float("nan")] * 6 + [0.0] * 6)
        report = StepReport(3, {"8": Tally(), "6": tally}, sums, None, 0.1, [])
        try:
            report.read(state)
        except RunError as error:
            (Path(folder) / f"rank{rank()}.txt").write_text(str(error))


def save_validation(folder: str) -> None:
    """Validates the model before its first step; rank r writes FOLDER/rankR.pt."""
    config = load_config(Path(folder) / "config.yaml")
    with ranks(config):
        manifest = broadcast_result(lambda: load_or_index(config))
        found = Validator.of(State.start(config, manifest), 5).validate(StopRequest(), lambda note: None)
        assert found is not None
        torch.save(asdict(found), Path(folder) / f"rank{rank()}.pt")


def train_run(folder: str) -> None:
    """Trains by FOLDER/config.yaml; the messages of all ranks are in FOLDER/stderr."""
    os.dup2(os.open(Path(folder) / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    train(load_config(Path(folder) / "config.yaml"))


def train_until_it_gets_worse(folder: str) -> None:
    """The same, with validations of which the first is the best."""
    real = Validator.validate

    def worse(self: Validator, stop: StopRequest, progress: Callable[[str], None]) -> Validation | None:
        found = real(self, stop, progress)
        if found is not None:
            found.values["loss/6"] = float(found.epoch)
        return found

    Validator.validate = worse  # type: ignore[method-assign] # only in this process, which ends
    train_run(folder)


def label_run(folder: str) -> None:
    """Labels by FOLDER/config.yaml, in files of two videos, so that every rank has one."""
    scores.VIDEOS_PER_SHARD = 2
    label(load_config(Path(folder) / "config.yaml"))


def leave_often(folder: str, times: int = 30) -> None:
    """Joins the ranks, sums gradients and leaves, many times; each wrapped model outlives its process group."""
    config = make_config({"run": {"dir": folder, "device": "cpu"}})
    for _ in range(times):
        with ranks(config):
            wrapped = sum_gradients(torch.nn.Linear(2, 2))
            for _ in range(2):
                wrapped(torch.ones(1, 2)).sum().backward()
            wait_for_all()
        del wrapped
