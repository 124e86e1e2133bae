"""Resizing of frames: the CPU's sums of rows are torch's interpolation, and compilers see the interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from videoadapt.model.embed import resize_frames


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("before", "after"), [(64, 32), (64, 48), (37, 80), (224, 220), (16, 16)])
def test_resizing_on_the_cpu_is_interpolation(before: int, after: int, align_corners: bool) -> None:
    frames = torch.randn(2, 5, before, before)
    expected = F.interpolate(
        frames, size=(after, after), mode="bilinear", antialias=not align_corners, align_corners=align_corners
    )
    torch.testing.assert_close(resize_frames(frames, after, align_corners=align_corners), expected, atol=2e-6, rtol=0)


def test_weights_cached_in_inference_are_used_in_training() -> None:
    frames = torch.randn(1, 3, 23, 23)
    with torch.inference_mode():
        expected = resize_frames(frames, 9)
    frames.requires_grad_()
    found = resize_frames(frames, 9)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected.clone())
    # Each pixel's gradient is its weight in all sums; the weights of a sum add up to 1.
    assert frames.grad is not None and frames.grad.sum() == pytest.approx(3 * 9 * 9, rel=1e-5)


def test_an_exported_program_holds_the_interpolation() -> None:
    class Resize(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return resize_frames(frames, 8)

    program = torch.export.export(Resize(), (torch.randn(1, 3, 16, 16),))
    assert "_upsample_bilinear2d_aa" in program.graph_module.code
