"""BatchNorm on several ranks: its statistics are those of all clips of a length, whichever rank has them.

Only a `stem` has any. A length's stem is in step within the group that trains it, and unknown to the others until
`share_statistics`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from videoadapt.config.points import Point
from videoadapt.errors import ConfigError
from videoadapt.model.norm import SHARED
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.ranks import rank
from videoadapt.training.groups import GroupPlan


class HostSyncBatchNorm(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for tensors `(B, C, H, W)` on the host; torch has it for GPUs alone."""

    process_group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name
        """Normalised by the mean and variance over the clips of all ranks of the group."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None  # noqa: PT018
        size = torch.tensor(float(input.numel() // input.shape[1]), dtype=input.dtype)
        count = all_reduce(size, group=self.process_group)
        mean = all_reduce(input.sum((0, 2, 3)), group=self.process_group) / count
        spread = (input - mean[:, None, None]).square().sum((0, 2, 3))
        variance = all_reduce(spread, group=self.process_group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            assert self.momentum is not None, "a stem's BatchNorms have a momentum"
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        # Not `F.batch_norm`, which would take mean and variance for constants.
        scale = self.weight * (variance + self.eps).rsqrt()
        return (input - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


def synchronise(model: TimeSformer, plan: GroupPlan) -> None:
    """Makes the BatchNorms of this rank's lengths use the statistics of its whole group. Every rank must call it.

    Raises `ConfigError` where several groups would share one stem.
    """
    if model.config.embed != "stem" or plan.ranks == 1:
        return
    if model.config.share_patch and len(plan.groups) > 1:
        raise ConfigError("parallel.groups: a stem that all lengths share (model.share_patch) needs one group for all")
    process_groups = [dist.new_group(list(group.ranks)) for group in plan.groups]  # by every rank, in this order
    number = plan.groups.index(plan.group(rank()))
    if len(plan.groups[number].ranks) == 1:
        return
    on_host = next(model.parameters()).device.type == "cpu"
    for key in _keys(model, plan.groups[number].points):
        stem, process_group = model.patch_embed.proj[key], process_groups[number]
        if on_host:
            for module in stem.children():
                if isinstance(module, nn.BatchNorm2d):
                    module.__class__ = HostSyncBatchNorm
                    module.process_group = process_group
        else:
            model.patch_embed.proj[key] = nn.SyncBatchNorm.convert_sync_batchnorm(stem, process_group)


def statistics_are_apart(model: TimeSformer, plan: GroupPlan) -> bool:
    """Whether a rank may hold old statistics of lengths that others train."""
    return model.config.embed == "stem" and len(plan.groups) > 1


def share_statistics(model: nn.Module, plan: GroupPlan) -> None:
    """Gives all ranks the statistics of every length, from its group's first rank. Every rank must call it."""
    if not isinstance(model, TimeSformer) or not statistics_are_apart(model, plan):
        return
    for group in plan.groups:
        for key in _keys(model, group.points):
            for buffer in model.patch_embed.proj[key].buffers():
                dist.broadcast(buffer, group.ranks.start)


def _keys(model: TimeSformer, points: tuple[str, ...]) -> list[str]:
    return [SHARED] if model.config.share_patch else list(dict.fromkeys(str(Point.parse(p).length) for p in points))


def sum_gradients(model: nn.Module) -> nn.Module:
    """The model in torch's `DistributedDataParallel`, which **sums** gradients over all ranks while they are computed.

    Not every rank uses every parameter; one that no rank has used in a step keeps no gradient. Alone, the model itself.
    """
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )
    wrapped.register_comm_hook(None, _sum)
    return wrapped


def _sum(state, bucket):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001 - DDP refuses annotations in text
    # DDP's own hook divides by the number of ranks, with the precision of a float32.
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def no_gradient_sync(model: nn.Module) -> AbstractContextManager[None]:
    """While entered, backward passes add to this rank's gradients alone; the next one outside sums them all."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
