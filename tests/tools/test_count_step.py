"""The counts of operations on tensors without data, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from count_operations import counting, faked
from count_step import count_pass, count_step, our_model
from videoadapt.config.load import make_config

CUDA = torch.device("cuda", 0)
MIB = 2**20


@pytest.mark.parametrize("device", [CUDA, torch.device("cpu")])
def test_a_pass_with_its_backward_pass_is_counted(device: torch.device) -> None:
    with torch.device("meta"):
        layer = nn.Linear(512, 512, bias=False)
    with counting(device) as count:
        faked(layer, device)
        x = torch.empty(512, 512, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(x)
        y.float().relu().sum().backward()
    assert count.launches["mm"] == 2  # the product, and the gradient of the weight
    # float32 has 1 MiB, bfloat16 half of it: x and the weight are cast, y is cast up, both gradients are cast.
    assert count.bytes["_to_copy"] == (2 * 1.5 + 1.5 + 1.5 + 1.5) * MIB
    assert count.bytes["relu"] == 2 * MIB
    assert count.waits == 0


def test_waits_of_the_host_are_counted() -> None:
    with counting(CUDA) as count:
        x = torch.empty(4, device=CUDA)
        assert x.sum().item() == 1.0
        x.cpu()
        x.to("cpu", non_blocking=True)
        torch.empty(4).to(CUDA)
        float(torch.empty(()))  # a number of the host
    assert count.waits == 3


def test_the_kernels_run_in_a_step_and_the_host_does_not_wait() -> None:
    model = {"width": 64, "depth": 1, "heads": 1, "patch": 16, "size": 224, "num_frames": 8, "num_classes": 5}
    config = make_config(
        {"run": {"precision": "bf16"}, "model": model | {"points": ["14", "7"]}, "train": {"batch": 24}}
    )
    forward, both = count_pass(lambda: our_model(config, "14"), config, 24, CUDA)
    assert forward.launches["add_norm"] == 2
    assert both.launches["attend_over_time_backward"] == 1
    assert both.launches["_foreach_copy_"] == 2  # all weights of the block, and their gradients
    assert count_step(config, CUDA).waits == 0
