"""The CUDA kernels give the results of the plain path: here in Triton's interpreter, on a GPU as they are compiled."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import need
from videoadapt.config.sections import ModelConfig
from videoadapt.model import timesformer
from videoadapt.model.timesformer import TimeSformer

SCRIPT = Path(__file__).with_name("kernel_parity.py")


def test_the_kernels_equal_the_plain_path_in_the_interpreter() -> None:
    need(importlib.util.find_spec("triton") is not None, "triton")
    done = subprocess.run(
        [sys.executable, SCRIPT], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)
    assert len(rows) == 8
    for name, logits, gradient, same_parameters in rows:
        assert same_parameters, name
        assert logits < 1e-5, name
        assert gradient < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("frames", [1, 4, 96])
def test_the_kernels_equal_float64_on_a_gpu(
    dtype: torch.dtype, bound: float, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timesformer, "_LEAST_FUSED", 0)
    torch.manual_seed(0)
    config = {"width": 64, "depth": 3, "heads": 2, "patch": 8, "size": 32, "num_classes": 5, "points": ("4", "2")}
    reference = TimeSformer(ModelConfig(**config, num_frames=frames)).double()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = copy.deepcopy(reference).float().cuda()
    clips = torch.randn(2, 3, frames, 32, 32, dtype=torch.float64)
    for point in ("4", "2"):
        expected = reference(clips, point)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            got = model(clips.float().cuda(), point)
        assert isinstance(expected, Tensor)
        assert isinstance(got, Tensor)
        assert (got.double().cpu() - expected).abs().max() <= bound * expected.abs().max()
