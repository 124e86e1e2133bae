"""One optimizer step: forward and backward passes at the drawn points, sums over ranks, update of the parameters.

In each step the costliest point learns from the labels, and its detached logits teach the other lengths on the same
clips; each length, with all its tokens, teaches the points that drop tokens. The gradients of all points add up, and
the optimizer moves once (ReViT, section 3.4; SuperViT).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from videoadapt.config.load import Config
from videoadapt.config.points import Point
from videoadapt.data.clips.augment import mix
from videoadapt.data.clips.loader import Batch
from videoadapt.data.clips.views import normalise
from videoadapt.errors import RunError
from videoadapt.model.timesformer import Heads, TimeSformer, compiled
from videoadapt.runtime.machine import precision_dtype
from videoadapt.runtime.ranks import all_reduce_sum, rank, world_size
from videoadapt.runtime.seeds import seed_of
from videoadapt.training.ddp import no_gradient_sync, sum_gradients, synchronise_batch_norms
from videoadapt.training.draws import drawn_points, teacher_of
from videoadapt.training.exchange import TeacherLogits
from videoadapt.training.freeze import set_training_mode
from videoadapt.training.groups import Group, GroupPlan
from videoadapt.training.losses import Targets, make_targets, point_loss
from videoadapt.training.state import State, Tally


@dataclass(frozen=True)
class RankRole:
    """The part of this rank in every step.

    Attributes:
        plan: The groups of all ranks.
        group: The group of this rank.
        forward: The model; its backward pass sums gradients over all ranks.
        teacher_logits: Sends or receives the logits of the costliest point. None if the plan has one group, since then
            every rank computes these logits for its own clips.
    """

    plan: GroupPlan
    group: Group
    forward: nn.Module
    teacher_logits: TeacherLogits | None

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
        forward = sum_gradients(compiled(model) if config.train.compile else model)
        weight = model.head.weight
        # Under bf16 autocast logits are bf16; the mean of two heads and the loss are computed in float32.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        has_students_elsewhere = len(plan.groups) > 1
        teacher_logits = TeacherLogits(config, plan, dtype, weight.device) if has_students_elsewhere else None
        return cls(plan, plan.group(rank()), forward, teacher_logits)

    @property
    def teaches(self) -> bool:
        """Whether this rank trains the costliest point."""
        return self.group is self.plan.groups[0]

    def positions(self, clips: int, *, pairs: bool) -> range:
        """Returns the positions, in a micro-batch of `clips` clips, that this rank trains; see `split_evenly`."""
        return self.group.positions(rank(), clips, pairs=pairs)


def train_step(state: State, role: RankRole, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """Trains one global batch and moves the parameters once.

    The points are drawn by `train.draw`. Parameters that no drawn point uses do not move. Each rank backpropagates the
    sum of its clips' losses divided by `train.batch`, and gradients are summed over micro-batches and ranks. The result
    is the same for every `train.accumulate` and every plan, up to rounding (ReViT, section 3.4).

    Args:
        state: The model, the optimizer and the counters; changed in place. `state.step` stays as it is.
        role: The role of this rank.
        micro_batches: The clips of this rank, in `train.accumulate` micro-batches.

    Returns:
        `loss/POINT` and `top1/POINT` of each drawn point, means over the clips of all ranks; `grad_norm`; `lr`.

    Raises:
        RunError: A loss or the gradient is not finite. Nothing is changed.
    """
    config, model = state.config, state.model
    # Drop path uses torch's global random generator. A seed for each step makes resuming exact without saving the
    # generator's state. The seed depends on the rank, since ranks have different clips, so drop path depends on the
    # plan. Nothing else depends on the plan.
    torch.manual_seed(seed_of("step", config.run.seed, state.step, rank()))
    set_training_mode(model, config.train.freeze)
    model.activation_checkpointing = config.train.activation_checkpointing
    state.optimizer.zero_grad(set_to_none=True)  # not to zero: a parameter with a zero gradient would still decay
    tallies = {point: Tally() for point in drawn_points(config, state.step)}
    for number, batch in enumerate(micro_batches):
        _backpropagate(batch, number, role, state, tallies)
    # All groups read the same videos, so failures are counted in the teacher's group only.
    failures = [failure for batch in micro_batches for failure in batch.failures] if role.teaches else []
    values = _sums_over_ranks(state, tallies, len(failures))
    grad_norm = _clip_gradients(state)
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update(model)
    state.list_skipped(failures)
    return values | {"grad_norm": grad_norm, "lr": max(group["lr"] for group in state.optimizer.param_groups)}


class _Inputs(NamedTuple):
    """A micro-batch on the device, ready for the model. B is 1 for an empty clip without weight."""

    clips: Tensor  # (B, C, T, S, S) normalised
    labels: Tensor  # (B, classes) soft labels
    weights: Tensor  # (B,) 1, or 0 for a clip whose loss does not count
    positions: Tensor  # (clips that were read,) int64, their positions in the micro-batch of all ranks; on the host


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
    if role.teacher_logits is not None and not role.teaches:
        role.teacher_logits.start()  # the logits arrive during the forward pass
    logits: dict[str, Tensor] = {}  # detached logits by point; later points use them as teachers
    weights = inputs.weights
    for point in points:  # costliest first, and each length before its keeps: a teacher comes before its students
        is_last = number == config.train.accumulate - 1 and point == points[-1]
        # DDP sums over ranks in the last backward pass of the step. Earlier sums would repeat the work.
        with nullcontext() if is_last else no_gradient_sync(role.forward):
            targets = _targets_at(point, inputs, batch, state)
            heads = _forward_at(point, inputs, targets, role, state)
            own = heads.logits().detach()  # (B, classes)
            if point == points[0]:
                received = teacher_logits(role, own, inputs.positions)
                if received is not None:
                    # The received logits are NaN for a clip that the teacher could not read. Its loss gets weight 0.
                    weights = weights * received.isfinite().all(-1)
                    logits[costliest] = received.nan_to_num()
            loss = loss_at(point, heads, targets, logits, config, class_weights=state.class_weights)  # (B,)
            ((loss * weights).sum() / config.train.batch).backward()
        logits[point] = own
        read = slice(len(batch.labels))  # leaves out the empty clip
        tallies[point].add(loss.detach()[read], own.argmax(-1)[read] == batch.labels, batch.videos)


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
    return make_targets(Point.parse(point), inputs.labels, batch, state.config, seed=seed)


def _forward_at(point: str, inputs: _Inputs, targets: Targets, role: RankRole, state: State) -> Heads:
    bf16 = state.config.run.precision == "bf16"
    # The loss is outside: under autocast its softmax would be computed from bf16.
    with torch.autocast(state.device.type, precision_dtype("bf16"), enabled=bf16):
        heads: Heads = role.forward(inputs.clips, point, heads=True, swap=targets.swap)
    return heads


def _prepare(batch: Batch, number: int, state: State) -> _Inputs:
    """Normalises and mixes the clips of a micro-batch. A batch without clips becomes one empty clip without weight."""
    config, device, dtype = state.config, state.device, state.model.head.weight.dtype
    model, data = config.model, config.data
    first = number * (config.train.batch // config.train.accumulate)  # position of the micro-batch in the step
    positions = torch.tensor(batch.positions, dtype=torch.int64) - first
    if not len(batch.labels):
        # The backward pass of an empty clip adds zeros, so that the other ranks get this rank's part of each sum.
        clips = torch.zeros((1, 3, model.num_frames, model.size, model.size), dtype=dtype, device=device)
        return _Inputs(clips, torch.zeros((1, model.num_classes), device=device), clips.new_zeros(1), positions)
    clips, labels = mix(
        normalise(batch.clips, model.mean, model.std, dtype),
        batch.labels,
        batch.positions,
        num_classes=model.num_classes,
        mixup=data.mixup,
        cutmix=data.cutmix,
        smoothing=config.loss.label_smoothing,
        seed=seed_of("mix", config.run.seed, state.step),
    )
    return _Inputs(clips, labels, torch.ones(len(batch.labels), device=device), positions)


def _sums_over_ranks(state: State, tallies: dict[str, Tally], failures: int) -> dict[str, float]:
    """Returns loss and top-1 of each point over all ranks, and counts failures. Raises RunError for a bad loss."""
    rows = [tally.sums() for tally in tallies.values()]  # each (3,): loss, correct clips, clips
    sums = all_reduce_sum(torch.stack([*rows, torch.tensor([0.0, 0.0, failures])]))  # (points + 1, 3)
    # After the sum over ranks, so that all ranks see that a loss is not finite and stop at the same step.
    for point, tally in tallies.items():
        tally.require_finite(point, state.step)
    if not torch.isfinite(sums).all():
        raise RunError(f"step {state.step}: the loss of another rank is not finite; its message names the clips")
    state.skipped += int(sums[-1, 2])
    loss, correct, clips = sums[:-1].T.tolist()
    # max(n, 1): all clips of a point may have failed.
    values = {f"loss/{p}": value / max(n, 1) for p, value, n in zip(tallies, loss, clips, strict=True)}
    return values | {f"top1/{p}": value / max(n, 1) for p, value, n in zip(tallies, correct, clips, strict=True)}


def _clip_gradients(state: State) -> float:
    """Clips the norm of all gradients to `train.clip_grad` and returns it. Raises RunError if it is not finite."""
    limit = state.config.train.clip_grad or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit)
    if not torch.isfinite(norm):
        raise RunError(
            f"step {state.step}: the gradient is not finite, although the losses are; nothing was changed by this "
            "step. Lower train.lr, or set run.precision=fp32"
        )
    return float(norm)
