"""One optimizer step: forward and backward passes at the drawn points, sums over ranks, update of the parameters.

In each step the costliest point learns from the labels, and its detached logits teach the other lengths on the same
clips; each length, with all its tokens, teaches the points that drop tokens. The gradients of all points add up, and
the optimizer moves once (ReViT, section 3.4; SuperViT).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.data.clips.augment import mix
from videoadapt.data.clips.loader import Batch
from videoadapt.data.clips.views import normalise
from videoadapt.model.timesformer import Heads, TimeSformer
from videoadapt.runtime.machine import autocast
from videoadapt.runtime.ranks import all_reduce_sum, rank, stop_flags, world_size
from videoadapt.runtime.seeds import seed_of
from videoadapt.runtime.signals import StopRequest
from videoadapt.training.compile import Compiled
from videoadapt.training.ddp import (
    frames_uncounted,
    no_gradient_sync,
    sum_gradients,
    sum_in_backward,
    synchronise_batch_norms,
)
from videoadapt.training.draws import drawn_points, teacher_of
from videoadapt.training.exchange import TeacherLogits
from videoadapt.training.freeze import set_training_mode
from videoadapt.training.groups import Group, GroupPlan
from videoadapt.training.losses import Targets, make_targets, pad_rows, point_loss
from videoadapt.training.state import State, Tally
from videoadapt.training.step_report import StepReport
from videoadapt.training.utilisation import PointClock


@dataclass(frozen=True)
class RankRole:
    """The part of this rank in every step.

    Attributes:
        plan: The groups of all ranks.
        group: The group of this rank.
        module: The model; its backward pass sums gradients over all ranks.
        forward: The same, compiled with `train.compile: on`.
        teacher_logits: Sends or receives the logits of the costliest point. None if the plan has one group, since then
            every rank computes these logits for its own clips.
        clocks: The times of passes, by point of the group.
        costliest_last: Whether the backward pass at the costliest point of the group comes last in a step
            (`parallel.overlap`).
    """

    plan: GroupPlan
    group: Group
    module: nn.Module
    forward: Callable[..., Any]
    teacher_logits: TeacherLogits | None
    clocks: Mapping[str, PointClock]
    costliest_last: bool = False

    @classmethod
    def from_plan(cls, config: Config, model: TimeSformer, plan: GroupPlan) -> RankRole:
        """Returns the role of this rank, and prepares the model for it. All ranks must call it together.

        Args:
            config: Gives the sizes of the logits, and whether the model is compiled.
            model: The model of this rank, on its device; its BatchNorms may be replaced.
            plan: The groups of all ranks.

        Raises:
            ConfigError: The plan has several groups, but the model has one stem for all lengths.
        """
        synchronise_batch_norms(model, plan, config.parallel.step_s)
        module = sum_gradients(model, torch.bfloat16 if config.parallel.sums == "bf16" else None)
        forward = Compiled(module, model) if config.train.compiles else module
        weight = model.head.weight
        # Under bf16 autocast logits are bf16; the mean of two heads and the loss are computed in float32.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        has_students_elsewhere = len(plan.groups) > 1
        teacher_logits = TeacherLogits(config, plan, dtype, weight.device) if has_students_elsewhere else None
        group = plan.group(rank())
        clocks = {point: PointClock(weight.device) for point in group.points}
        return cls(plan, group, module, forward, teacher_logits, clocks)

    @property
    def teaches(self) -> bool:
        """Whether this rank trains the costliest point."""
        return self.group is self.plan.groups[0]

    def timed(self, point: str, clips: int = 0) -> AbstractContextManager[None]:
        """Returns a context that times a part of the passes at a point; see `PointClock.timed`."""
        # A group without a drawn point passes an empty clip through the costliest point, which may not be its own.
        return self.clocks[point].timed(clips) if point in self.clocks else nullcontext()

    def positions(self, clips: int, *, pairs: bool) -> range:
        """Returns the positions, in a micro-batch of `clips` clips, that this rank trains; see `split_evenly`."""
        return self.group.positions(rank(), clips, pairs=pairs)


def train_step(
    state: State, role: RankRole, micro_batches: Sequence[Batch], stop: StopRequest | None = None
) -> StepReport:
    """Trains one global batch and moves the parameters once. On a GPU it only queues the work.

    The points are drawn by `train.draw`. Parameters that no drawn point uses do not move. Each rank backpropagates the
    sum of its clips' losses divided by `train.batch`, and gradients are summed over micro-batches and ranks. The result
    is the same for every `train.accumulate` and every plan, up to rounding (ReViT, section 3.4).

    Args:
        state: The model, the optimizer and the counters; changed in place. `state.step` stays as it is.
        role: The role of this rank.
        micro_batches: The clips of this rank, in `train.accumulate` micro-batches.
        stop: The signal that this rank has received travels to the others with the report. None: no signal.

    Returns:
        The report, whose numbers may be on their way. If a loss or the gradient is not finite, reading it raises
        `RunError`, and the step has changed nothing. Nor has a step of which no clip could be read.
    """
    config, model = state.config, state.model
    # Drop path uses torch's global random generator. A seed for each step makes resuming exact without saving the
    # generator's state. The seed depends on the rank, since ranks have different clips, so drop path depends on the
    # plan. Nothing else depends on the plan.
    torch.manual_seed(seed_of("step", config.run.seed, state.step, rank()))
    set_training_mode(model, config.train.freeze)
    model.activation_checkpointing = config.train.activation_checkpointing
    state.optimizer.zero_grad(set_to_none=True)  # not to zero: a parameter with a zero gradient would still decay
    # Of BatchNorms; a forward pass moves them.
    statistics = [buffer.clone() for buffer in model.patch_embed.buffers()]
    tallies = {point: Tally() for point in drawn_points(config, state.step)}
    for number, batch in enumerate(micro_batches):
        _backpropagate(batch, number, role, state, tallies)
    # All groups read the same videos, so failures are counted in the teacher's group only.
    failures = [failure for batch in micro_batches for failure in batch.failures] if role.teaches else []
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_grad or float("inf")).to(state.device)
    sums = _sums_over_ranks(tallies, [len(failures), *stop_flags(stop or StopRequest())], norm)
    # 1 or 0, on the device: the host does not wait for it. Without a clip (`sums[2]`), momentum would move parameters.
    is_bad = (~sums.isfinite().all() | (sums[2] == 0)).float()
    _move_parameters(state, statistics, is_bad)
    on_host = sums.to("cpu", non_blocking=True)  # pinned
    arrived = torch.cuda.current_stream(sums.device).record_event() if sums.is_cuda else None
    lr = max(group["lr"] for group in state.optimizer.param_groups)
    return StepReport(state.step, tallies, on_host, arrived, lr, failures)


class _Inputs(NamedTuple):
    """A micro-batch on the device, ready for the model: the clips that were read, then empty clips without weight."""

    clips: Tensor  # (B, C, T, S, S) normalised
    labels: Tensor  # (B, classes) soft labels
    weights: Tensor  # (B,) 1, or 0 for a clip whose loss does not count
    positions: Tensor  # (clips that were read,) int64, their positions in the micro-batch of all ranks; on the host

    def padded(self, least: int) -> _Inputs:
        """Returns at least this many clips. The added ones have no weight; nothing else looks at them."""
        missing = max(least - len(self.clips), 0)
        clips, labels, weights = (pad_rows(rows, missing) for rows in (self.clips, self.labels, self.weights))
        return _Inputs(clips, labels, weights, self.positions)


def _backpropagate(batch: Batch, number: int, role: RankRole, state: State, tallies: dict[str, Tally]) -> None:
    """Adds the gradients of one micro-batch at the drawn points of this rank; `number` counts micro-batches."""
    if not len(batch.labels) and world_size() == 1:
        return  # on several ranks, the others wait for this rank's gradients even if all its videos failed
    config = state.config
    costliest = config.model.points[0]
    points = points_here(role.group, tallies)
    if not points:  # still takes part in all collectives; the costliest point is drawn in every step
        points, batch = (costliest,), batch.without_clips()
    inputs = _prepare(batch, number, state)
    if len(batch.labels):
        inputs = inputs.padded(planned_clips(role, config))
    if role.teacher_logits is not None and not role.teaches:
        role.teacher_logits.start()  # the logits arrive during the forward pass
    logits: dict[str, Tensor] = {}  # detached logits by point; later points use them as teachers
    weights = inputs.weights
    # The gradients are summed over ranks in the last backward pass of the step. Earlier sums would repeat the work.
    summing = points[0 if role.costliest_last else -1] if number == config.train.accumulate - 1 else None
    last: Tensor | None = None
    for point in points:  # costliest first, and each length before its keeps: a teacher comes before its students
        clips = len(inputs.clips)
        with no_gradient_sync(role.module):
            with role.timed(point):
                targets = _targets_at(point, inputs, batch, state)
                heads = _forward_at(point, inputs, targets, role, state)
                own = heads.logits().detach()  # (B, classes)
            if point == points[0]:
                received = teacher_logits(role, own, inputs.positions)
                if received is not None:
                    # The received logits are NaN for a clip that the teacher could not read. Its loss gets weight 0.
                    weights = weights * received.isfinite().all(-1)
                    logits[costliest] = received.nan_to_num()
            with role.timed(point, 0 if point == summing else clips):
                loss = loss_at(point, heads, targets, logits, config, class_weights=state.class_weights)  # (B,)
                total = (loss * weights).sum() / config.train.batch
                if point == summing:
                    last = total  # keeps the activations of this point until the others are done
                else:
                    total.backward()
        logits[point] = own
        read = slice(len(batch.labels))  # leaves out the empty clip
        tallies[point].add(loss.detach()[read], own.argmax(-1)[read] == batch.labels, batch.videos)
    if summing is not None and last is not None:
        sum_in_backward(role.module, last)
        with role.timed(summing, len(inputs.clips)):
            last.backward()


def planned_clips(role: RankRole, config: Config) -> int:
    """Returns the clips that a micro-batch of this rank has if no video fails; 0 if a smaller one stays as it is.

    `torch.compile` compiles each point again for another number of clips. A BatchNorm would count empty clips in its
    statistics; other layers treat each clip by itself.
    """
    if config.model.embed == "stem":
        return 0
    return len(role.positions(config.train.micro_batch, pairs=config.data.mixes))


def points_here(group: Group, drawn: Collection[str]) -> tuple[str, ...]:
    """Returns the points of a group that are drawn in this step, costliest first."""
    return tuple(point for point in group.points if point in drawn)


def teacher_logits(role: RankRole, own: Tensor, positions: Tensor) -> Tensor | None:
    """Sends or receives the logits of the costliest point, once per micro-batch.

    Args:
        role: The role of this rank.
        own: This rank's logits at its first point, (B, classes); sent if it is the costliest point.
        positions: The positions of this rank's clips in the micro-batch.

    Returns:
        The teacher's logits on this rank's clips, (B, classes), NaN where the teacher could not read a clip. None if
        this rank computes the costliest point itself.
    """
    if role.teacher_logits is None:
        return None
    if role.teaches:
        role.teacher_logits.send(own, positions)
        return None
    return role.teacher_logits.receive(positions, len(own))


def loss_at(
    point: str,
    heads: Heads,
    targets: Targets,
    logits: dict[str, Tensor],
    config: Config,
    *,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Returns the loss of each clip at a point, (B,).

    Args:
        point: The point.
        heads: The outputs of the model at the point.
        targets: The targets at the point.
        logits: Detached logits (B, classes) of the earlier points, by point; the teacher is among them.
        config: Gives the costliest point and the `loss` section.
        class_weights: See `point_loss`.
    """
    teacher = logits.get(teacher_of(point, config.model.points[0]) or "")  # None for the costliest point
    dropped = Point.parse(point).keep < 1
    return point_loss(
        heads, targets.cls, teacher, config.loss, dropped=dropped, dense=targets.dense, class_weights=class_weights
    )


def _targets_at(point: str, inputs: _Inputs, batch: Batch, state: State) -> Targets:
    seed = seed_of("mix", state.config.run.seed, state.step)
    read = max(len(batch.labels), 1)
    targets = make_targets(Point.parse(point), inputs.labels[:read], batch, state.config, seed=seed)
    return targets.padded(len(inputs.labels) - read)


def _forward_at(point: str, inputs: _Inputs, targets: Targets, role: RankRole, state: State) -> Heads:
    # The loss is outside: under autocast its softmax would be computed from bf16.
    with autocast(state.device, state.config.run.precision):
        if len(inputs.positions):
            heads: Heads = role.forward(inputs.clips, point, heads=True, swap=targets.swap)
        else:  # not compiled: torch would keep the graph of other hooks
            with frames_uncounted(state.model):
                heads = role.module(inputs.clips, point, heads=True, swap=targets.swap)
    return heads


def _prepare(batch: Batch, number: int, state: State) -> _Inputs:
    """Normalises and mixes the clips of a micro-batch. A batch without clips becomes one empty clip without weight."""
    config, device, dtype = state.config, state.device, state.model.head.weight.dtype
    model, data = config.model, config.data
    first = number * config.train.micro_batch  # position of the micro-batch in the step
    positions = torch.tensor(batch.positions, dtype=torch.int64) - first
    if not len(batch.labels):
        # The backward pass of an empty clip adds zeros, so that the other ranks get this rank's part of each sum.
        clips = torch.zeros((1, 3, model.num_frames, model.size, model.size), dtype=dtype, device=device)
        return _Inputs(clips, torch.zeros((1, model.num_classes), device=device), clips.new_zeros(1), positions)
    clips, labels = mix(
        normalise(batch.clips, state.model.mean, state.model.std, dtype),
        batch.labels,
        batch.positions,
        num_classes=model.num_classes,
        mixup=data.mixup,
        cutmix=data.cutmix,
        smoothing=config.loss.label_smoothing,
        seed=seed_of("mix", config.run.seed, state.step),
    )
    return _Inputs(clips, labels, torch.ones(len(batch.labels), device=device), positions)


def _sums_over_ranks(tallies: dict[str, Tally], counts: Sequence[float], norm: Tensor) -> Tensor:
    """Returns the sums of `StepReport`, on the device of `norm`.

    The sum over ranks comes before the parameters move, so that all ranks see that a loss is not finite.

    Args:
        tallies: The losses of this rank's clips, by drawn point.
        counts: Further numbers that are summed over ranks.
        norm: The norm of the gradient, the same on all ranks, ().
    """
    rows = [
        tally.sums() if tally.loss else norm.new_zeros(3, dtype=torch.float64) for tally in tallies.values()
    ]  # each (3,): loss, right clips, clips; zeros at a point that this rank does not train
    found = torch.cat([*rows, torch.tensor(counts, dtype=torch.float64).to(norm.device, non_blocking=True)])
    return torch.cat([all_reduce_sum(found), norm.double().view(1)])


def _move_parameters(state: State, statistics: Sequence[Tensor], is_bad: Tensor) -> None:
    """Moves the parameters and their moving average. If the step is bad, nothing moves.

    Args:
        state: Changed in place.
        statistics: The statistics of BatchNorms before the step.
        is_bad: 1 if a loss or the gradient is not finite, or no clip was read, else 0, ().
    """
    # torch's fused optimizers skip a step by this attribute, on the device. `torch.amp.GradScaler` sets it, too.
    state.optimizer.found_inf = is_bad  # type: ignore[attr-defined]
    state.optimizer.step()
    for buffer, before in zip(state.model.patch_embed.buffers(), statistics, strict=True):
        buffer.copy_(torch.where(is_bad > 0, before, buffer))
    if state.ema is not None:
        update_average(state.ema, state.model, is_bad)


@torch.no_grad()
def update_average(ema: ModelEmaV3, model: nn.Module, is_bad: Tensor) -> None:
    """Moves an average of weights and buffers towards a model, as timm's `update`; stays if `is_bad` is 1."""
    pairs = list(zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    averages, values = [average for average, _ in floats], [value for _, value in floats]
    steps = torch._foreach_sub(values, averages)
    torch._foreach_mul_(steps, (1.0 - ema.decay) * (1.0 - is_bad))
    torch._foreach_add_(averages, steps)
    for average, value in pairs:
        if not average.is_floating_point():  # the number of batches of a BatchNorm, which `is_bad` has kept
            average.copy_(value)
