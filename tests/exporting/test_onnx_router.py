"""The router's numpy code chooses the frames and makes the pixels of videoadapt's own code, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import need
from videoadapt.config.load import Config, make_config
from videoadapt.data.clips.datasets import _evaluation_indices
from videoadapt.data.clips.views import crops, resize, thumbnail, to_tchw
from videoadapt.routing.label_rules import confidence

need("onnxruntime", "the router imports it")

from videoadapt.exporting import onnx_router as module  # noqa: E402 - only with onnxruntime

# Without AVX2, torchvision resizes uint8 in float32 and rounds.
WHOLE_BITS = any(name in torch.backends.cpu.get_cpu_capability() for name in ("AVX2", "AVX512"))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=25)
@given(st.tuples(*[st.integers(8, 120)] * 4), st.booleans(), st.booleans())
def test_resizing_equals_torchs(sizes: tuple[int, int, int, int], cubic: bool, antialias: bool) -> None:
    height, width, new_height, new_width = sizes
    frames = pixels(2, height, width, 3)
    found = module.resize(frames, new_height, new_width, cubic=cubic, antialias=antialias)
    name = "bicubic" if cubic else "bilinear"
    expected = resize(to_tchw(frames), [new_height, new_width], name, antialias=antialias).permute(0, 2, 3, 1).numpy()
    differences = np.abs(found.astype(int) - expected)
    assert differences.max() <= (0 if antialias and WHOLE_BITS else 1)
    assert (differences > 0).mean() < 0.1  # ties that float32 rounds either way, not another filter


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (64, 64), (64, 97), (33, 50)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("offset", ["round", "ceil"])
def test_crops_and_thumbnails_are_those_of_an_evaluation(shape: tuple[int, int], count: int, offset: Any) -> None:
    if not WHOLE_BITS:
        pytest.skip("torchvision resizes in float32 on this CPU")
    frames = pixels(3, *shape, 3)
    cut = {"size": 56, "spatial_crops": count, "short_side": 64, "interpolation": "bilinear", "antialias": True}
    found = module._crops(frames, cut | {"crop_offset": offset})
    assert np.array_equal(found, crops(frames, size=56, count=count, short_side=64, offset=offset).numpy())
    router = object.__new__(module.OnnxRouter)
    router.settings = {"assigner": {"frames": 2, "size": 32}}
    assert np.array_equal(router.thumbnail(frames), thumbnail(frames, frames_kept=2, size=32).numpy())


class Reader:
    """What the choice of frames reads of a video."""

    def __init__(self, num_frames: int, fps: float, times_s: np.ndarray | None) -> None:
        self.num_frames, self.fps, self.times_s = num_frames, fps, times_s


@pytest.mark.parametrize("sampling", ["dense", "segments"])
@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("single_clip", ["centre", "start"])
@pytest.mark.parametrize("fps", [None, 30.0])
def test_the_frames_are_those_of_an_evaluation(sampling: str, clips: int, single_clip: str, fps: float | None) -> None:
    model = {"num_frames": 8, "stride_frames": 5, "fps": fps}
    config: Config = make_config(
        {
            "model": model,
            "data": {"sampling": sampling},
            "evaluate": {"single_clip": single_clip, "temporal_views": clips},
        }
    )
    known = model | {"sampling": sampling, "single_clip": single_clip, "temporal_views": clips}
    for total, rate in ((3, 25.0), (100, 25.0), (301, 29.97), (1000, 60.0)):
        uneven = np.cumsum(np.random.default_rng(total).uniform(0.2, 1.8, total)) / rate
        for times_s in (None, uneven - uneven[0]):
            reader: Any = Reader(total, rate, times_s)
            _, expected = _evaluation_indices(reader, config, clips)
            assert np.array_equal(module._frame_numbers(known, total, rate, times_s), expected)


def test_a_cascade_that_never_ends_early_runs_all_its_points() -> None:
    following = module.parse_policy("cascade:7,14:2:entropy", {"points": ["14", "7"], "assigner": None})
    last, sure = np.array([-1, 1, 0]), np.ones((3, 2, 3))
    assert following(last, sure, sure).tolist() == [1, 0, -1]
    with pytest.raises(ValueError, match="cascade"):
        module.parse_policy("cascade:7,14:1.5", {"points": ["14", "7"], "assigner": None})


@pytest.mark.parametrize("classes", [1, 2, 5, 101])
@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
def test_confidences_are_those_of_videoadapt(classes: int, measure: Any) -> None:
    probabilities = np.full((1, classes), 1 / classes)
    assert module._confidence(probabilities, measure) == confidence(probabilities, measure)
