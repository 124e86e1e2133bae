"""Predicts the memory that training takes on a rank without computing anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from videoadapt.config.load import Config
from videoadapt.model import attention
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.machine import autocast
from videoadapt.training.freeze import freeze, set_training_mode

_FLOAT_BYTES = 4  # weights, gradients and optimizer state are float32, also with run.precision=bf16


def parameter_count(config: Config) -> int:
    """Returns the number of values that are trained in the model of a config, at all its points together."""
    return _parameter_counts(config)[1]


def _parameter_counts(config: Config) -> tuple[int, int]:
    """Returns the number of values in the model of a config, and of those that `train.freeze` leaves to be trained."""
    with torch.device("meta"):  # shapes without memory
        model = TimeSformer(config.model)
    freeze(model, config.train.freeze)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of training on one rank, without the workspaces of kernels and the buffers of the network.

    Attributes:
        state: Weights, gradients, optimizer state and moving average (EMA).
        saved: The activations that are kept for the backward pass, by point: fixed bytes, and bytes for each clip.
    """

    state: int
    saved: Mapping[str, tuple[int, int]]

    def bytes(self, points: Sequence[str], clips: int, *, costliest_last: bool = False) -> int:
        """Returns the bytes of a rank that trains `points`, costliest first, on micro-batches of `clips` clips.

        Points run one after the other, so that only the point with the largest activations counts. With
        `costliest_last`, the activations of the first point stay until the others are done.
        """
        first, *others = (fixed + per_clip * clips for fixed, per_clip in (self.saved[p] for p in points))
        if costliest_last:
            return self.state + first + max(others, default=0)
        return self.state + max([first, *others])

    def most_clips(self, points: Sequence[str], free: int) -> int:
        """Returns the clips of the largest micro-batch that takes at most `free` bytes at each of `points`, or 0."""
        left = free - self.state
        return max(0, min((left - fixed) // per_clip for fixed, per_clip in (self.saved[point] for point in points)))


def training_memory(config: Config, device: torch.device, *, as_on_gpu: bool = False) -> TrainingMemory:
    """Predicts the memory of training. `train.compile` takes less, because fused kernels keep fewer activations.

    Args:
        config: The config.
        device: Decides which kernels run. Kernels keep different tensors.
        as_on_gpu: Whether the prediction is for a GPU, also where `device` is a CPU.
    """
    train = config.train
    whole, trained = _parameter_counts(config)
    # Gradients; AdamW keeps two values per weight, SGD one with momentum. The EMA is another copy of all weights.
    values = trained * (1 + (2 if train.optimizer == "adamw" else train.momentum > 0))
    values += whole * (1 + (train.ema is not None))
    saved = {}
    with _fused_attention() if as_on_gpu else nullcontext():
        for point in config.model.points:
            one, two = (_saved(config, point, clips, device) for clips in (1, 2))
            saved[point] = (2 * one - two, two - one)  # the line through both: intercept and slope
    return TrainingMemory(_FLOAT_BYTES * values, saved)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Lets passes run the kernel of GPUs. By the rules of CPUs, bf16 runs one that keeps all weights of attention."""
    rules, attention.RULES = attention.RULES, ()
    try:
        yield
    finally:
        attention.RULES = rules


def _saved(config: Config, point: str, clips: int, device: torch.device) -> int:
    whole = saved_bytes(config, point, clips, device, checkpointing=False)
    if not config.train.activation_checkpointing:
        return whole
    # The backward pass recomputes one block at a time and then holds that block's activations besides.
    return saved_bytes(config, point, clips, device, checkpointing=True) + whole // config.model.depth


def saved_bytes(config: Config, point: str, clips: int, device: torch.device, *, checkpointing: bool) -> int:
    """Counts the bytes that a forward pass keeps for the backward pass.

    The pass runs on torch's fake tensors, which have shapes and no data.

    Args:
        config: Gives the model and the precision.
        point: The point of the pass.
        clips: The batch size.
        device: Decides which attention kernel runs. Kernels keep different tensors.
        checkpointing: Whether activations are recomputed per block.

    Returns:
        Bytes of all different storages, without the parameters.
    """
    with torch.device("meta"):
        model = TimeSformer(config.model)
    freeze(model, config.train.freeze)
    set_training_mode(model, config.train.freeze)
    model.activation_checkpointing = checkpointing
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        # The dict holds the tensor: a freed storage could give its address to another one.
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        shape = (clips, 3, config.model.num_frames, config.model.size, config.model.size)  # B C T H W
        frames = torch.empty(shape, device=device)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            autocast(device, config.run.precision),
        ):
            model(frames, point)
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
