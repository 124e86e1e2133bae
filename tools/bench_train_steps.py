"""The code that `bench_train.py` times: optimizer steps, single passes, a matrix product and an all-reduce.

Each public function prepares one case in its process and returns a turn, which measures it once. A turn starts with a
warm-up that is not measured: caches are cold, and memory was released, because other cases ran in between.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rank_processes import Turn
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.clips.loader import Batch
from videoadapt.data.clips.views import normalise
from videoadapt.data.index.manifest import Manifest
from videoadapt.performance.bench.peak import peak_bytes, reset_peak_bytes
from videoadapt.performance.bench.peers import HuggingFace, peer_side
from videoadapt.performance.memory import parameter_count
from videoadapt.performance.timing import Round, Stopwatch
from videoadapt.runtime.machine import autocast, now, pick_device, precision_dtype
from videoadapt.runtime.ranks import wait_for_all, world_size
from videoadapt.training.ddp import no_gradient_sync
from videoadapt.training.exchange import TeacherLogits
from videoadapt.training.groups import make_plan
from videoadapt.training.optim import make_optimizer
from videoadapt.training.state import State
from videoadapt.training.step import RankRole, train_step
from videoadapt.training.utilisation import product_rate


@dataclass(frozen=True)
class StepTime:
    """One step on one rank, the mean over the steps of a turn."""

    seconds: float
    silent_s: float  # the same step without communication
    waited_s: float  # time spent waiting for the teacher's logits
    peak_bytes: int  # above the imports; on a GPU, what torch has allocated there


class _TimedLogits(TeacherLogits):
    """Measures how long its rank waits for the teacher's logits."""

    waited_s = 0.0

    def receive(self, positions: Tensor, clips: int) -> Tensor:
        begin = time.perf_counter()
        values = super().receive(positions, clips)
        self.waited_s += time.perf_counter() - begin
        return values


class _SilentLogits(TeacherLogits):
    """Sends nothing; the teacher's logits are zeros."""

    def start(self) -> None:
        pass

    def send(self, logits: Tensor, positions: Tensor) -> None:
        pass

    def receive(self, positions: Tensor, clips: int) -> Tensor:
        del positions
        return torch.zeros(clips, self.classes, dtype=self.dtype, device=self.device)


def our_step(config: Config, steps: int, costliest_last: bool) -> Turn:
    """Prepares `train_step` on random clips, on the ranks of `parallel.groups`; a turn returns a `StepTime`."""
    base = reset_peak_bytes()
    state = State.start(config, Manifest(pa.table({}), ()))
    role = RankRole.from_plan(config, state.model, make_plan(config, world_size(), point_macs(config.model)))
    role = replace(role, costliest_last=costliest_last)
    timed, silent_role = None, role
    if role.teacher_logits is not None:
        given = (config, role.plan, role.teacher_logits.dtype, state.device)
        timed, silent_role = _TimedLogits(*given), replace(role, teacher_logits=_SilentLogits(*given))
        role = replace(role, teacher_logits=timed)
    batches = random_batches(config, role, state.device)

    def seconds_a_step(role: RankRole) -> float:
        wait_for_all()
        begin = now(state.device)
        for _ in range(steps):
            train_step(state, role, batches)
            state.step += 1
        return (now(state.device) - begin) / steps

    def turn() -> StepTime:
        train_step(state, role, batches)  # warm-up
        if timed is not None:
            timed.waited_s = 0.0
        seconds = silent_s = seconds_a_step(role)
        if world_size() > 1:
            # The weights of the ranks now differ. This does not change the time of later steps.
            with no_gradient_sync(role.module):
                silent_s = seconds_a_step(silent_role)
        waited_s = timed.waited_s / steps if timed is not None else 0.0
        return StepTime(seconds, silent_s, waited_s, _peak_bytes(state.device, base))

    return turn


def random_batches(config: Config, role: RankRole, device: torch.device) -> list[Batch]:
    """Returns this rank's clips of every micro-batch of a step; the global batch is the same in every layout."""
    model, clips = config.model, config.train.micro_batch
    generator = torch.Generator().manual_seed(config.run.seed)
    positions = role.positions(clips, pairs=config.data.mixes)
    rows = torch.tensor(positions, dtype=torch.int64)
    batches = []
    for micro_batch in range(config.train.accumulate):
        shape = (clips, 3, model.num_frames, model.size, model.size)  # B C T H W
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, model.num_classes, (clips,), generator=generator)
        in_step = [micro_batch * clips + position for position in positions]
        batches.append(Batch(frames[rows].to(device), labels[rows].to(device), rows, in_step, []))
    return batches


def peer_step(config: Config, steps: int) -> Turn:
    """Prepares a plain training step of Hugging Face's TimeSformer at the costliest length.

    The step has no drop path: that implementation takes integers only. A turn returns a `StepTime`.

    Raises:
        UserError: transformers is not installed, or the config's model has no temporal attention.
    """
    model, device = config.model, pick_device(config.run.device)
    with torch.device("meta"):
        HuggingFace(model)  # imports transformers, whose memory is not the model's
    base = reset_peak_bytes()
    peer = HuggingFace(model).to(device).train()
    optimizer = make_optimizer(peer.named_parameters(), config.train)
    forward: nn.Module = torch.compile(peer) if config.train.compiles else peer  # type: ignore[assignment]
    side = peer_side(model)
    shape = (config.train.batch, 3, model.num_frames, side, side)  # B C T H W
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(0, model.num_classes, (config.train.batch,), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        frames = normalise(clips, model.mean, model.std, torch.float32)
        with autocast(device, config.run.precision):
            logits = forward(frames)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.train.clip_grad or float("inf"))
        optimizer.step()

    def turn() -> StepTime:
        step()  # warm-up
        begin = now(device)
        for _ in range(steps):
            step()
        seconds = (now(device) - begin) / steps
        return StepTime(seconds, seconds, 0.0, _peak_bytes(device, base))

    return turn


def passes(config: Config, sizes: tuple[int, int], steps: int) -> Turn:
    """Prepares the measurement of `videoadapt plan`; a turn returns `steps` rounds."""
    stopwatch = Stopwatch(config, sizes)

    def turn() -> list[Round]:
        return [stopwatch.measure() for _ in range(1 + steps)][1:]

    return turn


def matrix_product(config: Config) -> Turn:
    """Prepares a large matrix product in the run's precision; a turn returns its MACs per second."""
    return partial(product_rate, pick_device(config.run.device), precision_dtype(config.run.precision))


def all_reduce(config: Config) -> Turn:
    """Prepares an all-reduce of all gradients; a turn returns the bytes per second from a rank to the next."""
    gradients = torch.zeros(parameter_count(config), device=pick_device(config.run.device))
    # A ring all-reduce sends 2 (n - 1) / n of the bytes from each rank.
    sent = 2 * (world_size() - 1) / world_size() * gradients.numel() * gradients.element_size()

    def turn() -> float:
        dist.all_reduce(gradients)  # warm-up
        wait_for_all()
        begin = now(gradients.device)
        dist.all_reduce(gradients)
        return sent / (now(gradients.device) - begin)

    return turn


def _peak_bytes(device: torch.device, base: int) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes() - base
