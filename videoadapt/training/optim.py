"""Optimizer and schedule: torch's and timm's, with TimeSformer's and DeiT's choice of what does not decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import nn

from videoadapt.config.sections import TrainConfig

NO_DECAY = ("cls_token", "dist_token", "pos_embed", "time_embed", "scale")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay moves a parameter: matrices and kernels do, norms, biases, tokens and positions do not."""
    return parameter.ndim > 1 and not any(part.startswith(NO_DECAY) for part in name.split("."))


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over named parameters, in two groups: with and without weight decay."""
    named = list(named)
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> CosineLRScheduler | MultiStepLRScheduler:
    """The learning rate as a function of the step alone: `schedule.step_update(step)`, nothing to save."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    start = config.lr / (warmup + 1)
    if config.schedule == "step":
        # timm applies a milestone one step early (its issue 2745)
        milestones = [math.ceil(m * steps_per_epoch) + 1 for m in sorted(config.milestones)]
        return MultiStepLRScheduler(
            optimizer, milestones, config.gamma, warmup, start, warmup_prefix=False, t_in_epochs=False
        )
    total = config.epochs * steps_per_epoch
    return CosineLRScheduler(optimizer, total, config.min_lr, warmup_t=warmup, warmup_lr_init=start, t_in_epochs=False)
