"""Token labels: from the files of label maps to the targets of every length, with and without MixToken."""

from __future__ import annotations

import io
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align

import small_runs as runs
from videoadapt.config.load import Config, make_config
from videoadapt.config.points import Point
from videoadapt.data.clips.augment import Crop, token_swap
from videoadapt.data.clips.datasets import Clip, TrainClips
from videoadapt.data.clips.loader import Batch, train_batches
from videoadapt.data.clips.token_labels import (
    SHAPE,
    LabelMap,
    collate_label_maps,
    label_map_file,
    read_label_map,
    token_targets,
)
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import ConfigError, RunError, VideoError
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.model.timesformer import Heads
from videoadapt.training.losses import Targets, make_targets, point_loss
from videoadapt.training.train import train

CPU = torch.device("cpu")
WHOLE = (0.0, 0.0, 1.0, 1.0)
CLASSES = 12


def random_map(seed: int = 0) -> Tensor:
    """A map with five different classes in each cell, and scores between 0 and 6."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.rand((CLASSES, 18, 18), generator=generator).argsort(0)[:5]
    scores = 6 * torch.rand((5, 18, 18), generator=generator)
    return torch.stack([scores, classes.float()]).half()


def saved(folder: Path, cells: Any) -> Path:
    torch.save(cells, folder / "map.pt")
    return folder / "map.pt"


def targets(cells: Tensor, box: tuple[float, ...], length: int) -> tuple[Tensor, Tensor]:
    label = LabelMap(cells.numpy(), box)  # type: ignore[arg-type]
    whole, patches = token_targets(collate_label_maps([label], CPU), length, CLASSES)
    return whole[0], patches[0]


# Files.


@pytest.mark.parametrize("image", ["train/n01440764/n01440764_18.JPEG", "/data/n01440764/n01440764_18.x.png"])
def test_a_map_lies_in_the_folder_of_its_class_under_the_images_name(image: str) -> None:
    assert label_map_file(Path("maps"), image) == Path("maps/n01440764/n01440764_18.pt")


def test_maps_are_read_unchanged_and_flipped_with_the_clip(tmp_path: Path) -> None:
    cells, box = random_map(), (0.1, 0.2, 0.5, 0.9)
    file = saved(tmp_path, cells)
    plain, flipped = (read_label_map(file, Crop(box, flip), CLASSES) for flip in (False, True))
    assert np.array_equal(plain.cells, cells.numpy())
    assert plain.box == box
    assert np.array_equal(flipped.cells, cells.numpy()[..., ::-1])
    assert flipped.box == pytest.approx((0.5, 0.2, 0.9, 0.9))


FULL = torch.zeros(SHAPE)
BAD: list[tuple[Any, str]] = [
    (torch.zeros(2, 5, 14, 14), r"expected a floating-point tensor of shape \(2, 5, 18, 18\), got \(2, 5, 14, 14\)"),
    (torch.zeros(18, 18), r"got \(18, 18\)"),
    ({"map": FULL}, "got dict"),
    (FULL.int(), r"got \(2, 5, 18, 18\) of torch.int32"),
    (FULL.to_sparse(), "not a plain tensor"),
    (
        torch.stack([FULL[0], FULL[1] + 999]),
        r"names the class 999, but the model has the classes 0 to 11 \(model.num_classes",
    ),
    (torch.stack([FULL[0], FULL[1] - 1]), "names the class -1,"),
    (torch.stack([FULL[0], FULL[1] + 2.7]), "names the class 2.7,"),
    (torch.stack([FULL[0], FULL[1] + 2.99999]), "names the class 2.99999,"),
    (torch.stack([FULL[0], FULL[1] + math.nan]), "names the class nan,"),
    (torch.stack([FULL[0] + math.nan, FULL[1]]), "holds scores that are not finite"),
    (torch.stack([FULL[0] + 1e5, FULL[1]]), "holds scores that are not finite in float16"),
]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("content", "message"), BAD)
def test_other_files_are_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(VideoError, match=f"^label map {saved(tmp_path, content)}: .*{message}"):
        read_label_map(tmp_path / "map.pt", Crop(WHOLE, False), CLASSES)


@pytest.mark.parametrize("content", [None, b"", b"not a tensor at all", zlib.compress(b"x" * 999)])
def test_missing_and_torn_files_are_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "map.pt").write_bytes(content)
    with pytest.raises(VideoError, match=f"^label map {tmp_path / 'map.pt'}: (No such file|torn)"):
        read_label_map(tmp_path / "map.pt", Crop(WHOLE, False), CLASSES)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_gives_a_refusal_or_a_valid_map(tmp_path: Path) -> None:
    """Replaces random bytes of the old format, a bare pickle without a checksum."""
    whole, rng = io.BytesIO(), np.random.default_rng(0)
    torch.save(random_map(), whole, _use_new_zipfile_serialization=False)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(whole.getvalue())
        for offset in rng.integers(0, 500, 3):
            damaged[offset] = rng.integers(256)
        (tmp_path / "map.pt").write_bytes(damaged)
        try:
            cells = read_label_map(tmp_path / "map.pt", Crop(WHOLE, False), CLASSES).cells
        except VideoError:
            refusals += 1
        else:
            assert np.isfinite(cells).all()
    assert refusals > 100


# Targets.


def sparse(cells: Tensor) -> Tensor:
    """The scores of all classes, (classes, 18, 18), filled cell by cell."""
    found = torch.zeros(CLASSES, 18, 18)
    for rank in range(5):
        for y in range(18):
            for x in range(18):
                found[int(cells[1, rank, y, x]), y, x] = cells[0, rank, y, x]
    return found


def test_a_whole_image_at_the_maps_own_grid_has_the_maps_cells() -> None:
    cells = random_map()
    _, patches = targets(cells, WHOLE, 18)
    torch.testing.assert_close(patches, sparse(cells).flatten(1).T.softmax(1))


@pytest.mark.parametrize("length", [14, 10, 7])
@pytest.mark.parametrize("box", [WHOLE, (0.1, 0.3, 0.55, 0.8), (0.7, 0.0, 1.0, 0.25)])
def test_targets_equal_those_of_lvvit(length: int, box: tuple[float, ...]) -> None:
    """LV-ViT's code shifts the boxes by half a cell itself, before the older `aligned=False` of ROI align."""
    cells = random_map()
    boxes = [torch.tensor([box]) * 18 - 0.5]
    whole, patches = targets(cells, box, length)
    expected = roi_align(sparse(cells)[None], boxes, (length, length)).flatten(2)[0].T.softmax(1)
    torch.testing.assert_close(patches, expected)
    torch.testing.assert_close(whole, roi_align(sparse(cells)[None], boxes, (1, 1)).flatten().softmax(0))
    assert patches.sum(1).allclose(torch.ones(length**2))


def test_patches_are_labelled_where_they_lie_in_the_image() -> None:
    """The map has class 3 on the left, and class 8 at the bottom right."""
    cells = torch.zeros(SHAPE)
    cells[1] = torch.arange(5)[:, None, None]
    cells[0, 3, :, :9] = 9.0
    cells[1, 0, 9:, 9:], cells[0, 0, 9:, 9:] = 8.0, 9.0
    _, patches = targets(cells, WHOLE, 6)
    found = patches.argmax(1).view(6, 6)
    assert (found[:, :3] == 3).all()
    assert (found[3:, 3:] == 8).all()
    assert (targets(cells, (0.5, 0.5, 1.0, 1.0), 4)[1][5:].argmax(1) == 8).all()
    assert targets(cells, (0.0, 0.1, 0.45, 0.6), 4)[0].argmax() == 3


def test_a_flipped_clip_has_the_mirrored_targets(tmp_path: Path) -> None:
    file, box = saved(tmp_path, random_map()), (0.1, 0.2, 0.5, 0.9)
    plain, flipped = (
        token_targets(collate_label_maps([read_label_map(file, Crop(box, flip), CLASSES)], CPU), 7, CLASSES)
        for flip in (False, True)
    )
    torch.testing.assert_close(flipped[0], plain[0])
    torch.testing.assert_close(flipped[1].view(7, 7, -1), plain[1].view(7, 7, -1).flip(1))


# Mixing tokens.


def test_partners_swap_the_same_region_at_all_lengths() -> None:
    fractions: dict[int, list[float]] = {}
    for length in (56, 14, 7):
        partners, swapped = token_swap(range(20), length, size=224, alpha=1.0, seed=3)
        assert partners.tolist() == [i ^ 1 for i in range(20)]
        assert torch.equal(swapped[::2], swapped[1::2])
        fractions[length] = swapped.float().mean(1)[::2].tolist()
        for one in swapped.view(20, length, length):  # a box
            rows, columns = one.any(1), one.any(0)
            assert torch.equal(one, rows[:, None] & columns)
    assert len({round(fraction, 3) for fraction in fractions[56]}) == 10
    assert fractions[14] == pytest.approx(fractions[56], abs=0.08)
    assert fractions[7] == pytest.approx(fractions[56], abs=0.15)


def test_swapped_patches_depend_only_on_seed_and_position() -> None:
    settings: dict[str, Any] = {"size": 64, "alpha": 1.0}
    _, swapped = token_swap([4, 5, 6, 7], 8, seed=1, **settings)
    partners, half = token_swap([6, 7], 8, seed=1, **settings)
    assert partners.tolist() == [1, 0]
    assert torch.equal(half, swapped[2:])
    partners, alone = token_swap([5, 6, 7], 8, seed=1, **settings)  # the partner of 5 failed
    assert partners.tolist() == [0, 2, 1]
    assert not alone[0].any()
    assert len({token_swap([0, 1], 8, seed=seed, **settings)[1].numpy().tobytes() for seed in range(6)}) > 3


def config_of(**sections: dict[str, Any]) -> Config:
    model = {"size": 64, "patch": 8, "points": ["8", "4"], "num_classes": CLASSES, "width": 32, "heads": 2}
    sections["model"] = model | {"dense_head": 0.25, "num_frames": 1} | sections.get("model", {})
    return make_config({"assign": {"frames": 1}} | sections)


def at(point: str, truth: Tensor, config: Config, maps: bool = False) -> Targets:
    tokens = (
        collate_label_maps([LabelMap(random_map(i).numpy(), WHOLE) for i in range(len(truth))], CPU) if maps else None
    )
    labels = truth.argmax(1)
    batch = Batch(torch.empty(0), labels, labels, list(range(len(truth))), [], tokens)
    return make_targets(Point.parse(point), truth, batch, config, seed=5)


TRUTH = torch.eye(CLASSES)[[2, 7, 7, 11]]


def test_without_maps_patches_have_the_target_of_their_clip() -> None:
    found = at("4", TRUTH, config_of())
    assert torch.equal(found.cls, TRUTH)
    assert found.swap is None
    assert found.dense is not None
    assert torch.equal(found.dense, TRUTH[:, None].expand(4, 16, CLASSES))
    assert at("4", TRUTH, config_of(model={"dense_head": None})).dense is None


def test_every_frame_of_a_video_has_the_same_targets() -> None:
    config = config_of(model={"num_frames": 3}, data={"mix_token": 1.0})
    dense = at("4", TRUTH, config).dense
    assert dense is not None
    assert dense.shape == (4, 48, CLASSES)
    assert torch.equal(dense[:, :16], dense[:, 16:32])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_the_class_target_combines_label_and_map(fraction: float) -> None:
    config = config_of(data={"token_labels": "maps"}, loss={"map_share": fraction, "label_smoothing": 0.1})
    truth = TRUTH * 0.9 + 0.1 / CLASSES
    whole, patches = token_targets(
        collate_label_maps([LabelMap(random_map(i).numpy(), WHOLE) for i in range(4)], CPU), 4, CLASSES
    )
    found = at("4", truth, config, maps=True)
    torch.testing.assert_close(found.cls, (1 - fraction) * truth + fraction * (0.9 * whole + 0.1 / CLASSES))
    torch.testing.assert_close(found.dense, 0.9 * patches + 0.1 / CLASSES)
    assert found.cls.sum(1).allclose(torch.ones(4))


@pytest.mark.parametrize("maps", [False, True])
def test_mixed_tokens_have_mixed_targets(maps: bool) -> None:
    data = {"mix_token": 1.0} | ({"token_labels": "maps"} if maps else {})
    mixed, plain = (at("8", TRUTH, config_of(data=d), maps=maps) for d in (data, {**data, "mix_token": 0.0}))
    assert mixed.swap is not None
    assert mixed.dense is not None
    assert plain.dense is not None
    partners, swapped = mixed.swap
    for clip in range(4):
        fraction = float(swapped[clip].float().mean())
        expected = (1 - fraction) * plain.cls[clip] + fraction * plain.cls[partners[clip]]
        torch.testing.assert_close(mixed.cls[clip], expected)
        for patch in range(64):
            origin = partners[clip] if swapped[clip, patch] else clip
            assert torch.equal(mixed.dense[clip, patch], plain.dense[origin, patch])


def test_points_that_drop_tokens_have_no_patch_targets() -> None:
    found = at("8@0.5", TRUTH, config_of(data={"mix_token": 1.0}))
    assert found.dense is None
    assert found.swap is not None


def supervit_loss(
    cls: Tensor, dense: Tensor | None, labels: Tensor, patches: Tensor, swap: tuple[Tensor, Tensor]
) -> Tensor:
    """The loss of SuperViT-LV-ViT's code at keep 1: the mean over a batch, of `dense_weight` 1.0.

    Args:
        cls: Logits of the class head, (B, classes).
        dense: Logits of the head on patches, (B, N, classes); None at all lengths but the longest.
        labels: Targets of the unmixed clips, (B, classes).
        patches: Targets of the unmixed patches, (B, N, classes).
        swap: Partner of each clip, and which patches come from it.
    """
    partners, swapped = swap
    lam = 1 - swapped.float().mean(1, keepdim=True)
    mixed = lam * labels + (1 - lam) * labels[partners]
    loss = torch.stack([-(mixed[i] * cls[i].log_softmax(0)).sum() for i in range(len(cls))]).mean()
    if dense is None:
        return loss
    # Their code swaps the outputs back to the clip that each patch comes from; swapping is its own inverse.
    back = torch.where(swapped[..., None], dense[partners], dense)
    each = [-(patches[i, n] * back[i, n].log_softmax(0)).sum() for i in range(len(back)) for n in range(back.shape[1])]
    return loss + 1.0 * torch.stack(each).mean()


def test_the_losses_of_supervit_on_lvvit_are_those_of_its_code() -> None:
    data = {"mix_token": 1.0, "token_labels": "maps"}
    loss = {"lam": 0.0, "dense_weight": 1.0, "dense_lengths": "longest"}
    config = config_of(data=data, loss=loss)
    unmixed = config_of(data=data | {"mix_token": 0.0})  # with a loss at all lengths, as LV-ViT's
    generator = torch.Generator().manual_seed(1)
    for point, patches in (("8", 64), ("4", 16)):
        cls = torch.randn(4, CLASSES, generator=generator)
        dense = torch.randn(4, patches, CLASSES, generator=generator)
        found, plain = (at(point, TRUTH, c, maps=True) for c in (config, unmixed))
        assert found.swap is not None
        assert plain.dense is not None
        longest = point == "8"
        ours = point_loss(Heads(cls, None, dense, 0.25), found.cls, None, config.loss, dense=found.dense)
        expected = supervit_loss(cls, dense if longest else None, plain.cls, plain.dense, found.swap)
        torch.testing.assert_close(ours.mean(), expected)
        assert found.swap[1].any()


def test_only_the_longest_length_may_have_a_dense_loss() -> None:
    assert at("4", TRUTH, config_of(loss={"dense_lengths": "longest"})).dense is None
    assert at("8", TRUTH, config_of(loss={"dense_lengths": "longest"})).dense is not None
    assert at("8@0.5", TRUTH, config_of(loss={"dense_lengths": "longest"})).dense is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": {"token_labels": "maps", "mixup": 0.8}}, "data.mixup, data.cutmix: they mix pixels"),
    ({"data": {"mix_token": 1.0, "cutmix": 1.0}}, "data.mixup, data.cutmix: they mix pixels"),
    ({"data": {"token_labels": "maps"}, "model": {"dense_head": None}}, "data.token_labels: needs a head on patches"),
    ({"data": {"token_labels": "maps"}, "model": {"num_frames": 2}}, "data.token_labels: needs .* model.num_frames=1"),
    ({"data": {"token_labels": "maps"}, "model": {"num_classes": 2049}}, "token_labels: .* model.num_classes is 2049;"),
    ({"data": {"mix_token": 1.0}, "train": {"batch": 9}}, "an odd number"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_contradictory_settings_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**sections)


# Training.


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes (bright in the lower half, bright in the upper half), and their label maps."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for number, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            (folder / "maps" / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (44, 52, 3))
                pixels[slice(0, 22) if number else slice(22, 44)] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{name}_{i}.jpeg")
                cells = torch.zeros(SHAPE)
                cells[0, 0] = 8.0
                cells[1] = torch.arange(5).add(number).remainder(CLASSES)[:, None, None]
                torch.save(cells.half(), folder / "maps" / name / f"{name}_{i}.pt")
    return folder


def image_run(images: Path, run: Path, **sections: dict[str, Any]) -> Config:
    nested = runs.values(images, run)
    nested["data"] |= {"root": None, "classes": str(images / "classes.txt"), "holdout": 0.0, "short_side": None}
    nested["data"] |= {split: {"annotations": str(images / split)} for split in ("train", "val")}
    nested["data"] |= {"token_labels": str(images / "maps"), "mix_token": 1.0, "crop_area": [0.3, 1.0]}
    nested["data"] |= {"interpolation": "bicubic", "erase": 0.25, "rand_augment": "rand-m9-mstd0.5-inc1"}
    nested["model"] |= {"num_frames": 1, "stride_frames": 1, "temporal": False, "size": 32, "points": ["4", "2"]}
    nested["model"] |= {"embed": "stem", "qkv_bias": False, "residual_scale": 0.5, "dense_head": 0.25}
    nested["model"] |= {"num_classes": CLASSES, "time_init_std": 0.0, "norm_eps": 1e-5, "mlp_ratio": 3.0}
    nested["label"], nested["assign"]["frames"] = {"source": "train"}, 1
    nested["evaluate"] |= {"crop_pct": 0.9}
    nested["train"] |= {"epochs": 1}
    (images / "classes.txt").write_text("\n".join([*"ab", *(f"other {i}" for i in range(CLASSES - 2))]))
    for name, values in sections.items():
        nested[name] |= values
    return make_config(nested)


@pytest.mark.parametrize("workers", [0, 2])
def test_maps_travel_with_their_images(images: Path, tmp_path: Path, workers: int) -> None:
    config = image_run(images, tmp_path / "run", data={"workers": workers})
    manifest = load_or_index(config)
    [batch] = next(train_batches(manifest, config))
    assert batch.tokens is not None
    assert batch.tokens.maps.shape == (8, *SHAPE)
    assert torch.equal(batch.tokens.maps[:, 1, 0, 0, 0].long(), batch.labels)
    clip = TrainClips(manifest, config)[0, int(batch.videos[3])]
    assert isinstance(clip, Clip)
    assert clip.tokens is not None
    assert batch.tokens.boxes[3].tolist() == pytest.approx(clip.tokens.box)
    assert torch.equal(batch.clips[3], clip.frames)


@pytest.mark.slow
def test_an_lvvit_learns_from_label_maps(images: Path, tmp_path: Path) -> None:
    config = image_run(images, tmp_path / "run", train={"epochs": 20, "ema": None, "lr": 0.004})
    summary = train(config)
    assert summary.skipped == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert all(summary.points[point].loss < 0.8 * first[f"loss/{point}"] for point in ("4", "2"))
    policies = evaluate(config).to_json()["policies"]
    assert policies["fixed:4"]["top1"] >= 0.9
    assert policies["fixed:2"]["top1"] >= 0.9


def test_an_image_without_a_valid_map_is_skipped_and_listed(images: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    for name in "ab":
        (maps / name).mkdir(parents=True)
        for file in (images / "maps" / name).iterdir():
            (maps / name / file.name).symlink_to(file)
    (maps / "a" / "a_3.pt").unlink()
    torch.save(torch.zeros(3), maps / "b" / "b_5.pt.new")
    (maps / "b" / "b_5.pt.new").replace(maps / "b" / "b_5.pt")
    torch.save(torch.full(SHAPE, math.nan), maps / "a" / "a_7.pt.new")
    (maps / "a" / "a_7.pt.new").replace(maps / "a" / "a_7.pt")
    config = image_run(images, tmp_path / "run", data={"token_labels": str(maps)})
    assert train(config).skipped == 3
    causes = [json.loads(line)["cause"] for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(causes) == [
        f"label map {maps / 'a' / 'a_3.pt'}: No such file or directory",
        f"label map {maps / 'a' / 'a_7.pt'}: holds scores that are not finite in float16 (the largest is 65504)",
        f"label map {maps / 'b' / 'b_5.pt'}: expected a floating-point tensor of shape {SHAPE}, "
        "got (3,) of torch.float32",
    ]


def test_a_folder_without_the_maps_is_refused_before_the_first_step(images: Path, tmp_path: Path) -> None:
    config = image_run(images, tmp_path / "run", data={"token_labels": str(tmp_path / "nowhere")})
    with pytest.raises(
        RunError, match=rf"can read no video .*label map {tmp_path / 'nowhere' / 'a'}/a_\d+.pt: No such"
    ):
        train(config)
