"""Crops, thumbnails, normalising and mixing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from videoadapt.data.transforms import augment, crops, mix, normalise, thumbnail


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def ramp(height: int, width: int, frames: int = 3) -> np.ndarray:
    """Brightness rises along the longer side."""
    along_x = np.broadcast_to(
        np.linspace(0, 255, max(height, width)).astype(np.uint8), (min(height, width), max(height, width))
    )
    image = along_x if width >= height else along_x.T
    return np.repeat(np.repeat(image[None, ..., None], frames, 0), 3, -1)


@given(st.integers(20, 60), st.integers(20, 60), st.integers(0, 2**63 - 1))
def test_augment_gives_a_square_of_the_size_asked_for(height: int, width: int, seed: int) -> None:
    clip = augment(noise(2, height, width, 3), size=24, short_side=(24, 40), flip=0.5, seed=seed)
    assert clip.shape == (3, 2, 24, 24)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()


def test_augment_does_the_same_to_all_frames() -> None:
    still = np.repeat(noise(1, 50, 70, 3), 5, axis=0)
    for seed in range(20):
        clip = augment(still, size=32, short_side=(32, 48), flip=0.5, seed=seed)
        assert (clip == clip[:, :1]).all()


def test_augment_depends_on_the_seed_alone_and_leaves_global_generators_alone() -> None:
    frames = noise(2, 50, 70, 3)
    torch.manual_seed(1)
    random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    first = augment(frames, size=32, short_side=(32, 48), flip=0.5, seed=7)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(2)
    random.seed(2)
    assert torch.equal(augment(frames, size=32, short_side=(32, 48), flip=0.5, seed=7), first)
    others = [augment(frames, size=32, short_side=(32, 48), flip=0.5, seed=seed) for seed in range(5)]
    assert len({clip.numpy().tobytes() for clip in others}) == 5


def test_augment_flips_as_often_as_it_is_told() -> None:
    frames = noise(1, 32, 32, 3)
    plain = torch.from_numpy(frames).permute(3, 0, 1, 2)
    for flip in (0.0, 0.5, 1.0):
        clips = [augment(frames, size=32, short_side=None, flip=flip, seed=seed) for seed in range(100)]
        flipped = sum(torch.equal(clip, plain.flip(-1)) for clip in clips)
        assert flipped + sum(torch.equal(clip, plain) for clip in clips) == 100  # and nothing was resampled
        assert abs(flipped / 100 - flip) <= 0.2 * (flip == 0.5)


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


def test_crops_resize_the_short_side_with_the_filter_of_torchvision() -> None:
    frames = noise(2, 50, 80, 3)
    resize = v2.Compose([v2.Resize(30, antialias=True), v2.CenterCrop(30)])
    expected = resize(torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert torch.equal(crops(frames, size=30, count=1)[0].transpose(0, 1), expected)


def test_crops_of_a_square_are_all_the_same() -> None:
    views = crops(noise(2, 40, 40, 3), size=20, count=3)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    assert crops(noise(2, 40, 40, 3), size=20, count=0).shape == (0, 3, 2, 20, 20)


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
def test_mix_makes_each_clip_of_two_in_the_shares_of_its_targets(mixup: float, cutmix: float) -> None:
    clips, labels = torch.eye(4).view(4, 1, 1, 2, 2).repeat(1, 1, 2, 8, 8), torch.arange(4)
    partner = torch.tensor([1, 0, 3, 2])
    shares = []
    for seed in range(10):
        mixed, targets = mix(
            clips, labels, range(4), num_classes=4, mixup=mixup, cutmix=cutmix, smoothing=0.0, seed=seed
        )
        assert mixed.shape == clips.shape
        kept = targets.diagonal()[:, None]
        shares += kept[::2].flatten().tolist()
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[2], kept[3])
        torch.testing.assert_close(targets, kept * torch.eye(4) + (1 - kept) * torch.eye(4)[partner])
        if not cutmix:
            share = kept[..., None, None, None]
            torch.testing.assert_close(mixed, share * clips + (1 - share) * clips[partner])
        if not mixup:
            own, other = mixed == clips, mixed == clips[partner]
            assert (own | other).all()
            cut = (clips != clips[partner]) & other  # pixels that the box has certainly changed
            assert cut.any() or kept.min() > 0.9
    assert len(set(shares)) > 10  # each pair has draws of its own; boxes of the same size are possible


def test_cutmix_counts_the_pixels_of_its_box() -> None:
    clips = torch.stack([torch.zeros(3, 2, 12, 20), torch.ones(3, 2, 12, 20)])
    for seed in range(20):
        mixed, targets = mix(
            clips, torch.arange(2), range(2), num_classes=2, mixup=0.0, cutmix=1.0, smoothing=0.0, seed=seed
        )
        assert float(mixed[0].mean()) == pytest.approx(float(targets[0, 1]), abs=1e-6)
        assert (mixed[0] == mixed[0, 0, 0]).all()  # the same box in all frames and channels


def test_a_pair_is_mixed_alike_whatever_else_is_in_the_batch() -> None:
    """So that any split of a step over ranks and parts trains the same clips."""
    settings = {"num_classes": 3, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "seed": 5}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole, targets = mix(CLIPS, LABELS, [6, 7, 8, 9], **settings)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
    half, half_targets = mix(CLIPS[2:], LABELS[2:], [8, 9], **settings)  # type: ignore[arg-type]
    assert torch.equal(half, whole[2:]) and torch.equal(half_targets, targets[2:])
    alone, own = mix(CLIPS[1:], LABELS[1:], [7, 8, 9], **settings)  # type: ignore[arg-type] # its partner failed
    assert torch.equal(alone[0], CLIPS[1]) and own[0].argmax() == LABELS[1] and own[0].max() > 0.9
    assert torch.equal(alone[1:], whole[2:])
    others = [mix(CLIPS, LABELS, [6, 7, 8, 9], **settings | {"seed": seed})[0] for seed in range(6)]  # type: ignore[arg-type]
    assert len({mixed.numpy().tobytes() for mixed in others}) == 6


def test_mix_off_changes_no_clip_and_smooths_the_targets() -> None:
    clips, targets = mix(CLIPS, LABELS, range(4), num_classes=3, mixup=0.0, cutmix=0.0, smoothing=0.3, seed=0)
    assert clips is CLIPS
    torch.testing.assert_close(targets[1], torch.tensor([0.1, 0.1, 0.8]))
