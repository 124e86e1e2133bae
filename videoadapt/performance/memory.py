"""The memory that training takes on a rank, counted without computing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from videoadapt.config.load import Config
from videoadapt.model.timesformer import TimeSformer


def parameter_count(config: Config) -> int:
    """Numbers that the model of a config learns, at all its points."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TimeSformer(config.model).parameters())


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes on a rank, without the buffers of kernels and of the network."""

    state: int  # weights, gradients, optimizer state, moving average
    saved: Mapping[str, tuple[int, int]]  # by point, what waits for the backward pass: in any case, and for each clip

    def bytes(self, points: Sequence[str], clips: int) -> int:
        """Of a rank that trains so many clips at once; points run one after the other, so the largest counts."""
        return self.state + max(fixed + per_clip * clips for fixed, per_clip in (self.saved[p] for p in points))


def training_memory(config: Config, device: torch.device) -> Memory:
    """What training the model of a config takes, without `train.compile`, which saves some of it."""
    train = config.train
    copies = 2 + (2 if train.optimizer == "adamw" else train.momentum > 0) + (train.ema is not None)
    saved = {}
    for point in config.model.points:
        one, two = (_saved(config, point, clips, device) for clips in (1, 2))
        saved[point] = (2 * one - two, two - one)
    return Memory(4 * copies * parameter_count(config), saved)


def _saved(config: Config, point: str, clips: int, device: torch.device) -> int:
    whole = saved_bytes(config, point, clips, device, checkpointing=False)
    if not config.train.activation_checkpointing:
        return whole
    # Each block is computed again, one at a time.
    return saved_bytes(config, point, clips, device, checkpointing=True) + whole // config.model.depth


def saved_bytes(config: Config, point: str, clips: int, device: torch.device, *, checkpointing: bool) -> int:
    """What a forward pass keeps for the backward pass, weights apart; torch's fake tensors have shapes and no data."""
    with torch.device("meta"):
        model = TimeSformer(config.model).train()
    model.activation_checkpointing = checkpointing
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its number
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        shape = (clips, 3, config.model.num_frames, config.model.size, config.model.size)
        frames, bf16 = torch.empty(shape, device=device), config.run.precision == "bf16"
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        ):
            model(frames, point)
        return sum(tensor.untyped_storage().nbytes() for number, tensor in kept.items() if number not in own)
