"""Stage 1: one model at all its points. The loop is here.

Each step the costliest point learns the truth, and its detached logits teach the other lengths on the same clips; each
length, with all its tokens, teaches the points that keep a share of them. The gradients of the step's points add up and
the optimizer moves once (ReViT, section 3.4; SuperViT).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, dump_config
from videoadapt.config.points import Point
from videoadapt.data.clips.augment import mix
from videoadapt.data.clips.loader import Batch, steps_per_epoch, train_batches
from videoadapt.data.clips.views import normalise
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import RunError
from videoadapt.model.checkpoint import Checkpoint, Checkpoints, load_checkpoint, train_checkpoints
from videoadapt.model.timesformer import Heads, TimeSformer, compiled
from videoadapt.model.weights.load import load_weights
from videoadapt.runtime.console import Bar, say
from videoadapt.runtime.files import write_json
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.machine import peak_memory_bytes, precision_dtype, worker_count
from videoadapt.runtime.ranks import (
    all_reduce_sum,
    any_requested,
    broadcast_result,
    rank,
    rank0_then_all,
    ranks,
    wait_for_file,
    world_size,
)
from videoadapt.runtime.seeds import seed_of
from videoadapt.runtime.signals import StopRequest
from videoadapt.training import losses
from videoadapt.training.ddp import (
    no_gradient_sync,
    share_statistics,
    statistics_are_apart,
    sum_gradients,
    synchronise,
)
from videoadapt.training.draws import drawn_points, teacher_of
from videoadapt.training.exchange import ClipExchange, TeacherExchange
from videoadapt.training.groups import Group, GroupPlan, make_plan
from videoadapt.training.losses import Targets, make_targets
from videoadapt.training.metrics import Metrics
from videoadapt.training.optim import make_schedule
from videoadapt.training.preflight import preflight
from videoadapt.training.state import State, Tally
from videoadapt.training.throughput import ThroughputMeter


@dataclass(frozen=True)
class RankRole:
    """What this rank does in every step: its points and clips, its model, and how the teacher's logits come to it."""

    plan: GroupPlan
    group: Group
    forward: nn.Module
    exchange: TeacherExchange | None  # none where every rank has its own teacher

    @classmethod
    def take(cls, config: Config, model: TimeSformer, plan: GroupPlan) -> RankRole:
        """This rank's seat in a plan; every rank must take its own."""
        synchronise(model, plan)
        forward = sum_gradients(compiled(model) if config.train.compile else model)
        weight = model.head.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        several = len(plan.groups) > 1
        exchange = TeacherExchange(plan, config.model.num_classes, dtype, weight.device) if several else None
        return cls(plan, plan.group(rank()), forward, exchange)

    @property
    def teaches(self) -> bool:
        """Whether this rank trains the costliest point."""
        return self.group is self.plan.groups[0]

    def positions(self, clips: int, *, pairs: bool) -> range:
        """The positions, of a part's clips, that this rank trains."""
        return self.group.positions(rank(), clips, pairs=pairs)


def train(config: Config) -> dict[str, Any]:
    """Trains the model of a config to the end, going on from the run's newest checkpoint if it has one.

    The ranks of a job share the work as `parallel.groups` says; it changes the result by rounding alone. Ctrl-C and
    SIGTERM save at the next step and raise `Stopped`. Raises `RunError` for a loss that is not finite, before
    anything is changed by it, and where another run writes into the folder.
    """
    finished = config.run.dir / "train.json"
    with ExitStack() as owned:
        with ranks(config):
            guard = owned.enter_context(sole_writer(config, "train"))
            plan = make_plan(config, world_size(), {p: float(macs) for p, macs in point_macs(config.model).items()})
            manifest = rank0_then_all(lambda: load_or_index(config))
        with ranks(config, config.parallel.step_s):
            preflight(config, manifest)
            per_epoch = steps_per_epoch(manifest, config)
            checkpoints = train_checkpoints(config.run.dir, config.train.keep_checkpoints, guard)
            state = State.start(config, manifest)
            found = _newest(checkpoints)
            if found is not None:
                state.restore(found)
            elif config.train.init:
                say(str(load_weights(state.model, config.train.init)))
                state.reset_ema()
            ended = state.step == per_epoch * config.train.epochs
            if not (ended and broadcast_result(finished.exists)):
                _train(state, RankRole.take(config, state.model, plan), per_epoch, checkpoints)
            done: dict[str, Any] = broadcast_result(lambda: json.loads(finished.read_text(encoding="utf-8")))
    return done


def _newest(checkpoints: Checkpoints) -> Checkpoint | None:
    """The checkpoint that rank 0 goes on from, on every rank: one that looked for itself might see an older one."""
    found = checkpoints.latest() if rank() == 0 else None
    name = broadcast_result(lambda: None if found is None else found.path.name)
    if name is None or rank() == 0:
        return found
    return load_checkpoint(wait_for_file(checkpoints.folder / name), checkpoints.kind)


def _train(state: State, seat: RankRole, per_epoch: int, checkpoints: Checkpoints) -> None:
    config = state.config
    if world_size() > 1:
        say(f"{world_size()} ranks, by point: {seat.plan}")
    clock = ThroughputMeter(worker_count(config.data.workers), state.device, len(seat.group.ranks))
    if rank() == 0:
        with checkpoints.guard():
            (config.run.dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    with closing(Metrics(config.run.dir, state.step)) if rank() == 0 else nullcontext() as metrics:
        _loop(state, seat, checkpoints, clock, metrics)
    if rank() == 0:
        with checkpoints.guard():
            write_json(config.run.dir / "train.json", _summary(state, per_epoch, checkpoints, clock))


def _loop(
    state: State, seat: RankRole, checkpoints: Checkpoints, clock: ThroughputMeter, metrics: Metrics | None
) -> None:
    config = state.config
    per_epoch = steps_per_epoch(state.manifest, config)
    total = per_epoch * config.train.epochs
    schedule = make_schedule(state.optimizer, config.train, per_epoch)
    steps = _batches(state, seat)
    bar = Bar("train", total=total * config.train.batch, unit="clips", start=state.step * config.train.batch)
    with StopRequest() as stop, bar:
        for batches in clock.timed(_saved_if_reading_fails(steps, state, seat, checkpoints)):
            schedule.step_update(state.step)
            values = train_step(state, seat, batches)
            state.step += 1
            if metrics is not None:
                metrics.write(state.step, values | clock.rates())
            bar.step(config.train.batch, state.note(values, clock))
            stopping = any_requested(stop)  # all at the same step
            due = state.step % (config.train.save_steps or per_epoch) == 0
            if due or stopping or state.step == total:
                for module in filter(None, (state.model, state.ema and state.ema.module)):
                    share_statistics(module, seat.plan)
                _save(state, checkpoints)
            if stopping and state.step < total:
                say(f"stopped at step {state.step} of {total}; the same command goes on from there")
                stop.stop()


def _batches(state: State, seat: RankRole) -> Iterator[list[Batch]]:
    """This rank's share of every step to come."""
    config, device, exchange = state.config, state.device, None
    if config.parallel.decode == "shared" and len(seat.plan.groups) > 1:  # one group decodes no clip twice
        exchange = ClipExchange(state.manifest, config, seat.plan, pin=device.type == "cuda")
    share = partial(seat.positions, pairs=config.data.mixes)
    return train_batches(state.manifest, config, state.step, device=device, positions=share, exchange=exchange)


def _save(state: State, checkpoints: Checkpoints) -> None:
    if rank() == 0:
        checkpoints.save(state.step, *state.saved())


def _saved_if_reading_fails(
    steps: Iterator[list[Batch]], state: State, seat: RankRole, checkpoints: Checkpoints
) -> Iterator[list[Batch]]:
    """The same steps. Where the next one cannot be read, what was trained until then is saved first.

    If this rank knows all of it: the others may be waiting elsewhere, and cannot be asked.
    """
    begun = state.step
    try:
        yield from steps
    except Exception:
        if state.step > begun and not statistics_are_apart(state.model, seat.plan):
            _save(state, checkpoints)
            say(f"saved at step {state.step}; the same command goes on from there")
        raise


def train_step(state: State, seat: RankRole, batches: Sequence[Batch]) -> dict[str, float]:
    """One optimizer step over the parts of a global batch. Returns loss and top-1 of its points, gradient norm, rate.

    The points are drawn by `train.draw`; parameters that none of them uses stay as they are. Each rank backpropagates,
    part by part, the sum of its clips' losses over `train.batch`; the gradients of all ranks add up, so that neither
    accumulation nor the plan changes the step (ReViT, section 3.4).
    """
    config, model = state.config, state.model
    # Drop path draws from torch's stream, which so needs no saving; it depends on the plan, and nothing else does.
    torch.manual_seed(seed_of("step", config.run.seed, state.step, rank()))
    model.train()
    model.activation_checkpointing = config.train.activation_checkpointing
    state.optimizer.zero_grad(set_to_none=True)
    drawn = drawn_points(config, state.step)
    tallies = {point: Tally() for point in drawn}
    for part, batch in enumerate(batches):
        _backpropagate(batch, part, seat, state, tallies)
    # Of all groups that read the same videos, the teacher's counts.
    failures = [failure for batch in batches for failure in batch.failures] if seat.teaches else []
    values = _gathered(state, tallies, len(failures))
    limit = config.train.clip_grad or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    if not torch.isfinite(norm):
        raise RunError(
            f"step {state.step}: the gradient is not finite though the losses are; nothing was changed by this step. "
            "Lower train.lr, or set run.precision=fp32"
        )
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update(model)
    state.list_skipped(failures)
    return values | {"grad_norm": float(norm), "lr": state.optimizer.param_groups[0]["lr"]}


def _gathered(state: State, tallies: dict[str, Tally], failures: int) -> dict[str, float]:
    """Loss and top-1 of each point over all ranks. Raises `RunError` on every rank if a loss of one is not finite."""
    sums = all_reduce_sum(
        torch.stack([*(tally.sums() for tally in tallies.values()), torch.tensor([0.0, 0.0, failures])])
    )
    for point, tally in tallies.items():
        tally.require_finite(point, state.step)
    if not torch.isfinite(sums).all():
        raise RunError(f"step {state.step}: the loss of another rank is not finite; its message names the clips")
    state.skipped += int(sums[-1, 2])
    loss, right, clips = sums[:-1].T.tolist()
    values = {f"loss/{p}": value / max(n, 1) for p, value, n in zip(tallies, loss, clips, strict=True)}
    return values | {f"top1/{p}": value / max(n, 1) for p, value, n in zip(tallies, right, clips, strict=True)}


def _backpropagate(batch: Batch, part: int, seat: RankRole, state: State, tallies: dict[str, Tally]) -> None:
    """Adds the gradients of a part's clips at those of this rank's points that are drawn."""
    config, costliest = state.config, state.config.model.points[0]
    if not len(batch.labels) and world_size() == 1:
        return
    points = tuple(point for point in seat.group.points if point in tallies)
    if not points:  # none of this rank's is drawn: it adds zeros, of the costliest point, which always is
        points, batch = (costliest,), batch.without_clips()
    clips, truth, weights = _prepared(batch, state)
    lesson = None if seat.exchange is None else TeacherLogits.begin(seat.exchange, batch, part, seat, config)
    known: dict[str, Tensor] = {}  # logits, by point
    for point in points:  # costliest first, and each length before its keeps: they teach
        final = part == config.train.accumulate - 1 and point == points[-1]
        wanted = make_targets(
            Point.parse(point), truth, batch, config, seed=seed_of("mix", config.run.seed, state.step)
        )
        with nullcontext() if final else no_gradient_sync(seat.forward):
            heads = _heads(clips, point, wanted, seat, state)
            learned = heads.logits().detach()
            if lesson is not None and not known:
                if seat.teaches:
                    lesson.give(learned)
                else:
                    teacher = lesson.take(len(clips))
                    weights = weights * teacher.isfinite().all(-1)  # what its teacher could not read teaches nothing
                    known[costliest] = teacher.nan_to_num()
            taught_by = known.get(teacher_of(point, costliest) or "")
            dropped = Point.parse(point).keep < 1
            loss = losses.point_loss(heads, wanted.cls, taught_by, config.loss, dropped=dropped, dense=wanted.dense)
            ((loss * weights).sum() / config.train.batch).backward()
        here = slice(len(batch.labels))
        tallies[point].add(loss.detach()[here], learned.argmax(-1)[here] == batch.labels, batch.videos)
        known[point] = learned


def _heads(clips: Tensor, point: str, wanted: Targets, seat: RankRole, state: State) -> Heads:
    bf16 = state.config.run.precision == "bf16"
    with torch.autocast(state.device.type, precision_dtype("bf16"), enabled=bf16):
        heads: Heads = seat.forward(clips, point, heads=True, swap=wanted.swap)
    return heads


@dataclass(frozen=True)
class TeacherLogits:
    """How the costliest point's logits on a part's clips come to the ranks that do not train it.

    `shares` are the positions in the part that each teaching rank has, `places` those of this rank's clips.
    """

    exchange: TeacherExchange
    shares: Sequence[range]
    places: Tensor

    @classmethod
    def begin(cls, exchange: TeacherExchange, batch: Batch, part: int, seat: RankRole, config: Config) -> TeacherLogits:
        """The logits travel while the ranks that wait for them run their first forward pass."""
        clips, teachers = config.train.batch // config.train.accumulate, seat.plan.groups[0]
        shares = [teachers.positions(number, clips, pairs=config.data.mixes) for number in teachers.ranks]
        if not seat.teaches:
            exchange.start(shares)
        return cls(exchange, shares, torch.tensor(batch.positions, dtype=torch.int64) - part * clips)

    def give(self, logits: Tensor) -> None:
        """Sends this rank's logits, and NaN for clips that it could not read; an empty clip has no place."""
        share = self.shares[rank()]
        own = logits.new_full((len(share), logits.shape[1]), float("nan"))
        own[self.places - share.start] = logits[: len(self.places)]
        self.exchange.start(self.shares, own)

    def take(self, clips: int) -> Tensor:
        """The teacher's logits on this rank's clips, NaN for those that it could not read, and for an empty one."""
        told = self.exchange.logits()
        found = told.new_full((clips, told.shape[1]), float("nan"))
        found[: len(self.places)] = told[self.places.to(told.device)]
        return found


def _prepared(batch: Batch, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Clips, their labels as targets, and weights of a batch; of one without clips, an empty clip without weight.

    Other ranks wait for this one's gradients, whatever happened to its videos.
    """
    data, model, dtype = state.config.data, state.config.model, state.model.head.weight.dtype
    if not len(batch.labels):
        empty = torch.zeros((1, 3, model.num_frames, model.size, model.size), dtype=dtype, device=state.device)
        return empty, torch.zeros((1, model.num_classes), device=state.device), empty.new_zeros(1)
    clips, targets = mix(
        normalise(batch.clips, model.mean, model.std, dtype),
        batch.labels,
        batch.positions,
        num_classes=model.num_classes,
        mixup=data.mixup,
        cutmix=data.cutmix,
        smoothing=state.config.loss.label_smoothing,
        seed=seed_of("mix", state.config.run.seed, state.step),
    )
    return clips, targets, torch.ones(len(batch.labels), device=state.device)


def _summary(state: State, per_epoch: int, checkpoints: Checkpoints, clock: ThroughputMeter) -> dict[str, Any]:
    config = state.config
    lines = pd.read_json(config.run.dir / "metrics.jsonl", lines=True).tail(per_epoch).mean()
    newest = checkpoints.latest()
    return {
        "steps": state.step,
        "epochs": config.train.epochs,
        "clips": len(state.manifest.split("train").readable),
        "skipped": state.skipped,
        "manifest": state.manifest.hash,
        "checkpoint": str(newest.path) if newest else None,
        "seconds": round(time.monotonic() - clock.start, 1),
        **{key: round(value, 4) for key, value in clock.rates().items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "points": {
            point: {name: _rounded(lines.get(f"{name}/{point}")) for name in ("loss", "top1")}
            for point in config.model.points
        },
    }


def _rounded(value: float | None) -> float | None:
    """None for a point that was not drawn in the last epoch."""
    return None if value is None or math.isnan(value) else round(value, 4)
