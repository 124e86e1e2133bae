"""`parallel.overlap`: which backward pass comes last in a step. It is chosen once, before the first step.

Ranks sum gradients during the last backward pass of a step. That at the costliest point hides more of the sums than
that at the cheapest point. The forward pass at the costliest point comes first in any case, since its logits teach the
other points; so its activations are kept until the other points are done. Computing them again would need less memory,
but a second forward pass takes a fifth of a step at {14, 10, 7}, where the order saves three tenths at most.
"""

from __future__ import annotations

from dataclasses import replace

from videoadapt.runtime.console import advise
from videoadapt.runtime.ranks import all_gather, rank
from videoadapt.training.ddp import forget_backward_passes, no_gradient_sync
from videoadapt.training.forecast import Forecast, LinearTime, Network, Passes, StepWork, best_order, forecast
from videoadapt.training.freeze import set_training_mode
from videoadapt.training.pass_time import PassTime, time_pass
from videoadapt.training.state import State
from videoadapt.training.step import RankRole

_ROUNDS = 3  # the first one compiles and fills caches


def with_best_order(role: RankRole, state: State, bytes_per_s: float | None) -> RankRole:
    """Returns the role with the order of `parallel.overlap`. All ranks must call it together.

    The order stays as it is on CPUs, whose cores both compute and send, and with `run.deterministic`, since a
    measurement may end differently in a continued run, and the order changes the rounding of gradients.

    Args:
        role: The role of this rank.
        state: The state before the first step; unchanged.
        bytes_per_s: What `preflight` has measured.
    """
    config = state.config
    has_choice = any(len(group.points) > 1 for group in role.plan.groups)
    if config.parallel.overlap == "off" or bytes_per_s is None or not has_choice:
        return role
    if state.device.type == "cpu" or config.run.deterministic:
        return role
    usual, best = measured_orders(role, state, bytes_per_s)
    if rank() == 0:
        order = "costliest" if best.costliest_last else "cheapest"
        advise(
            f"parallel.overlap: the backward pass at the {order} point comes last; by its parts, a step takes "
            f"{1000 * best.step_s:.1f} ms, and {1000 * usual.step_s:.1f} ms with that at the cheapest point last"
        )
    return replace(role, costliest_last=best.costliest_last)


def measured_orders(role: RankRole, state: State, bytes_per_s: float) -> tuple[Forecast, Forecast]:
    """Times the passes of all ranks, and leaves no trace in the model.

    Returns:
        The forecasts with the cheapest point last, and with the better order.
    """
    merged: dict[str, PassTime] = {}
    by_rank = all_gather(pass_times(role, state))
    forget_backward_passes(role.module)
    state.optimizer.zero_grad(set_to_none=True)
    for times in by_rank:
        for point, one in times.items():
            known = merged.get(point, one)
            # The slowest rank of a group decides.
            merged[point] = PassTime(max(one.forward_s, known.forward_s), max(one.backward_s, known.backward_s))
    passes = {
        point: Passes(LinearTime(merged[point].forward_s, 0.0), LinearTime(merged[point].backward_s, 0.0))
        for point in state.config.model.points
    }  # of a rank's clips, and so without a time per clip
    parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    work = StepWork.of(state.config, passes, 0.0, parameters)
    network = Network(bytes_per_s, overlaps=True)
    return forecast(role.plan, work, network), best_order(role.plan, work, network)


def pass_times(role: RankRole, state: State) -> dict[str, PassTime]:
    """Times the passes of this rank's points with its clips of a micro-batch. Leaves gradients."""
    config, model = state.config, state.model
    set_training_mode(model, config.train.freeze)
    model.activation_checkpointing = config.train.activation_checkpointing
    clips = len(role.positions(config.train.micro_batch, pairs=config.data.mixes))
    statistics = [buffer.clone() for buffer in model.patch_embed.buffers()]  # of BatchNorms
    rounds = []
    with no_gradient_sync(role.module):
        for _ in range(_ROUNDS):
            rounds.append({point: time_pass(role.forward, point, clips, config) for point in role.group.points})
    for buffer, before in zip(model.patch_embed.buffers(), statistics, strict=True):
        buffer.copy_(before)
    return {
        point: PassTime(min(r[point].forward_s for r in rounds[1:]), min(r[point].backward_s for r in rounds[1:]))
        for point in role.group.points
    }
