"""Training augmentation, evaluation crops, thumbnails, normalising and mixing."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from timesformer_views import bilinear, three_crops
from videoadapt.config.load import make_config
from videoadapt.config.sections import DataConfig, ModelConfig
from videoadapt.data.clips.augment import augment, mix
from videoadapt.data.clips.views import crops, normalise, thumbnail
from videoadapt.errors import ConfigError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


RECIPE: dict[str, Any] = {
    "crop_area": (0.08, 1.0),
    "interpolation": "bicubic",
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "erase": 0.5,
}


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return list(state[1])


def model_of(size: int) -> ModelConfig:
    return ModelConfig(size=size, patch=8, points=(str(size // 8),))


def augmented(frames: np.ndarray, seed: int, size: int = 32, **settings: Any) -> torch.Tensor:
    return augment(frames, DataConfig(**settings), model_of(size), seed=seed)[0]


def ramp(height: int, width: int, frames: int = 3) -> np.ndarray:
    """Brightness rises along the longer side."""
    along_x = np.broadcast_to(
        np.linspace(0, 255, max(height, width)).astype(np.uint8), (min(height, width), max(height, width))
    )
    image = along_x if width >= height else along_x.T
    return np.repeat(np.repeat(image[None, ..., None], frames, 0), 3, -1)


@given(st.integers(20, 60), st.integers(20, 60), st.integers(0, 2**63 - 1))
def test_augment_gives_a_square_of_the_requested_size(height: int, width: int, seed: int) -> None:
    clip = augmented(noise(2, height, width, 3), seed, size=24, short_side=(24, 40))
    assert clip.shape == (3, 2, 24, 24)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()


@pytest.mark.parametrize("settings", [{"short_side": (32, 48)}, RECIPE], ids=["crop", "recipe"])
def test_augment_treats_all_frames_alike(settings: dict[str, Any]) -> None:
    still = np.repeat(noise(1, 50, 70, 3), 5, axis=0)
    for seed in range(20):
        clip = augmented(still, seed, **settings)
        assert clip.shape == (3, 5, 32, 32)
        assert clip.dtype == torch.uint8
        assert (clip == clip[:, :1]).all()


@pytest.mark.parametrize("settings", [{"short_side": (32, 48)}, RECIPE], ids=["crop", "recipe"])
def test_augment_depends_only_on_the_seed_and_keeps_global_generators(settings: dict[str, Any]) -> None:
    frames = noise(2, 50, 70, 3)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), numpy_state()
    first = augmented(frames, 7, **settings)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy_state() == states[2]
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(augmented(frames, 7, **settings), first)
    others = [augmented(frames, seed, **settings) for seed in range(5)]
    assert len({clip.numpy().tobytes() for clip in others}) == 5


def test_augment_flips_with_the_probability_of_the_config() -> None:
    frames = noise(1, 32, 32, 3)
    plain = torch.from_numpy(frames).permute(3, 0, 1, 2)
    for flip in (0.0, 0.5, 1.0):
        clips = [augmented(frames, seed, flip=flip) for seed in range(100)]
        flipped = sum(torch.equal(clip, plain.flip(-1)) for clip in clips)
        assert flipped + sum(torch.equal(clip, plain) for clip in clips) == 100  # and nothing was resampled
        assert abs(flipped / 100 - flip) <= 0.2 * (flip == 0.5)


def gradient(height: int, width: int) -> np.ndarray:
    """Red rises from left to right and green from top to bottom, from 0 to 255 over the frame."""
    image = np.zeros((1, height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width).round()
    image[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return image


@pytest.mark.parametrize("settings", [{"short_side": (32, 60)}, {"crop_area": (0.1, 0.9)}], ids=["short side", "area"])
def test_augment_returns_where_the_crop_lies(settings: dict[str, Any]) -> None:
    flips = set()
    for seed in range(30):
        clip, (box, flipped) = augment(gradient(90, 140), DataConfig(**settings), model_of(32), seed=seed)
        left, top, right, bottom = box
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        red, green = clip[0, 0].float() / 255, clip[1, 0].float() / 255
        columns = red.mean(0).flip(0) if flipped else red.mean(0)
        expected_x = left + (torch.arange(32) + 0.5) / 32 * (right - left)
        expected_y = top + (torch.arange(32) + 0.5) / 32 * (bottom - top)
        torch.testing.assert_close(columns, expected_x.float(), atol=0.015, rtol=0)
        torch.testing.assert_close(green.mean(1), expected_y.float(), atol=0.015, rtol=0)
        flips.add(flipped)
    assert flips == {True, False}


def test_area_crops_cover_the_requested_areas_and_aspect_ratios() -> None:
    frames, boxes = gradient(200, 300), []
    for seed in range(200):
        _, crop = augment(frames, DataConfig(crop_area=(0.08, 0.5)), model_of(32), seed=seed)
        left, top, right, bottom = crop.box
        boxes.append((300 * (right - left), 200 * (bottom - top)))
    areas = np.array([width * height / 60000 for width, height in boxes])
    ratios = np.array([width / height for width, height in boxes])
    for values, low, high in ((areas, 0.08, 0.5), (ratios, 3 / 4, 4 / 3)):
        assert values.min() == pytest.approx(low, rel=0.2)
        assert values.max() == pytest.approx(high, rel=0.2)


def test_erasing_fills_one_box_with_noise_that_is_standard_normal_after_normalising() -> None:
    frames = np.full((2, 64, 64, 3), 7, np.uint8)
    model = model_of(64)
    erased = 0
    for seed in range(40):
        clip = augmented(frames, seed, size=64, erase=0.5)
        changed = (clip != 7).any(0)[0]
        if not changed.any():
            continue
        erased += 1
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = clip[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box[0, 0].numel() == pytest.approx((64**2) * 0.18, abs=64**2 * 0.17)
        values = normalise(box[None], model.mean, model.std, torch.float32)
        assert abs(values.mean()) < 0.25
        assert 0.7 < values.std() < 1.1  # cut where it leaves 0 to 255
    assert 10 <= erased <= 30


def test_erasing_does_not_depend_on_rand_augment() -> None:
    frames = np.full((1, 32, 32, 3), 7, np.uint8)
    augmented_first, erased = (
        np.array([not torch.equal(augmented(frames, seed, **each), augmented(frames, seed)) for seed in range(200)])
        for each in ({"rand_augment": "rand-m9-n1-p0.5-inc1"}, {"erase": 0.5})
    )
    assert 0.3 < erased[~augmented_first].mean() < 0.7
    assert 0.3 < erased[augmented_first].mean() < 0.7


def test_rand_augment_and_jitter_change_most_clips() -> None:
    frames = gradient(32, 32)
    plain = torch.from_numpy(frames).permute(3, 0, 1, 2)
    for settings, least, most in (
        ({"rand_augment": "rand-m9-n2-inc1"}, 10, 20),
        ({"color_jitter": 0.3}, 19, 20),
        ({}, 0, 0),
    ):
        clips = [augmented(frames, seed, flip=0.0, **settings) for seed in range(20)]
        assert least <= sum(not torch.equal(clip, plain) for clip in clips) <= most


def test_rand_augment_of_any_magnitude_runs() -> None:
    """At the highest magnitude, timm posterizes to 0 bits, which newer versions of Pillow refuse."""
    for seed in range(60):
        clip = augmented(gradient(32, 32), seed, rand_augment="rand-m10-n2-p1-mstd0.5-inc1")
        assert clip.shape == (3, 1, 32, 32)


@pytest.mark.parametrize("text", ["rand-m9-x3-inc1", "rand-m9.5-inc1", "augmix-m5", "rand-m9-mstd0.5", ""])
def test_recipes_other_than_rand_augment_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="data.rand_augment"):
        make_config({"data": {"rand_augment": text}})


@pytest.mark.parametrize("values", [{"crop_area": [0.5, 0.1]}, {"crop_area": [0.1, 1.5]},
                                    {"crop_area": [0.1, 1.0], "short_side": [256, 320]}])  # fmt: skip
def test_areas_that_cannot_be_cut_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="data.crop_area: expected"):
        make_config({"data": values})


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40)])
def test_crops_lie_along_the_longer_side_in_order(height: int, width: int, count: int) -> None:
    frames = ramp(height, width)
    views = crops(frames, size=40, count=count)
    assert views.shape == (count, 3, 3, 40, 40)
    cuts = {1: [30], 2: [0, 60], 3: [0, 30, 60]}[count]
    for view, cut in zip(views, cuts, strict=True):
        part = frames[:, :, cut : cut + 40] if width > height else frames[:, cut : cut + 40]
        assert np.array_equal(view.permute(1, 2, 3, 0).numpy(), part)  # not resampled: bit-exact


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("short_side", [30, 37])
def test_crops_resize_the_short_side_with_the_filter_of_torchvision(interpolation: str, short_side: int) -> None:
    frames, mode = noise(2, 50, 80, 3), v2.InterpolationMode(interpolation)
    resize = v2.Compose([v2.Resize(short_side, interpolation=mode, antialias=True), v2.CenterCrop(30)])
    expected = resize(torch.from_numpy(frames).permute(0, 3, 1, 2))
    found = crops(frames, size=30, count=1, short_side=short_side, interpolation=interpolation)
    assert torch.equal(found[0].transpose(0, 1), expected)


@pytest.mark.parametrize(("height", "width"), [(50, 100), (100, 50)])
def test_crops_smaller_than_the_short_side_lie_in_its_middle(height: int, width: int) -> None:
    frames = noise(1, height, width, 3)
    for view, cut in zip(crops(frames, size=40, count=3, short_side=50), [0, 30, 60], strict=True):
        part = frames[:, 5:45, cut : cut + 40] if width > height else frames[:, cut : cut + 40, 5:45]
        assert np.array_equal(view.permute(1, 2, 3, 0).numpy(), part)


def test_crops_of_a_square_are_all_the_same() -> None:
    views = crops(noise(2, 40, 40, 3), size=20, count=3)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    assert crops(noise(2, 40, 40, 3), size=20, count=0).shape == (0, 3, 2, 20, 20)


@pytest.mark.parametrize(("width", "height"), [(340, 256), (454, 256), (426, 240), (256, 340), (320, 240)])
def test_crops_can_be_those_of_timesformers_code(width: int, height: int) -> None:
    image = noise(height, width, 3)
    found = crops(image[None], size=224, count=3, antialias=False, offset="ceil")
    for view, expected in zip(found, three_crops(image, 224), strict=True):
        # Half a grey level is the rounding to uint8; float32 coordinates add a little.
        assert np.abs(view[:, 0].permute(1, 2, 0).numpy() - expected).max() <= 0.51
    if width != 320:  # there the middle begins at a whole pixel, 37; elsewhere at 36.5 or 86.5
        middle = crops(image[None], size=224, count=3, antialias=False)[1]
        assert not torch.equal(middle, found[1])


def test_training_crops_without_antialiasing_are_parts_of_the_plainly_resized_frame() -> None:
    image = noise(60, 90, 3)
    clip = augmented(image[None], 1, size=32, short_side=(40, 40), flip=0.0, antialias=False)
    resized = bilinear(image, 40, 60)
    top, left = np.meshgrid(range(9), range(29), indexing="ij")
    distances = [
        np.abs(clip[:, 0].permute(1, 2, 0).numpy() - resized[y : y + 32, x : x + 32]).max()
        for y, x in zip(top.flat, left.flat, strict=True)
    ]
    assert min(distances) <= 0.51
    area = augmented(image[None], 1, size=32, crop_area=(1.0, 1.0), flip=0.0, antialias=False)
    smooth = augmented(image[None], 1, size=32, crop_area=(1.0, 1.0), flip=0.0)
    assert (area.int() - smooth.int()).abs().max() > 20  # noise keeps its contrast without antialiasing


def test_thumbnails_show_the_whole_of_evenly_spread_frames() -> None:
    levels = np.broadcast_to((np.arange(8, dtype=np.uint8) * 30)[:, None, None, None], (8, 30, 50, 3))
    assert thumbnail(levels, frames_kept=1, size=16)[0, :, 0, 0].tolist() == [120]
    assert thumbnail(levels, frames_kept=2, size=16)[0, :, 0, 0].tolist() == [0, 210]
    small = thumbnail(levels, frames_kept=8, size=16)
    assert small.shape == (3, 8, 16, 16)
    assert small[0, :, 5, 5].tolist() == [i * 30 for i in range(8)]
    wide = thumbnail(ramp(20, 80), frames_kept=3, size=20)[0, 0, 0]
    assert wide[0] < 10
    assert wide[-1] > 245


def test_normalise_is_the_usual_formula() -> None:
    clips = torch.from_numpy(noise(2, 3, 2, 4, 4))
    mean, std = (0.45, 0.4, 0.3), (0.225, 0.2, 0.1)
    out = normalise(clips, mean, std, torch.float32)
    expected = (clips / 255 - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    torch.testing.assert_close(out, expected)
    assert normalise(clips, mean, std, torch.bfloat16).dtype == torch.bfloat16


CLIPS = torch.rand(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_combines_two_clips_in_the_fractions_of_their_targets(mixup: float, cutmix: float) -> None:
    clips, labels = torch.eye(4).view(4, 1, 1, 2, 2).repeat(1, 1, 2, 8, 8), torch.arange(4)
    partner = torch.tensor([1, 0, 3, 2])
    fractions = []
    for seed in range(10):
        mixed, targets = mix(
            clips, labels, range(4), num_classes=4, mixup=mixup, cutmix=cutmix, smoothing=0.0, seed=seed
        )
        assert mixed.shape == clips.shape
        kept = targets.diagonal()[:, None]
        fractions += kept[::2].flatten().tolist()
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[2], kept[3])
        torch.testing.assert_close(targets, kept * torch.eye(4) + (1 - kept) * torch.eye(4)[partner])
        if not cutmix:
            fraction = kept[..., None, None, None]
            torch.testing.assert_close(mixed, fraction * clips + (1 - fraction) * clips[partner])
        if not mixup:
            unchanged, from_partner = mixed == clips, mixed == clips[partner]
            assert (unchanged | from_partner).all()
            cut = (clips != clips[partner]) & from_partner  # pixels that the box has certainly changed
            assert cut.any() or kept.min() > 0.9
    assert len(set(fractions)) > 10  # of 20: each pair is drawn separately, but two boxes may have the same size


def test_cutmix_targets_count_the_pixels_of_the_box() -> None:
    clips = torch.stack([torch.zeros(3, 2, 12, 20), torch.ones(3, 2, 12, 20)])
    for seed in range(20):
        mixed, targets = mix(
            clips, torch.arange(2), range(2), num_classes=2, mixup=0.0, cutmix=1.0, smoothing=0.0, seed=seed
        )
        assert float(mixed[0].mean()) == pytest.approx(float(targets[0, 1]), abs=1e-6)
        assert (mixed[0] == mixed[0, 0, 0]).all()  # the same box in all frames and channels


def test_the_mix_of_a_pair_does_not_depend_on_the_rest_of_the_batch() -> None:
    """Any layout of ranks and micro-batches then trains the same clips."""
    settings = {"num_classes": 3, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "seed": 5}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole, targets = mix(CLIPS, LABELS, [6, 7, 8, 9], **settings)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
    half, half_targets = mix(CLIPS[2:], LABELS[2:], [8, 9], **settings)  # type: ignore[arg-type]
    assert torch.equal(half, whole[2:]) and torch.equal(half_targets, targets[2:])
    alone, alone_targets = mix(CLIPS[1:], LABELS[1:], [7, 8, 9], **settings)  # type: ignore[arg-type] # its partner failed
    assert torch.equal(alone[0], CLIPS[1]) and alone_targets[0].argmax() == LABELS[1] and alone_targets[0].max() > 0.9
    assert torch.equal(alone[1:], whole[2:])
    others = [mix(CLIPS, LABELS, [6, 7, 8, 9], **settings | {"seed": seed})[0] for seed in range(6)]  # type: ignore[arg-type]
    assert len({mixed.numpy().tobytes() for mixed in others}) == 6


def test_mix_off_changes_no_clip_and_smooths_the_targets() -> None:
    clips, targets = mix(CLIPS, LABELS, range(4), num_classes=3, mixup=0.0, cutmix=0.0, smoothing=0.3, seed=0)
    assert clips is CLIPS
    torch.testing.assert_close(targets[1], torch.tensor([0.1, 0.1, 0.8]))
