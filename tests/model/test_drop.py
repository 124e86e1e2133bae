"""Token dropping: how many tokens stay, which ones, and that nothing else changes."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from videoadapt.config.load import make_config
from videoadapt.config.points import Point
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import ConfigError
from videoadapt.model.block import Block
from videoadapt.model.drop import class_attention, gather_tokens, select_positions
from videoadapt.model.timesformer import TimeSformer, compiled

TINY: dict[str, Any] = {"width": 24, "depth": 4, "heads": 3, "patch": 4, "size": 32, "num_frames": 3, "num_classes": 5}
IMAGE: dict[str, Any] = {"temporal": False, "num_frames": 1}
GRID = ("8", "8@0.7", "8@0.5", "5", "5@0.5")


def make(**changes: Any) -> Any:
    """A model in which every parameter has an effect."""
    torch.manual_seed(0)
    model = TimeSformer(ModelConfig(**(TINY | {"points": GRID, "drop_blocks": (2, 3)} | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def clips(model: TimeSformer, batch: int = 2) -> Tensor:
    config = model.config
    shape = (batch, 3, config.num_frames, config.size, config.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def shapes_behind_blocks(model: Any, clip: Tensor, point: str) -> list[tuple[torch.Size, torch.Size]]:
    """Returns the output shapes of prefix and patches of each block."""
    shapes: list[Any] = []
    hooks = [
        b.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(x.shape for x in out))) for b in model.blocks
    ]
    model(clip, point)
    for hook in hooks:
        hook.remove()
    return shapes


# How many tokens stay.


@given(st.integers(1, 28), st.sampled_from(["0.5", "0.7", "0.55", "0.07", "0.3", "1.0"]))
def test_the_number_of_tokens_follows_the_paper(length: int, keep: str) -> None:
    expected = n = length**2
    for block, found in enumerate(Point(length, float(keep)).patches(12, (4, 7, 10)), start=1):
        if block in (4, 7, 10):
            expected = n = min(n, math.ceil(Fraction(keep) * (n + 1)))
        assert found == expected


def test_float_rounding_adds_no_token() -> None:
    assert math.ceil(0.14 * (7**2 + 1)) == 8  # 0.14 of 50 is 7
    assert Point.parse("7@0.14").patches(1, (1,)) == (7,)


@given(st.integers(1, 20), st.integers(1, 12), st.sets(st.integers(1, 12)))
def test_keep_1_keeps_all_and_every_keep_leaves_one(length: int, depth: int, blocks: set[int]) -> None:
    assert set(Point(length).patches(depth, blocks)) == {length**2}
    assert min(Point(length, 0.01).patches(depth, blocks)) >= 1


@torch.no_grad()
def test_later_blocks_do_not_see_dropped_tokens() -> None:
    model = make()
    shapes = shapes_behind_blocks(model, clips(model), "8@0.5")
    assert [patches for _, patches in shapes] == [(2, 3, n, 24) for n in (64, 33, 17, 17)]
    assert [prefix for prefix, _ in shapes] == [(2, 1, 24)] * 4


# Which tokens stay.


@given(st.data())
def test_the_highest_mean_scores_over_frames_stay_in_order(data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, 4)) for _ in range(2)] + [data.draw(st.integers(1, 9))]
    kept = data.draw(st.integers(1, shape[2]))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=math.prod(shape), max_size=math.prod(shape))))
    scores = scores.view(shape).double()
    positions = select_positions(scores, kept)
    for row, found in zip(scores, positions, strict=True):
        means = row.mean(0).tolist()
        expected = sorted(range(shape[2]), key=lambda n: (-means[n], n))[:kept]
        assert found.tolist() == sorted(expected)  # of equal scores the first wins, and the order stays


def test_tokens_come_from_the_same_positions_of_all_frames() -> None:
    patches = torch.arange(2 * 3 * 5 * 2).view(2, 3, 5, 2)
    found = gather_tokens(patches, torch.tensor([[0, 3], [2, 4]]))
    assert torch.equal(found, torch.stack([patches[0][:, [0, 3]], patches[1][:, [2, 4]]]))


def test_class_attention_is_the_first_row_of_the_attention() -> None:
    q, k = torch.randn(2, 4, 3, 7, 8, dtype=torch.float64).requires_grad_()
    whole = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)
    scores = class_attention(q, k)
    torch.testing.assert_close(scores, whole[:, :, 0].mean(1).detach())
    assert not scores.requires_grad
    assert class_attention(q.bfloat16(), k.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_all_frames_keep_the_same_positions_in_order() -> None:
    """The block has no weights, so tokens leave it unchanged and can be found among its inputs."""
    model = make(share_norm=True)
    block = model.blocks[1]
    for name, parameter in block.named_parameters():
        if any(layer in name for layer in ("attn.proj", "temporal_fc", "mlp.fc2")):
            parameter.zero_()
    patches = torch.randn(2, 3, 64, 24)
    prefix, found = block(torch.randn(2, 1, 24), patches, 8, 33)
    for clip in range(2):
        positions = [[int((patches[clip, t] == token).all(-1).nonzero()) for token in found[clip, t]] for t in range(3)]
        assert positions[0] == positions[1] == positions[2] == sorted(positions[0])


# What does not change.


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, IMAGE, {"distill_token": True}, {"embed": "kernel"}], ids=str)
def test_keep_1_equals_no_dropping_bit_for_bit(changes: dict[str, Any]) -> None:
    dropping, plain = make(**changes), make(**changes, drop_blocks=(1,))
    plain.load_state_dict(dropping.state_dict())
    clip = clips(dropping)
    for point in ("8", "5"):
        assert torch.equal(dropping(clip, point), plain(clip, point))
        assert not torch.equal(dropping(clip, f"{point}@0.5"), plain(clip, f"{point}@0.5"))


@torch.no_grad()
def test_a_block_that_keeps_all_computes_no_class_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def counted(q: Tensor, k: Tensor) -> Tensor:
        called.append(q.shape[2])
        return class_attention(q, k)

    monkeypatch.setattr("videoadapt.model.block.class_attention", counted)
    model = make()
    model(clips(model), "8")
    assert called == []
    model(clips(model), "8@0.5")
    assert called == [65, 34]


def test_keeps_add_no_parameters() -> None:
    assert make().state_dict().keys() == make(points=("8", "5")).state_dict().keys()


# An image model is SuperViT, written here from the paper.


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def image_logits(weights: dict[str, Tensor], images: Tensor, config: ModelConfig, point: Point) -> Tensor:
    """A ViT that drops tokens, with plain attention. Kept tokens are sorted by score, as in SuperViT's public code."""
    width, heads, length = config.width, config.heads, str(point.length)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.weight.{length}"], weights[f"{name}.bias.{length}"], 1e-6)

    side = point.length * config.patch
    images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    kernel, bias = (weights[f"patch_embed.proj.{length}.{kind}"] for kind in ("weight", "bias"))
    x = F.conv2d(images, kernel, bias, stride=config.patch).flatten(2).transpose(1, 2)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + torch.cat([weights[f"pos_embed.cls.{length}"], weights[f"pos_embed.grid.{length}"]])
    for number in range(config.depth):
        name = f"blocks.{number}"
        batch, tokens, _ = x.shape
        qkv = linear(weights, f"{name}.attn.qkv", norm(f"{name}.norm1", x))
        q, k, v = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1)
        x = x + linear(weights, f"{name}.attn.proj", (attention @ v).transpose(1, 2).reshape(batch, tokens, width))
        if number + 1 in config.drop_blocks and point.keep < 1:
            scores = attention.mean(1)[:, 0, 1:]
            best = scores.topk(min(tokens - 1, math.ceil(point.keep * tokens))).indices
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, best[..., None].expand(-1, -1, width))], 1)
        hidden = F.gelu(linear(weights, f"{name}.mlp.fc1", norm(f"{name}.norm2", x)))
        x = x + linear(weights, f"{name}.mlp.fc2", hidden)
    return linear(weights, "head", norm("norm", x)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("point", GRID)
def test_one_frame_clips_agree_with_the_image_model(point: str) -> None:
    model = make(**IMAGE)
    clip = clips(model, 4)
    expected = image_logits(model.state_dict(), clip[:, :, 0], model.config, Point.parse(point))
    torch.testing.assert_close(model(clip, point), expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_blocks_do_not_depend_on_the_order_of_tokens() -> None:
    """Ours keeps positions in order, SuperViT's public code sorts them by score: the logits are the same."""
    block: Block = make().blocks[3]
    prefix, patches, order = torch.randn(2, 1, 24), torch.randn(2, 3, 20, 24), torch.randperm(20)
    expected = block(prefix, patches, 8, 20)
    found = block(prefix, patches[:, :, order], 8, 20)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1][:, :, order])


# With other features of the model.


def test_all_keeps_of_a_length_have_the_same_prefix() -> None:
    """They differ by dropping alone: a distillation token where the length is a student's."""
    assert make(distill_token=True).distilled == {"5", "5@0.5"}


@torch.no_grad()
def test_the_distillation_token_is_never_dropped() -> None:
    model = make(distill_token=True)
    assert [prefix for prefix, _ in shapes_behind_blocks(model, clips(model), "5@0.5")] == [(2, 2, 24)] * 4
    heads = model(clips(model), "5@0.5", heads=True)
    assert heads.cls.shape == heads.dist.shape == (2, 5)


@torch.no_grad()
def test_clips_of_a_batch_do_not_affect_each_other() -> None:
    model = make()
    batch = clips(model, 3)
    alone = torch.cat([model(clip[None], "8@0.5") for clip in batch])
    torch.testing.assert_close(model(batch, "8@0.5"), alone, atol=1e-5, rtol=1e-5)


def gradients(model: nn.Module, clip: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(clip, "8@0.5").logsumexp(1).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = make().train()
    expected = gradients(model, clips(model))
    model.activation_checkpointing = True
    actual = gradients(model, clips(model))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@torch.no_grad()
def test_bfloat16_gives_nearly_the_same_logits() -> None:
    model = make()
    expected = model(clips(model), "8@0.7")
    found = model.bfloat16()(clips(model).bfloat16(), "8@0.7")
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), expected, dim=1).min() > 0.98


@pytest.mark.slow
def test_each_of_many_points_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """More points than the 8 graphs that torch allows by default; beyond its limit, `fullgraph` is an error."""
    torch._dynamo.reset()
    points = tuple(f"{length}{keep}" for length in (8, 7, 6) for keep in ("", "@0.7", "@0.5"))
    model = make(**IMAGE, depth=1, drop_blocks=(1,), points=points)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    forward = compiled(model)
    with torch.no_grad():
        for point in points + points:
            torch.testing.assert_close(forward(clips(model), point), model(clips(model), point), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == len(points) > 8


# Refused configs.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"drop_blocks": (2, 5)},
            r"model\.drop_blocks: 8@0\.7 needs blocks .* with numbers from 1 to 4 .*got \[2, 5\]",
        ),
        ({"drop_blocks": ()}, r"model\.drop_blocks: 8@0\.7 needs blocks that drop tokens, .*got \[\]"),
        ({"points": ("8", "8@0.99")}, r"model\.points: 8@0\.99 drops so few tokens that it saves nothing; use 8"),
        ({"points": ("8", "8@1.5")}, r"model\.points: point '8@1\.5': expected .*0 < KEEP <= 1"),
        ({"points": ("8", "8@0")}, r"model\.points: point '8@0': expected .*0 < KEEP <= 1"),
    ],
)
def test_keeps_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({"model": TINY | {"points": GRID, "drop_blocks": (2, 3)} | changes, "assign": {"frames": 1}})


def test_a_model_without_keeps_needs_no_dropping_blocks() -> None:
    assert ModelConfig(**(TINY | {"points": ("8",), "depth": 2})).drop_blocks == (4, 7, 10)
