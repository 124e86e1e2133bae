"""Sums over ranks: of gradients, and of the statistics of BatchNorm.

First half: `sum_gradients` wraps the model in `DistributedDataParallel`. Second half: BatchNorm, which only the patch
embedding `stem` has. Each length has its own stem. While a group trains a length, its ranks compute the statistics
together (`synchronise_batch_norms`); other groups have old statistics of this length until `share_statistics`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from videoadapt.config.points import Point
from videoadapt.errors import ConfigError
from videoadapt.model.norm import SHARED
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.ranks import new_group, rank
from videoadapt.training.groups import GroupPlan
from videoadapt.training.throughput import DeviceClock


def sum_gradients(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Returns a model whose backward pass sums gradients over all ranks.

    A parameter that no rank uses in a step gets no gradient, so that the optimizer skips it. All ranks must call it
    together.

    Args:
        model: The model of this rank, on its device.
        dtype: In which the gradients travel and are summed. Default: that of the gradients.

    Returns:
        `model` inside torch's `DistributedDataParallel`; on a single rank, `model` itself.
    """
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    wrapped = _SummingModel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=True,  # a rank only uses the parameters of the lengths that it trains
        gradient_as_bucket_view=True,  # no second copy of the gradients
        broadcast_buffers=False,  # True would overwrite BatchNorm statistics of lengths that rank 0 does not train
    )
    wrapped.waits = DeviceClock(device)
    wrapped.register_comm_hook((wrapped.waits, dtype), _sum_bucket)
    return wrapped


class _SummingModel(DistributedDataParallel):
    """Attributes: `waits`, the time from the end of the backward passes to the last sum."""

    waits: DeviceClock


def gradient_waits(model: nn.Module) -> float:
    """Returns the seconds in which this rank waited for sums of gradients; `model` comes from `sum_gradients`."""
    return model.waits.read()[0] if isinstance(model, _SummingModel) else 0.0


def _sum_bucket(state, bucket):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202 - DDP refuses annotations in text
    # DDP's default hook divides by the number of ranks. The loss is already divided by the global batch, and the
    # division rounds to float32, also for float64 gradients.
    waits, dtype = state
    gradients = bucket.buffer()
    future = dist.all_reduce(gradients.to(dtype or gradients.dtype), async_op=True).get_future()
    started = waits.start() if bucket.is_last() else None

    def ended(done):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        if started is not None:
            waits.stop(started)
        return gradients.copy_(done.value()[0])  # copies nothing if it is the same tensor

    return future.then(ended)


def no_gradient_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Returns a context for forward passes whose backward passes add to the gradients of this rank only."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def sum_in_backward(model: nn.Module, loss: Tensor) -> None:
    """Makes the backward pass from `loss` sum the gradients over all ranks, with those of earlier backward passes.

    The forward pass of `loss` ran inside `no_gradient_sync`: otherwise DDP would sum in the first backward pass that
    follows it, which may be that of another point. A call inside `no_gradient_sync` has no effect.

    Args:
        model: A model that `sum_gradients` has returned.
        loss: The loss, ().
    """
    if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
        model.reducer.prepare_for_backward([loss])  # what DDP's own forward pass does with its outputs


def forget_backward_passes(model: nn.Module) -> None:
    """Makes DDP forget which parameters the backward passes inside `no_gradient_sync` have used. All ranks call it.

    Only a sum over ranks ends that record. The next step would otherwise give a zero gradient, and not none, to
    parameters that it does not use. The gradients themselves stay, as zeros or as sums: set them to None.

    Args:
        model: A model that `sum_gradients` has returned.
    """
    loss = next(parameter for parameter in model.parameters() if parameter.requires_grad).sum()
    sum_in_backward(model, loss)
    loss.backward()


@contextmanager
def frames_uncounted(model: TimeSformer) -> Iterator[None]:
    """Makes BatchNorms pass frames on unchanged, and leave them out of the statistics.

    This rank still takes part in the sums of statistics over its group. Does nothing to models without stems.
    """
    passed: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        passed.append(inputs[0])
        return inputs[0][:0]

    def give_back(_: nn.Module, __: object, output: Tensor) -> Tensor:
        # The output, of no frame, ties the norm to the backward pass, in which the other ranks wait for this one.
        return torch.cat([output, passed.pop()])

    with ExitStack() as hooks:
        for module in model.patch_embed.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                hooks.callback(module.register_forward_pre_hook(take).remove)
                hooks.callback(module.register_forward_hook(give_back).remove)
        yield


class HostSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the clips of all ranks of a group, for CPUs. torch's `nn.SyncBatchNorm` needs a GPU."""

    def __init__(self, source: nn.BatchNorm2d, process_group: dist.ProcessGroup) -> None:
        """Takes over the settings, parameters and buffers of a BatchNorm, so that its optimizer still moves them.

        Args:
            source: The module to replace.
            process_group: The ranks whose clips are normalised together.
        """
        super().__init__(source.num_features, source.eps, source.momentum, device="meta")
        self.process_group = process_group
        self.weight, self.bias = source.weight, source.bias  # the same objects, not copies
        self.running_mean, self.running_var = source.running_mean, source.running_var
        self.num_batches_tracked = source.num_batches_tracked
        self.train(source.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name
        """Normalises `(B, C, H, W)`: in training by the clips of the group's ranks, otherwise by the running mean."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None  # noqa: PT018
        # Under autocast, convolutions give bf16, in which sums over pixels would lose their digits.
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        size = torch.tensor(float(input.numel() // input.shape[1]), dtype=x.dtype)  # values per channel, here
        # `all_reduce` of torch.distributed.nn, unlike dist.all_reduce, passes gradients to all ranks.
        count = all_reduce(size, group=self.process_group)
        if not count:  # see `frames_uncounted`
            return input
        mean = all_reduce(x.sum((0, 2, 3)), group=self.process_group) / count  # (C,)
        squares = (x - mean[:, None, None]).square().sum((0, 2, 3))  # (C,)
        # A second pass, after the mean: the mean of squares minus the squared mean loses digits.
        variance = all_reduce(squares, group=self.process_group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            assert self.momentum is not None, "the BatchNorms of a stem have a momentum"
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # unbiased, as torch has it
        # Not `F.batch_norm`: it treats the mean and variance as constants, without gradients.
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronise_batch_norms(model: TimeSformer, plan: GroupPlan, timeout_s: float) -> None:
    """Replaces the BatchNorms of this rank's lengths, so that statistics cover the clips of the whole group.

    Names in `state_dict`, parameters and buffers stay the same. All ranks must call it together.

    Args:
        model: The model of this rank; changed in place if it has stems and the plan has several ranks.
        plan: The groups of all ranks.
        timeout_s: Seconds after which a sum of statistics fails because a rank does not take part.

    Raises:
        ConfigError: Several groups would train one stem that all lengths share.
    """
    if model.config.embed != "stem" or plan.ranks == 1:
        return
    if model.config.share_patch and len(plan.groups) > 1:
        raise ConfigError("parallel.groups: a stem that all lengths share (model.share_patch) needs one group for all")
    # torch requires that every rank creates every group, in the same order, also groups without this rank.
    process_groups = [new_group(timeout_s, list(group.ranks)) for group in plan.groups]
    number = plan.groups.index(plan.group(rank()))
    if len(plan.groups[number].ranks) == 1:
        return  # torch's own BatchNorm is faster
    on_host = next(model.parameters()).device.type == "cpu"
    for key in _stem_keys(model, plan.groups[number].points):
        stem, process_group = model.patch_embed.proj[key], process_groups[number]
        if not on_host:
            model.patch_embed.proj[key] = nn.SyncBatchNorm.convert_sync_batchnorm(stem, process_group)
            continue
        for name, module in list(stem.named_children()):  # a list, since the loop changes the children
            if isinstance(module, nn.BatchNorm2d):
                setattr(stem, name, HostSyncBatchNorm(module, process_group))


def has_foreign_statistics(model: TimeSformer, plan: GroupPlan) -> bool:
    """Returns whether this rank may hold old BatchNorm statistics, namely of lengths that other groups train."""
    return model.config.embed == "stem" and len(plan.groups) > 1


def share_statistics(model: nn.Module, plan: GroupPlan) -> None:
    """Copies the BatchNorm statistics of each length from the first rank of its group to all ranks.

    All ranks must call it together. Models other than `TimeSformer` and models without stems stay unchanged.
    """
    if not isinstance(model, TimeSformer) or not has_foreign_statistics(model, plan):
        return
    for group in plan.groups:
        for key in _stem_keys(model, group.points):
            for buffer in model.patch_embed.proj[key].buffers():
                dist.broadcast(buffer, group.ranks.start)


def _stem_keys(model: TimeSformer, points: tuple[str, ...]) -> list[str]:
    """Returns the names of the stems that some points use; each name once, since points of one length share a stem."""
    return [SHARED] if model.config.share_patch else list(dict.fromkeys(str(Point.parse(p).length) for p in points))
