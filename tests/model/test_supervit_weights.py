"""SuperViT's checkpoints of DeiT-S and LV-ViT-S: our logits equal those of a forward pass written from the paper.

The released files are not part of the tests. Files with their names and random weights take their place: of their full
width on the meta device, where shapes count, and a quarter as wide where numbers count.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from videoadapt.config.sections import ModelConfig
from videoadapt.errors import CheckpointError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.facts import weights_facts
from videoadapt.model.weights.load import load_weights

SIZES = (128, 160, 192, 224)
LENGTHS = tuple(size // 16 for size in SIZES)
DROPPING = (3, 6, 9)  # counted from 0
WIDTH, HEADS = 96, 6  # the released width is 384

DEIT_S: dict[str, Any] = {
    "width": WIDTH,
    "depth": 12,
    "heads": HEADS,
    "num_frames": 1,
    "temporal": False,
    "num_classes": 1000,
    "points": [f"{length}{keep}" for length in (14, 12, 10, 8) for keep in ("", "@0.7", "@0.5")],
    "share_norm": True,
    "share_patch": True,
    "align_corners": True,
}
LVVIT_S: dict[str, Any] = DEIT_S | {
    "depth": 16,
    "mlp_ratio": 3.0,
    "embed": "stem",
    "qkv_bias": False,
    "norm_eps": 1e-5,
    "residual_scale": 0.5,
    "dense_head": 0.25,
}


def released_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a released file whose model has this width."""
    lvvit = name == "lvvit_s"
    hidden = (3 if lvvit else 4) * width
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width)}
    shapes |= {f"pos_embed_list.{i}": (1, 1 + length**2, width) for i, length in enumerate(LENGTHS)}
    if lvvit:
        shapes |= {"patch_embed.conv1.weight": (64, 3, 7, 7)}
        shapes |= {f"patch_embed.conv{i}.weight": (64, 64, 3, 3) for i in (2, 3)}
        for i in (1, 2, 3):
            shapes |= {f"patch_embed.bn{i}.{part}": (64,) for part in ("weight", "bias", "running_mean", "running_var")}
    shapes["patch_embed.proj.weight"] = (width, 64, 8, 8) if lvvit else (width, 3, 16, 16)
    shapes["patch_embed.proj.bias"] = (width,)
    for i in range(16 if lvvit else 12):
        block = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes[f"{block}.attn.qkv.weight"] = (3 * width, width)
        if not lvvit:
            shapes[f"{block}.attn.qkv.bias"] = (3 * width,)
        shapes |= {f"{block}.attn.proj.weight": (width, width), f"{block}.attn.proj.bias": (width,)}
        shapes |= {f"{block}.mlp.fc1.weight": (hidden, width), f"{block}.mlp.fc1.bias": (hidden,)}
        shapes |= {f"{block}.mlp.fc2.weight": (width, hidden), f"{block}.mlp.fc2.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    for head in ("head", "aux_head") if lvvit else ("head",):
        shapes |= {f"{head}.weight": (1000, width), f"{head}.bias": (1000,)}
    return shapes


@functools.cache
def released(name: str) -> dict[str, Tensor]:
    """Random weights with the names of a released file."""
    generator = torch.Generator().manual_seed(0)
    return {key: _random(key, shape, generator) for key, shape in released_shapes(name, WIDTH).items()}


def _random(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if key.endswith("running_var"):
        return 0.5 + noise.square()
    if len(shape) > 1 and not key.startswith(("cls_token", "pos_embed")):
        return noise * math.prod(shape[1:]) ** -0.5
    return 1 + 0.1 * noise if "norm" in key and key.endswith("weight") else 0.3 * noise


def supervit(state: dict[str, Tensor], images: Tensor, size: int, keep: float = 1.0) -> Tensor:
    """Logits of images `(B, 3, 224, 224)` resized to `size`, written from the paper and the public code's settings."""
    lvvit = "aux_head.weight" in state
    eps, residual = (1e-5, 0.5) if lvvit else (1e-6, 1.0)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = F.interpolate(images, (size, size), mode="bilinear", align_corners=True)
    if lvvit:
        for i, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), start=1):
            bn = f"patch_embed.bn{i}"
            x = F.conv2d(x, state[f"patch_embed.conv{i}.weight"], stride=stride, padding=padding)
            moments = (state[f"{bn}.running_mean"], state[f"{bn}.running_var"])
            x = F.batch_norm(x, *moments, state[f"{bn}.weight"], state[f"{bn}.bias"]).relu()
    patch = 8 if lvvit else 16
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state[f"pos_embed_list.{SIZES.index(size)}"]
    for i in range(16 if lvvit else 12):
        batch, tokens, _ = x.shape
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        mixed = (attention @ v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + residual * linear(mixed, f"blocks.{i}.attn.proj")
        if keep < 1 and i in DROPPING:
            scores = attention[:, :, 0, 1:].mean(1)  # of the class token to each patch, over heads
            kept = min(tokens - 1, math.ceil(keep * tokens))
            chosen = scores.topk(kept, dim=1).indices[..., None].expand(-1, -1, WIDTH)  # best first
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, chosen)], 1)
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + residual * linear(hidden, f"blocks.{i}.mlp.fc2")
    x = norm(x, "norm")
    logits = linear(x[:, 0], "head")
    return logits + 0.25 * linear(x[:, 1:], "aux_head").amax(1) if lvvit else logits


CONFIGS = {"deit_s": DEIT_S, "lvvit_s": LVVIT_S}


@functools.cache
def loaded(name: str) -> TimeSformer:
    model = TimeSformer(ModelConfig(**CONFIGS[name])).eval()
    load_weights(model, released(name))
    return model


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.7, 0.5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_papers_forward_pass(name: str, size: int, keep: float) -> None:
    model = loaded(name)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    point = f"{size // 16}" if keep == 1 else f"{size // 16}@{keep:g}"
    found, expected = model(images[:, :, None], point), supervit(released(name), images, size, keep)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_dropping_changes_the_papers_forward_pass(name: str) -> None:
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    all_tokens, half = (supervit(released(name), images, 128, keep) for keep in (1.0, 0.5))
    assert (all_tokens - half).abs().max() > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_a_released_file_is_loaded(name: str) -> None:
    with torch.device("meta"):  # shapes of the full width, no numbers
        model = TimeSformer(ModelConfig(**CONFIGS[name] | {"width": 384}))
        state = {key: torch.empty(shape) for key, shape in released_shapes(name, 384).items()}
    report = load_weights(model, state)
    assert "SuperViT" in report.source
    counters = {row.name for row in report.rows if row.status == "new"}
    assert all(counter.endswith("num_batches_tracked") for counter in counters)
    assert report.counts["loaded"] == len(report.rows) - len(counters)


def test_parameters_per_length_start_as_copies_with_the_same_logits() -> None:
    shared = loaded("deit_s")
    apart = TimeSformer(ModelConfig(**DEIT_S | {"share_norm": False, "share_patch": False})).eval()
    assert load_weights(apart, released("deit_s")).counts["copied to each length"] > 0
    images = torch.randn(1, 3, 1, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(apart(images, "10"), shared(images, "10"))


def test_a_file_may_hold_more_lengths_than_the_model() -> None:
    model = TimeSformer(ModelConfig(**DEIT_S | {"points": ["14", "8"]}))
    unused = {row.source for row in load_weights(model, released("deit_s")).rows if row.status == "unused"}
    assert unused == {f"pos_embed_list.{i}[{rows}]" for i in (1, 2) for rows in ("0", "1:")}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deit_s", {"points": ["14", "10", "7"]}, r"lengths 14, 12, 10, 8, the model has 14, 10, 7; .* model.points"),
    ("deit_s", {"depth": 16}, "width 96 and 12 blocks, the model 96 and 16"),
    ("deit_s", {"qkv_bias": False}, "biases for queries, keys and values, the model does not; set model.qkv_bias=true"),
    ("deit_s", {"embed": "stem"}, "patch embedding is resize, the model's stem; set model.embed=resize"),
    ("deit_s", {"embed": "kernel"}, "patch embedding is resize, the model's kernel"),
    ("lvvit_s", {"embed": "resize"}, "patch embedding is stem, the model's resize; set model.embed=stem"),
    ("deit_s", {"dense_head": 0.25}, "the file has no aux_head, the model does; set model.dense_head=null"),
    ("lvvit_s", {"dense_head": None}, "an aux_head, the model does not; set model.dense_head=0.25"),
    ("lvvit_s", {"mlp_ratio": 4.0}, r"fills only .* blocks.0.mlp.fc1.weight"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_files_of_another_model_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    model = TimeSformer(ModelConfig(**CONFIGS[name] | changes))
    before = model.head.weight.clone()
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, released(name))
    assert torch.equal(model.head.weight, before)


def test_other_lengths_are_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    state = released("deit_s") | {"pos_embed_list.3": torch.zeros(1, 1 + 16**2, WIDTH)}
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth: the file has positions for the lengths 16, 12, 10, 8"):
        load_weights(TimeSformer(ModelConfig(**DEIT_S)), tmp_path / "other.pth")


@pytest.mark.parametrize("rows", [57, 70])
def test_a_position_table_without_a_square_grid_is_refused(rows: int) -> None:
    state = released("deit_s") | {"pos_embed_list.0": torch.zeros(1, rows, WIDTH)}
    with pytest.raises(CheckpointError, match="positions for the lengths 14, 12, 10, the model"):
        load_weights(TimeSformer(ModelConfig(**DEIT_S)), state)


@torch.no_grad()
def test_lvvits_own_file_with_one_grid_is_loaded() -> None:
    """LV-ViT's layout is SuperViT's with one `pos_embed`."""
    state = {k: v for k, v in released("lvvit_s").items() if not k.startswith("pos_embed_list")}
    state["pos_embed"] = released("lvvit_s")["pos_embed_list.3"]
    model = TimeSformer(ModelConfig(**LVVIT_S | {"points": ["14"]})).eval()
    load_weights(model, state)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = supervit(released("lvvit_s"), images, 224)
    torch.testing.assert_close(model(images[:, :, None], "14"), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("name", "settings"), [("deit_s", DEIT_S), ("lvvit_s", LVVIT_S)])
def test_the_settings_of_a_file_are_those_of_the_code_that_wrote_it(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    torch.save(released(name), tmp_path / "weights.pth")
    found = weights_facts(str(tmp_path / "weights.pth")).model
    known = found.keys() & settings.keys() - {"heads"}  # a quarter of the width has other heads
    assert {key: found[key] for key in known} == {key: settings[key] for key in known}
    assert known >= settings.keys() & {"align_corners", "norm_eps", "residual_scale", "dense_head", "embed"}


def test_lv_vits_own_file_has_another_weight_of_the_head_on_patches_than_supervits(tmp_path: Path) -> None:
    own = {key: tensor for key, tensor in released("lvvit_s").items() if not key.startswith("pos_embed_list")}
    own["pos_embed"] = released("lvvit_s")["pos_embed_list.3"]
    torch.save(own, tmp_path / "lvvit_s.pth")
    found = weights_facts(str(tmp_path / "lvvit_s.pth")).model
    assert (found["dense_head"], found["residual_scale"], found["norm_eps"]) == (0.5, 0.5, 1e-5)
    assert "align_corners" not in found
