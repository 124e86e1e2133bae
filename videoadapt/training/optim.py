"""Optimizers of torch and schedules of timm. Weight decay as in DeiT (matrices only) or as in TimeSformer's code."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import nn

from videoadapt.config.sections import TrainConfig

# Prefixes of the names of parameters with several dimensions that are not matrices: tokens, position embeddings
# and the scales of residual branches.
NO_DECAY = ("cls_token", "dist_token", "pos_embed", "time_embed", "scale")


def decays(name: str, parameter: nn.Parameter, scope: Literal["matrices", "all"] = "matrices") -> bool:
    """Returns whether weight decay applies to a parameter.

    Args:
        name: The parameter's name.
        parameter: The parameter.
        scope: `matrices`: matrices and kernels, not norms, biases, tokens and positions (DeiT). `all`: everything whose
            name lacks "bn" (TimeSformer's code); in our models only the BatchNorms of stems have such names.
    """
    if scope == "all":
        return "bn" not in name
    # One dimension: biases and the affine of norms.
    return parameter.ndim > 1 and not any(part.startswith(NO_DECAY) for part in name.split("."))


def layer_of(name: str, depth: int) -> int:
    """Returns the layer of a parameter for `train.layer_decay`, as timm counts them.

    0: embeddings and tokens; 1 to `depth`: the blocks, the last one with the final norm; `depth` + 1: the heads.
    """
    first, _, rest = name.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0]) + 1
    if first == "norm":
        return depth
    return depth + 1 if first in ("head", "head_dist", "aux_head") else 0


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.Optimizer:
    """Returns AdamW or SGD with two parameter groups: with weight decay, and without.

    With `train.layer_decay`, each layer has these two groups, with the factor of its rate as `lr_scale`, a key that
    timm's schedules read. Frozen parameters are in no group. The optimizers are torch's fused ones: one kernel moves
    all parameters, and leaves all as they are if the attribute `found_inf`, a tensor, is 1.

    Args:
        named: The parameters with their names, as `module.named_parameters()` gives them.
        config: Gives the optimizer, its rate, betas or momentum, the decay, and the factor of each layer.
    """
    named = list(named)  # iterated twice
    depth = len({name.split(".")[1] for name, _ in named if name.startswith("blocks.")})
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for layer in range(depth + 2) if config.layer_decay < 1.0 else [depth + 1]:
        scale = config.layer_decay ** (depth + 1 - layer)
        groups[layer, True] = {"params": [], "weight_decay": config.weight_decay, "lr_scale": scale}
        groups[layer, False] = {"params": [], "weight_decay": 0.0, "lr_scale": scale}
    for name, parameter in named:
        layer = layer_of(name, depth) if config.layer_decay < 1.0 else depth + 1
        if parameter.requires_grad:
            groups[layer, decays(name, parameter, config.decay)]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(filled, lr=config.lr, betas=config.betas, fused=True)
    sgd = torch.optim.SGD(filled, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if config.momentum:
        # Zeros give the same first step as no momentum. The fused kernel fails where some parameters have momentum and
        # others, of lengths that are drawn for the first time, have none (torch 2.12).
        for group in filled:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> CosineLRScheduler | MultiStepLRScheduler:
    """Returns the schedule of the learning rate; `schedule.step_update(step)` sets the rate of a step.

    The rate depends on the step only, so that checkpoints need no state of the schedule. It rises linearly over
    `warmup_epochs` and then follows a cosine, or falls by `gamma` at each milestone.

    Args:
        optimizer: Its rates are set.
        config: Gives the schedule; epochs may be fractions.
        steps_per_epoch: Optimizer steps of an epoch.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    first_rate = config.lr / (warmup + 1)  # not 0: the first step would be wasted
    if config.schedule == "step":
        # + 1: timm applies a milestone one step early (its issue 2745).
        milestones = [math.ceil(m * steps_per_epoch) + 1 for m in sorted(config.milestones)]
        # warmup_prefix=False: milestones count from the first step, not from the end of the warm-up.
        return MultiStepLRScheduler(
            optimizer, milestones, config.gamma, warmup, first_rate, warmup_prefix=False, t_in_epochs=False
        )
    total = config.epochs * steps_per_epoch
    return CosineLRScheduler(
        optimizer, total, config.min_lr, warmup_t=warmup, warmup_lr_init=first_rate, t_in_epochs=False
    )
