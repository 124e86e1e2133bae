"""What `bench train` times: our optimizer step, Hugging Face's, passes, a matrix product, a sum over ranks.

Each function prepares one of them in its process and returns the turn: what is run when it is its turn. A turn begins
with one step that does not count, as caches are cold and memory was given back while others had their turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench_train_ranks import Turn
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.data.clips.loader import Batch
from videoadapt.data.clips.views import normalise
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import UserError
from videoadapt.performance.bench.machine import memory_after_imports, peak_bytes
from videoadapt.performance.memory import parameter_count
from videoadapt.performance.timing import Round, Stopwatch, now
from videoadapt.runtime.machine import pick_device, precision_dtype
from videoadapt.runtime.ranks import wait_for_all, world_size
from videoadapt.training.ddp import no_gradient_sync
from videoadapt.training.exchange import TeacherExchange
from videoadapt.training.groups import make_plan
from videoadapt.training.optim import make_optimizer
from videoadapt.training.state import State
from videoadapt.training.train import RankRole, train_step

_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class StepTurn:
    """Seconds of a step on this rank; `alone_s` of the same step without communication, `waited_s` for logits in it."""

    seconds: float
    alone_s: float
    waited_s: float
    peak_bytes: int  # above what the process had imported; on a GPU, what torch has allocated there


class _WatchedExchange(TeacherExchange):
    """Notes how long its rank waits."""

    waited_s = 0.0

    def logits(self) -> Tensor:
        before = time.perf_counter()
        values = super().logits()
        self.waited_s += time.perf_counter() - before
        return values


class _NoExchange(TeacherExchange):
    """Sends nothing: the teacher's logits are zeros."""

    def start(self, shares: Sequence[range], own: Tensor | None = None) -> None:
        del own
        self._clips = sum(map(len, shares))

    def logits(self) -> Tensor:
        return torch.zeros(self._clips, self._classes, dtype=self.dtype, device=self._device)


def our_step(config: Config, steps: int) -> Turn:
    """`train_step` on random clips, by the ranks of `parallel.groups`."""
    base = memory_after_imports()
    state = State.start(config, Manifest(pa.table({}), ()))
    seat = RankRole.take(config, state.model, make_plan(config, world_size(), point_macs(config.model)))
    watched, silent = None, seat
    if seat.exchange is not None:
        given = (seat.plan, config.model.num_classes, seat.exchange.dtype, state.device)
        watched, silent = _WatchedExchange(*given), replace(seat, exchange=_NoExchange(*given))
        seat = replace(seat, exchange=watched)
    batches = _batches(config, seat, state.device)

    def run(seat: RankRole) -> float:
        wait_for_all()
        begin = now(state.device)
        for _ in range(steps):
            train_step(state, seat, batches)
            state.step += 1
        return (now(state.device) - begin) / steps

    def turn() -> StepTurn:
        train_step(state, seat, batches)
        if watched is not None:
            watched.waited_s = 0.0
        seconds = alone_s = run(seat)
        if world_size() > 1:
            with no_gradient_sync(seat.forward):  # the ranks' weights drift apart, which takes no time
                alone_s = run(silent)
        waited_s = watched.waited_s / steps if watched is not None else 0.0
        return StepTurn(seconds, alone_s, waited_s, _peak_bytes(state.device, base))

    return turn


def _batches(config: Config, seat: RankRole, device: torch.device) -> list[Batch]:
    """This rank's share of a step's parts, the same clips for any plan."""
    model, clips = config.model, config.train.batch // config.train.accumulate
    generator = torch.Generator().manual_seed(config.run.seed)
    share = seat.positions(clips, pairs=config.data.mixes)
    found = []
    for part in range(config.train.accumulate):
        shape = (clips, 3, model.num_frames, model.size, model.size)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, model.num_classes, (clips,), generator=generator)
        rows = torch.tensor(share, dtype=torch.int64)
        positions = [part * clips + position for position in share]
        found.append(Batch(frames[rows].to(device), labels[rows].to(device), rows, positions, []))
    return found


def peer_step(config: Config, steps: int) -> Turn:
    """The same step by Hugging Face's TimeSformer, at the costliest length alone, as a plain training loop has it.

    Without drop path, of which it takes whole numbers only. Raises `UserError` where transformers is missing, or for a
    model without temporal attention.
    """
    try:
        from transformers import TimesformerConfig, TimesformerForVideoClassification
    except ImportError as error:
        raise UserError(f"transformers is not installed ({error}); pip install transformers") from None
    model = config.model
    if not model.temporal:
        raise UserError("Hugging Face's TimeSformer has temporal attention, this config has not")
    base, device = memory_after_imports(), pick_device(config.run.device)
    length = Point.parse(model.points[0]).length
    made = TimesformerForVideoClassification(
        TimesformerConfig(
            image_size=length * model.patch,
            patch_size=model.patch,
            num_frames=model.num_frames,
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            intermediate_size=int(model.width * model.mlp_ratio),
            num_labels=model.num_classes,
        )
    ).to(device)
    made.train()
    optimizer = make_optimizer(made.named_parameters(), config.train)
    forward: nn.Module = torch.compile(made) if config.train.compile else made  # type: ignore[assignment]
    side = length * model.patch
    clips = torch.randint(0, 256, (config.train.batch, 3, model.num_frames, side, side), dtype=torch.uint8)
    clips, labels = clips.to(device), torch.randint(0, model.num_classes, (config.train.batch,)).to(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        frames = normalise(clips, model.mean, model.std, torch.float32).transpose(1, 2)  # B T C H W
        with torch.autocast(device.type, torch.bfloat16, enabled=config.run.precision == "bf16"):
            logits = forward(frames).logits
        nn.functional.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), config.train.clip_grad or float("inf"))
        optimizer.step()

    def turn() -> StepTurn:
        step()
        begin = now(device)
        for _ in range(steps):
            step()
        seconds = (now(device) - begin) / steps
        return StepTurn(seconds, seconds, 0.0, _peak_bytes(device, base))

    return turn


def passes(config: Config, sizes: tuple[int, int], steps: int) -> Turn:
    """What `plan` measures, so many times."""
    stopwatch = Stopwatch(config, sizes)

    def turn() -> list[Round]:
        return [stopwatch.measure() for _ in range(1 + steps)][1:]

    return turn


def matrix_product(config: Config) -> Turn:
    """MACs per second of one large product in the run's precision: the peak that steps are compared with."""
    device = pick_device(config.run.device)
    side = _PRODUCT_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=precision_dtype(config.run.precision))

    def turn() -> float:
        torch.mm(matrix, matrix)
        begin = now(device)
        for _ in range(8):
            torch.mm(matrix, matrix)
        return 8 * side**3 / (now(device) - begin)

    return turn


def sum_over_ranks(config: Config) -> Turn:
    """Bytes per second of the network, from the time that a sum of all gradients takes."""
    gradients = torch.zeros(parameter_count(config), device=pick_device(config.run.device))
    sent = 2 * (world_size() - 1) / world_size() * gradients.numel() * gradients.element_size()

    def turn() -> float:
        dist.all_reduce(gradients)
        wait_for_all()
        begin = now(gradients.device)
        dist.all_reduce(gradients)
        return sent / (now(gradients.device) - begin)

    return turn


def _peak_bytes(device: torch.device, base: int) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes() - base
