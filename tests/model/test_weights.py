"""Pretrained weights: parity with independent implementations, the report on every tensor, and refusals."""

from __future__ import annotations

import copy
import json
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import Mock

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from conftest import need
from videoadapt.config.load import make_config
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import CheckpointError, UserError
from videoadapt.model.embed import resize_frames
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.initial import build_model
from videoadapt.model.weights.load import load_weights

M = TypeVar("M", bound=nn.Module)
TINY: dict[str, Any] = {"width": 32, "depth": 2, "heads": 4, "patch": 4, "size": 56, "num_frames": 3, "num_classes": 5}
IMAGE: dict[str, Any] = {"num_frames": 1, "temporal": False, "points": ["14"]}


def make(**changes: Any) -> Any:  # Any: tests use attributes of modules that torch does not type
    return TimeSformer(ModelConfig(**(TINY | changes))).eval()


def randomised(module: M, std: float = 0.05) -> M:
    """The module with noise on every tensor: a tensor in the wrong place then changes the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()


def tiny_vit(**changes: Any) -> Any:
    values: dict[str, Any] = {"img_size": 56, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return randomised(VisionTransformer(**(values | {"num_classes": 5} | changes)))


def clip_of(model: TimeSformer, batch: int = 1) -> Tensor:
    config = model.config
    shape = (batch, 3, config.num_frames, config.size, config.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal within the tolerance, and not trivially so."""
    assert actual.shape == expected.shape
    assert expected.std() > 100 * tolerance
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def statuses(model: TimeSformer, source: Any) -> dict[str, str]:
    return {row.name or row.source: row.status for row in load_weights(model, source).rows}


# Parity with independent implementations.


def hugging_face(**changes: Any) -> Any:
    transformers: Any = need("transformers", "the independent TimeSformer")
    return randomised(transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**changes)))


TINY_HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "patch_size": 4,
    "image_size": 56,
    "num_frames": 3,
    "num_labels": 5,
}


@torch.no_grad()
def test_timesformer_b_equals_hugging_faces() -> None:
    """At full width and frame size. All blocks are alike, so two are enough."""
    torch.manual_seed(0)
    theirs = hugging_face(num_hidden_layers=2, num_frames=8, image_size=224, patch_size=16, num_labels=400)
    ours = TimeSformer(ModelConfig(points=("14",), depth=2)).eval()
    report = load_weights(ours, theirs.state_dict())
    assert report.counts == {"loaded": len(ours.state_dict())}
    clip = clip_of(ours)
    assert_near(ours(clip, "14"), theirs(clip.transpose(1, 2)).logits)


def test_a_built_model_begins_as_the_training_does(tmp_path: Path) -> None:
    source = randomised(make(points=("4", "2")))
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    values = {"model": source.config.model_dump(), "train": {"init": str(tmp_path / "weights.safetensors")}}
    built = build_model(make_config(values))
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), source.parameters(), strict=True))
    other = build_model(make_config(values | {"train": {}}))
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(other.get_parameter(name), source.get_parameter(name))


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
def test_hugging_face_folder(tmp_path: Path, safe: bool) -> None:
    theirs, ours = hugging_face(**TINY_HF), make(points=["14"])
    theirs.save_pretrained(tmp_path)
    if not safe:  # the file of older versions
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    load_weights(ours, tmp_path)
    clip = clip_of(ours, batch=2)
    assert_near(ours(clip, "14"), theirs(clip.transpose(1, 2)).logits)


@torch.no_grad()
def test_nearest_is_how_timesformer_resamples() -> None:
    """For a clip of another size, TimeSformer takes positions and times of the nearest neighbour."""
    theirs, ours = hugging_face(**TINY_HF), make(points=["14"], num_frames=6)
    small = hugging_face(**(TINY_HF | {"image_size": 28, "num_frames": 2}))
    load_weights(ours, small.state_dict(), resample="nearest")
    grid, times = small.timesformer.embeddings.position_embeddings[:, 1:], small.timesformer.embeddings.time_embeddings
    assert theirs.timesformer.embeddings.position_embeddings.shape[1] == 1 + 14 * 14
    square = F.interpolate(grid.transpose(1, 2).unflatten(2, (7, 7)), size=14, mode="nearest")
    torch.testing.assert_close(ours.pos_embed.grid["14"], square.flatten(2)[0].T)
    torch.testing.assert_close(ours.time_embed, times[0].repeat_interleave(3, dim=0))


@torch.no_grad()
def test_nearest_flat_is_how_timesformer_loads_weights_of_another_size() -> None:
    """`load_pretrained` of TimeSformer resamples the flattened grid: new position i is old position i * 49 / 196."""
    small, ours = tiny_vit(img_size=28), make(points=["14"])
    load_weights(ours, small.state_dict(), resample="nearest_flat")
    expected = small.pos_embed[0, 1:][[i * 49 // 196 for i in range(196)]]
    assert torch.equal(ours.pos_embed.grid["14"], expected)
    bicubic = make(points=["14"])
    load_weights(bicubic, small.state_dict())
    assert not torch.allclose(bicubic.pos_embed.grid["14"], expected, atol=0.01)


def training_file(path: Path, layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Writes a file with last weights and their moving average, as a training code does; returns both."""
    last = tiny_vit().state_dict()
    ema = {name: tensor + 1.0 for name, tensor in last.items()}
    contents: dict[str, dict[str, Any]] = {
        "timm": {"arch": "vit", "epoch": 3, "state_dict": last, "state_dict_ema": ema},
        "deit": {"model": last, "model_ema": ema, "optimizer": {"state": {}}, "scaler": {"scale": 2.0}},
    }
    torch.save(contents[layout] | {"args": Namespace(lr=1e-3, model="vit", betas=[0.9, 0.999], ema=None)}, path)
    return last, ema


@pytest.mark.parametrize("layout", ["timm", "deit"])
def test_the_moving_average_of_a_file_is_loaded_and_named_unless_the_last_weights_are_wanted(
    tmp_path: Path, layout: str
) -> None:
    last, ema = training_file(tmp_path / "a.pth", layout)
    key = {"timm": "state_dict_ema", "deit": "model_ema"}[layout]
    model = make()
    report = load_weights(model, tmp_path / "a.pth")
    assert torch.equal(model.head.weight, ema["head.weight"])
    assert f"a.pth, the moving average {key}, not the last weights" in str(report)
    report = load_weights(model, tmp_path / "a.pth", which="last")
    assert torch.equal(model.head.weight, last["head.weight"])
    assert f"a.pth, the last weights, not the moving average {key}" in str(report)


@pytest.mark.parametrize("ema", [{}, {"model_ema": None}, {"model_ema": {}}])
def test_a_file_without_a_moving_average_has_only_its_last_weights(tmp_path: Path, ema: dict[str, Any]) -> None:
    last = tiny_vit().state_dict()
    torch.save({"model": last} | ema, tmp_path / "a.pth")
    for which in ("ema", "last"):
        model = make()
        report = load_weights(model, tmp_path / "a.pth", which=which)
        assert torch.equal(model.head.weight, last["head.weight"])
        assert str(report).startswith("a.pth (ViT)")


def test_our_checkpoints_hold_both_weights(tmp_path: Path) -> None:
    model, other = make(), make()
    last = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(
        last | {f"ema/{name}": tensor + 1.0 for name, tensor in model.state_dict().items()}, tmp_path / "a.safetensors"
    )
    load_weights(other, tmp_path / "a.safetensors")
    assert torch.equal(other.head.weight, model.head.weight + 1.0)
    load_weights(other, tmp_path / "a.safetensors", which="last")
    assert torch.equal(other.head.weight, model.head.weight)


@torch.no_grad()
def test_deit_equals_timms() -> None:
    theirs: Any = randomised(timm.create_model("deit_small_patch16_224", pretrained=False, depth=3))
    ours = TimeSformer(ModelConfig(width=384, heads=6, depth=3, num_classes=1000, **IMAGE)).eval()
    load_weights(ours, theirs.state_dict())
    clip = clip_of(ours, batch=2)
    assert_near(ours(clip, "14"), theirs(clip[:, :, 0]))


@torch.no_grad()
def test_distilled_deit_equals_timms_for_students_and_plain_deit_for_the_costliest_point() -> None:
    theirs: Any = randomised(timm.create_model("deit_small_distilled_patch16_224", pretrained=False, depth=3))
    config = ModelConfig(
        width=384,
        heads=6,
        depth=3,
        num_classes=1000,
        distill_token=True,
        size=256,
        **(IMAGE | {"points": ["16", "14"]}),
    )
    ours = TimeSformer(config).eval()
    load_weights(ours, theirs.state_dict())
    clip = clip_of(ours, batch=2)
    assert_near(ours(clip, "14"), theirs(resize_frames(clip[:, :, 0], 224)))

    state = dict(theirs.state_dict())
    table = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], dim=1)
    state["pos_embed"] = resample_abs_pos_embed(table, [16, 16])
    plain = timm.create_model("deit_small_patch16_224", pretrained=False, depth=3, img_size=256).eval()
    plain.load_state_dict({name: tensor for name, tensor in state.items() if "dist" not in name})
    assert_near(ours(clip, "16"), plain(clip[:, :, 0]))


def test_distillation_token_and_head_are_unused_in_a_model_without_them() -> None:
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, depth=1)
    ours = TimeSformer(ModelConfig(width=192, heads=3, depth=1, num_classes=1000, **IMAGE))
    rows = {row.source: row for row in load_weights(ours, theirs.state_dict()).rows if row.status == "unused"}
    assert set(rows) == {"dist_token", "head_dist.weight", "head_dist.bias", "pos_embed[1]"}
    assert {row.detail for row in rows.values()} == {"the model has no distillation token"}


@torch.no_grad()
def test_dinov2_equals_timms() -> None:
    theirs: Any = timm.create_model("vit_small_patch14_dinov2", pretrained=False, dynamic_img_size=True, depth=4)
    randomised(theirs, std=0.1)
    sizes: dict[str, Any] = {"width": 384, "heads": 6, "depth": 4, "patch": 14, "size": 196, "layer_scale": 1e-5}
    ours = TimeSformer(ModelConfig(**sizes, **IMAGE)).eval()
    load_weights(ours, theirs.state_dict())
    clip = clip_of(ours, batch=2)
    expected = resample_abs_pos_embed(theirs.pos_embed, [14, 14])[0]
    torch.testing.assert_close(torch.cat([ours.pos_embed.cls["14"], ours.pos_embed.grid["14"]]), expected)
    nn.init.normal_(ours.head.weight, std=0.05)
    assert_near(ours(clip, "14"), ours.head(theirs.forward_features(clip[:, :, 0])[:, 0]))


@torch.no_grad()
def test_a_class_token_without_position_is_loaded_as_in_deit_3() -> None:
    theirs, ours = tiny_vit(no_embed_class=True), make(**IMAGE)
    load_weights(ours, theirs.state_dict())
    clip = clip_of(ours, batch=2)
    assert_near(ours(clip, "14"), theirs(clip[:, :, 0]))


RELEASED = """
    model.cls_token model.pos_embed model.time_embed model.patch_embed.proj.weight model.norm.weight model.head.bias
    model.blocks.1.temporal_norm1.bias model.blocks.0.temporal_attn.qkv.weight model.blocks.0.temporal_attn.proj.bias
    model.blocks.1.temporal_fc.bias model.blocks.0.norm1.weight model.blocks.0.attn.qkv.bias
    model.blocks.1.mlp.fc1.weight
""".split()


def released_names(model: TimeSformer) -> dict[str, Tensor]:
    """The model's weights as facebookresearch/TimeSformer lays them out."""
    ours, theirs = model.state_dict(), {}
    for name, tensor in ours.items():
        new = name.replace("temporal_norm.", "temporal_norm1.").replace("proj.14.", "proj.").removesuffix(".14")
        theirs[f"model.{new}"] = tensor
    grid, cls = theirs.pop("model.pos_embed.grid"), theirs.pop("model.pos_embed.cls")
    theirs["model.pos_embed"] = torch.cat([cls, grid])[None]
    theirs["model.time_embed"] = theirs["model.time_embed"][None]
    return theirs


@torch.no_grad()
def test_released_timesformer_file(tmp_path: Path) -> None:
    source, target = randomised(make(points=["14"])), make(points=["14"])
    state = released_names(source)
    assert set(RELEASED) <= set(state)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9).state_dict()
    content = {"epoch": 15, "model_state": state, "optimizer_state": optimizer, "cfg": "TRAIN:\n  ENABLE: true\n"}
    torch.save(content, tmp_path / "TimeSformer_divST_8x32_224_K400.pyth")
    report = load_weights(target, str(tmp_path / "TimeSformer_divST_8x32_224_K400.pyth"))
    assert report.counts == {"loaded": len(target.state_dict())}
    clip = clip_of(target, batch=2)
    assert torch.equal(target(clip, "14"), source(clip, "14"))


def test_real_dinov2_file(shared: Path) -> None:
    sizes: dict[str, Any] = {"width": 384, "heads": 6, "depth": 12, "patch": 14, "size": 196, "layer_scale": 1e-5}
    model = TimeSformer(ModelConfig(**sizes, points=("14", "10", "7"))).eval()
    report = load_weights(model, shared / "weights" / "vit_small_patch14_dinov2.safetensors")
    assert report.filled == 1.0
    assert report.counts["resampled"] == 3  # a grid per length
    assert "unused" not in report.counts
    assert {row.name.split(".")[0] for row in report.rows if row.status == "new"} == {"blocks", "time_embed", "head"}
    assert all("temporal_fc" in row.name for row in report.rows if row.status == "new" and "blocks" in row.name)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    text = str(report)
    assert "100.0% of the attention and MLP weights" in text and "pos_embed.grid (37 x 37 to 10 x 10)" in text
    assert len(text.splitlines()) < 15
    with torch.no_grad():
        logits = {point: model(clip_of(model), point) for point in model.points}
    assert all(logit.isfinite().all() for logit in logits.values())


# From images to video.


@torch.no_grad()
def test_still_video_gives_the_image_models_logits_until_time_is_learned() -> None:
    theirs = tiny_vit()
    ours = make()
    load_weights(ours, theirs.state_dict())
    image = torch.randn(2, 3, 56, 56)
    still = image[:, :, None].expand(-1, -1, 3, -1, -1)
    assert_near(ours(still, "14"), theirs(image))


def test_temporal_weights_start_as_copies_of_the_spatial_ones() -> None:
    theirs, ours = tiny_vit(init_values=0.1), make(layer_scale=1e-5)
    found = statuses(ours, theirs.state_dict())
    state = ours.state_dict()
    for i in range(2):
        block = f"blocks.{i}."
        for temporal, spatial in (
            ("temporal_attn.qkv.weight", "attn.qkv.weight"),
            ("temporal_scale.gamma", "ls1.gamma"),
        ):
            assert found[block + temporal] == "copied"
            assert torch.equal(state[block + temporal], theirs.state_dict()[block + spatial])
        for length in ("14", "10", "7"):
            assert torch.equal(
                state[f"{block}temporal_norm.weight.{length}"], theirs.state_dict()[block + "norm1.weight"]
            )
        assert found[f"{block}temporal_fc.weight"] == "new"
        assert not state[f"{block}temporal_fc.weight"].any() and not state[f"{block}temporal_fc.bias"].any()


def test_an_image_model_leaves_temporal_weights_unused() -> None:
    rows = load_weights(make(**IMAGE), released_names(randomised(make(points=["14"])))).rows
    unused = {row.source: row.detail for row in rows if row.status == "unused"}
    assert set(unused.values()) == {"the model has no temporal attention"}
    assert {"model.time_embed", "model.blocks.1.temporal_fc.bias", "model.blocks.0.temporal_norm1.weight"} <= set(
        unused
    )


# From one length, patch size or clip length to others.


def test_each_length_starts_from_the_length_of_the_source() -> None:
    theirs, ours = tiny_vit(), make()
    found = statuses(ours, theirs.state_dict())
    table = theirs.pos_embed.detach()
    for length in (14, 10, 7):
        key = str(length)
        assert torch.equal(ours.norm.weight[key], theirs.norm.weight)
        assert torch.equal(ours.patch_embed.proj[key].weight, theirs.patch_embed.proj.weight)
        torch.testing.assert_close(ours.pos_embed.grid[key], resample_abs_pos_embed(table, [length, length])[0, 1:])
        assert torch.equal(ours.pos_embed.cls[key], table[0, :1])
        assert found[f"norm.weight.{key}"] == found[f"patch_embed.proj.{key}.weight"] == "copied to each length"
    assert [found[f"pos_embed.grid.{key}"] for key in ("14", "10", "7")] == ["copied to each length"] + 2 * [
        "resampled"
    ]
    assert found["cls_token"] == found["blocks.1.attn.qkv.weight"] == "loaded"


def test_a_resized_kernel_gives_a_resized_patch_the_same_token() -> None:
    """FlexiViT, section 3.4."""
    theirs, ours = tiny_vit(), make(embed="kernel", **(IMAGE | {"points": ["14", "7"]}))
    found = statuses(ours, theirs.state_dict())
    assert found["patch_embed.proj.7.weight"] == "resampled"
    patch = torch.randn(6, 3, 4, 4)
    large = F.interpolate(patch, size=(8, 8), mode="bicubic", antialias=True)
    actual = ours.patch_embed.proj["7"](large[:, :, None], 8)[:, 0, 0]  # clips of one frame, one patch
    torch.testing.assert_close(actual, theirs.patch_embed.proj(patch)[:, :, 0, 0], atol=1e-4, rtol=0)


def test_patches_of_another_size_are_resampled() -> None:
    theirs, ours = tiny_vit(patch_size=7), make()
    assert statuses(ours, theirs.state_dict())["patch_embed.proj.10.weight"] == "resampled"
    expected = resample_patch_embed(theirs.patch_embed.proj.weight.detach(), [4, 4])
    torch.testing.assert_close(ours.patch_embed.proj["10"].weight.detach(), expected)


def test_time_embedding_of_another_clip_length_is_interpolated() -> None:
    source, ours = randomised(make(points=["14"], num_frames=4)), make(points=["14"], num_frames=8)
    ramp = torch.arange(4.0)[:, None].expand(4, 32)
    state = released_names(source) | {"model.time_embed": ramp[None]}
    assert statuses(ours, state)["time_embed"] == "resampled"
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])
    torch.testing.assert_close(ours.time_embed.detach(), expected[:, None].expand(8, 32))


@torch.no_grad()
def test_shared_parameters_are_filled() -> None:
    theirs, ours = tiny_vit(), make(share_norm=True, share_patch=True, share_pos=True)
    load_weights(ours, theirs.state_dict())
    image = torch.randn(2, 3, 56, 56)
    assert_near(ours(image[:, :, None].expand(-1, -1, 3, -1, -1), "14"), theirs(image))
    assert torch.equal(ours.blocks[1].norm2.bias["shared"], theirs.blocks[1].norm2.bias)


def test_a_stem_leaves_patch_weights_unused() -> None:
    rows = load_weights(make(embed="stem"), tiny_vit().state_dict()).rows
    unused = {row.source: row.detail for row in rows if row.status == "unused"}
    assert unused == dict.fromkeys(
        ("patch_embed.proj.weight", "patch_embed.proj.bias"), "the model has a convolutional stem"
    )
    assert "new" == next(row.status for row in rows if row.name == "patch_embed.proj.14.conv1.weight")


# Heads, precision, the rest.


def test_head_of_another_class_count_stays_new() -> None:
    ours = make(num_classes=7)
    before = snapshot(ours.head)
    rows = load_weights(ours, tiny_vit().state_dict()).rows
    details = {(row.name or row.source, row.status): row.detail for row in rows if "head" in row.name + row.source}
    reason = "the file has 5 classes, the model 7"
    assert details == {(f"head.{kind}", status): reason for kind in ("weight", "bias") for status in ("new", "unused")}
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.head.state_dict().items())


def test_half_precision_is_converted_to_the_models_dtype() -> None:
    theirs, ours = tiny_vit(), make()
    load_weights(ours, {name: tensor.half() for name, tensor in theirs.state_dict().items()})
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    assert torch.equal(ours.blocks[0].mlp.fc1.weight, theirs.blocks[0].mlp.fc1.weight.half().float())


def test_a_tensor_for_pretraining_is_unused() -> None:
    rows = load_weights(make(), tiny_vit().state_dict() | {"mask_token": torch.zeros(1, 32)}).rows
    assert [(row.source, row.detail) for row in rows if row.status == "unused"] == [
        ("mask_token", "serves pretraining only")
    ]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_ignored(prefix: str) -> None:
    theirs = tiny_vit()
    ours = make()
    load_weights(ours, {prefix + name: tensor for name, tensor in theirs.state_dict().items()})
    assert torch.equal(ours.head.weight, theirs.head.weight)


def test_the_report_lists_every_tensor_once() -> None:
    theirs, ours = tiny_vit(), make(num_classes=7)
    report = load_weights(ours, theirs.state_dict() | {"mask_token": torch.zeros(1, 32)})
    assert [row.name for row in report.rows if row.name] == list(ours.state_dict())
    assert sum(report.counts.values()) == len(report.rows)
    sources = {row.source.partition("[")[0] for row in report.rows} - {""}
    assert sources == set(theirs.state_dict()) | {"mask_token"}


# Weights of our own.


@pytest.mark.parametrize(
    "changes",
    [{}, {"share_norm": True, "share_pos": True}, {"embed": "stem"}, {"distill_token": True, "layer_scale": 0.1}],
)
def test_own_weights_come_back_to_the_bit(changes: dict[str, Any]) -> None:
    source, target = randomised(make(**changes)), make(**changes)
    assert load_weights(target, source.state_dict()).counts == {"loaded": len(source.state_dict())}
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("averaged", [True, False])
def test_averaged_weights_of_our_checkpoints_are_preferred(tmp_path: Path, averaged: bool) -> None:
    last, mean = randomised(make(), std=0.1), randomised(make(), std=0.2)
    tensors = {f"model/{name}": tensor for name, tensor in last.state_dict().items()}
    tensors |= {f"optimizer/{name}/momentum": torch.zeros_like(p) for name, p in last.named_parameters()}
    if averaged:
        tensors |= {f"ema/{name}": tensor for name, tensor in mean.state_dict().items()}
    save_file(tensors, tmp_path / "last.safetensors", metadata={"videoadapt": json.dumps({"step": 3})})
    target = make()
    report = load_weights(target, tmp_path / "last.safetensors")
    assert report.counts == {"loaded": len(target.state_dict())}
    expected = (mean if averaged else last).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in target.state_dict().items())


def test_new_lengths_start_from_the_longest() -> None:
    source, target = randomised(make(points=["14", "7"])), make(points=["14", "10", "7"])
    found = statuses(target, source.state_dict())
    assert found["norm.bias.7"] == "loaded" and found["norm.bias.10"] == "copied to each length"
    assert found["pos_embed.grid.10"] == "resampled" and found["pos_embed.grid.7"] == "loaded"
    assert torch.equal(target.norm.bias["10"], source.norm.bias["14"])
    assert torch.equal(target.norm.bias["7"], source.norm.bias["7"])


def test_lengths_that_the_model_lacks_are_unused() -> None:
    rows = load_weights(make(points=["14"]), randomised(make()).state_dict()).rows
    unused = [row for row in rows if row.status == "unused"]
    assert {row.detail for row in unused} == {"a length that the model lacks"}
    assert all(".10" in row.source or ".7" in row.source for row in unused)


# By name.


def test_a_timm_name_loads_timms_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tiny_vit()
    create = Mock(return_value=theirs)
    monkeypatch.setattr(timm, "create_model", create)
    ours = make()
    assert load_weights(ours, "deit_small_patch16_224.fb_in1k").filled == 1.0
    create.assert_called_once_with("deit_small_patch16_224.fb_in1k", pretrained=True)
    assert torch.equal(ours.cls_token, theirs.cls_token)
    with pytest.raises(CheckpointError, match="4 attention heads, the model has 8"):
        load_weights(make(heads=8), "deit_small_patch16_224")


def test_a_timm_name_without_internet_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="deit_tiny_patch16_224: .*download them elsewhere and give the file"):
        load_weights(make(), "deit_tiny_patch16_224")


# Refusals.


def without(state: dict[str, Tensor], text: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if text not in name}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "width": (lambda: tiny_vit(embed_dim=48).state_dict(), "width 48 and 2 blocks, the model 32 and 2"),
    "depth": (lambda: tiny_vit(depth=3).state_dict(), "width 32 and 3 blocks, the model 32 and 2"),
    "mlp": (
        lambda: tiny_vit(mlp_ratio=3.0).state_dict(),
        r"fills only .* blocks.0.mlp.fc1.weight is \(96, 32\) in the file, \(128, 32\) in the model",
    ),
    "hole": (lambda: without(tiny_vit().state_dict(), "blocks.0.mlp"), "blocks.0.mlp.fc1.weight is not in the file"),
    "layer scale": (lambda: tiny_vit(init_values=0.1).state_dict(), "set model.layer_scale=1e-5"),
    "norm before the blocks": (
        lambda: tiny_vit(pre_norm=True).state_dict(),
        "of another architecture: it has norm_pre,",
    ),
    "norm of queries": (lambda: tiny_vit(qk_norm=True).state_dict(), r"it has blocks\.\*\.attn\.q_norm, blocks"),
    "layout": (lambda: timm.create_model("resnet18", pretrained=False).state_dict(), "expected the weights of a ViT"),
    "tensor": (lambda: {"weight": torch.zeros(3, 3)}, "got 1 tensors named weight"),
    "nothing": (dict, "holds no weights"),
    "path": (lambda: "no/such/file.pth", "no/such/file.pth: no such file or folder"),
    "name": (lambda: "vit_enormous", "no model that timm knows"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_sources_leave_the_model_unchanged(source: Any, message: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, source())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_source_without_layer_scale_is_refused() -> None:
    with pytest.raises(CheckpointError, match="set model.layer_scale=null"):
        load_weights(make(layer_scale=0.1), tiny_vit().state_dict())


def test_head_count_of_a_folder_must_be_the_models(tmp_path: Path) -> None:
    hugging_face(**TINY_HF).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="4 attention heads, the model has 2"):
        load_weights(make(heads=2), tmp_path)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "damage", [torn, lambda path: path.write_text("<html>404"), lambda path: path.write_bytes(b"")]
)
def test_damaged_files_are_refused(tmp_path: Path, suffix: str, damage: Any) -> None:
    path = tmp_path / f"vit{suffix}"
    state = {name: tensor.contiguous() for name, tensor in tiny_vit().state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    load_weights(make(), path)
    damage(path)
    with pytest.raises(CheckpointError, match=rf"vit{suffix}: (torn|not a whole safetensors file)"):
        load_weights(make(), path)


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    content = {"model": tiny_vit().state_dict(), "args": Trap(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model.pth: holds Python objects besides tensors \(.*open\)"):
        load_weights(make(), path)
    path.write_bytes(pickle.dumps(content["args"]))
    with pytest.raises(CheckpointError, match="model.pth: "):
        load_weights(make(), path)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_arguments_that_timm_and_deit_store_are_allowed(tmp_path: Path, zipped: bool) -> None:
    state, path = tiny_vit().state_dict(), tmp_path / "model.pth"
    args = Namespace(lr=5e-4, opt_betas=None, data_path="/data", sizes=[224, 192], inner=Namespace(seed=0))
    torch.save({"model": state, "epoch": 299, "args": args}, path, _use_new_zipfile_serialization=zipped)
    model, before = make(), set(torch.serialization.get_safe_globals())
    load_weights(model, path)
    assert torch.equal(model.head.weight, state["head.weight"])
    assert (
        set(torch.serialization.get_safe_globals()) == before
    )  # other readers of this process are as strict as before


class Arguments(Namespace):
    """Not exactly the allowed class."""


@pytest.mark.parametrize("args", [Arguments(lr=1.0), Namespace(folder=Path("/data")), Namespace(run=Mock)])
def test_no_other_class_is_allowed_beside_or_inside_the_arguments(tmp_path: Path, args: Namespace) -> None:
    torch.save({"model": tiny_vit().state_dict(), "args": args}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model.pth: holds Python objects besides tensors"):
        load_weights(make(), tmp_path / "model.pth")


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"...")
    with pytest.raises(CheckpointError, match=r"weights.onnx: expected a file named .safetensors"):
        load_weights(make(), tmp_path / "weights.onnx")
    with pytest.raises(CheckpointError, match="expected model.safetensors or pytorch_model.bin"):
        load_weights(make(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000012.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"of a run, name .*checkpoints/step-00000012\.safetensors"):
        load_weights(make(), tmp_path)


def test_a_grid_that_is_not_square_is_reported() -> None:
    state = copy.copy(tiny_vit().state_dict())
    state["pos_embed"] = torch.randn(1, 1 + 10 * 19, 32)
    rows = load_weights(make(), state).rows
    assert [(row.source, row.detail) for row in rows if row.status == "unused"] == [
        ("pos_embed", "not a square grid of positions")
    ]
