"""The model: parameters per length and shared ones, tokens, attention, heads, and the point as an argument."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from videoadapt.config.points import Point
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError
from videoadapt.model.block import attend
from videoadapt.model.embed import resize_frames
from videoadapt.model.timesformer import TimeSformer, compiled

TINY: dict[str, Any] = {"width": 32, "depth": 3, "heads": 4, "patch": 4, "size": 56, "num_frames": 3, "num_classes": 5}
POINTS = ("14", "10", "7")


def fresh(**changes: Any) -> Any:  # Any: tests use attributes of modules that torch does not type
    torch.manual_seed(0)
    return TimeSformer(ModelConfig(**(TINY | changes)))


def make(**changes: Any) -> Any:
    """A model without tensors at zero or one, so that every parameter has an effect, temporal attention included."""
    model = fresh(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def clips(model: TimeSformer, batch: int = 2) -> Tensor:
    config = model.config
    shape = (batch, 3, config.num_frames, config.size, config.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def parameters_of(model: TimeSformer, length: int) -> set[str]:
    """The names of the parameters that only this length has. No block has the number of a length."""
    return {name for name, _ in model.named_parameters() if str(length) in name.split(".")}


# Parameters of one length, and of all.


def test_other_lengths_get_no_gradients() -> None:
    model = make()
    model(clips(model), "10").square().sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == set(dict(model.named_parameters())) - parameters_of(model, 14) - parameters_of(model, 7)
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name in moved)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"embed": "kernel"}, {"embed": "stem"}])
def test_a_length_does_not_depend_on_the_parameters_of_others(changes: dict[str, Any]) -> None:
    model = make(**changes)
    before = model(clips(model), "10")
    for name in parameters_of(model, 14) | parameters_of(model, 7):
        model.get_parameter(name).fill_(torch.nan)
    assert torch.equal(model(clips(model), "10"), before)
    assert model(clips(model), "14").isnan().all()


def test_the_parameters_of_one_length() -> None:
    kinds = {name.replace(".7", "").replace("blocks.2", "blocks.*") for name in parameters_of(make(), 7)}
    assert {kind for kind in kinds if "blocks.0" not in kind and "blocks.1" not in kind} == {
        *(f"blocks.*.{norm}.{kind}" for norm in ("temporal_norm", "norm1", "norm2") for kind in ("weight", "bias")),
        *("norm.weight", "norm.bias", "patch_embed.proj.weight", "patch_embed.proj.bias"),
        *("pos_embed.cls", "pos_embed.grid"),
    }


@pytest.mark.parametrize(
    ("switch", "modules"),
    [
        ("share_norm", ("norm", "temporal_norm", "norm1", "norm2")),
        ("share_patch", ("patch_embed",)),
        ("share_pos", ("pos_embed",)),
    ],
)
def test_sharing_replaces_the_parameters_of_three_lengths_by_one(switch: str, modules: tuple[str, ...]) -> None:
    apart, shared = make(), make(**{switch: True})
    split = {name for name in parameters_of(apart, 14) if set(name.split(".")) & set(modules)}
    removed = {name.replace("14", length) for name in split for length in POINTS}
    added = {name.replace("14", "shared") for name in split}
    assert split
    assert set(shared.state_dict()) == set(apart.state_dict()) - removed | added
    assert all(shared(clips(shared), point).isfinite().all() for point in POINTS)


def test_a_single_length_has_the_parameters_of_a_timesformer() -> None:
    with torch.device("meta"):
        model = TimeSformer(ModelConfig(points=("14",)))
    attention, mlp, norm, width = 4 * 768**2 + 4 * 768, 8 * 768**2 + 5 * 768, 2 * 768, 768
    block = 2 * attention + (width**2 + width) + mlp + 3 * norm
    embed = 3 * 16 * 16 * width + width + width + 197 * width + 8 * width
    assert sum(p.numel() for p in model.parameters()) == 12 * block + embed + norm + 400 * (width + 1)


# Tokens.


@torch.no_grad()
def test_shared_kernels_of_short_lengths_are_the_centre_of_the_largest() -> None:
    embed = make(embed="kernel", share_patch=True, points=["14", "7"]).patch_embed
    large = embed.proj["shared"]
    assert large.weight.shape == (32, 3, 8, 8)
    clip = torch.randn(1, 3, 3, 56, 56)
    frames = clip.transpose(1, 2)[0]
    expected = F.conv2d(frames, large.weight[:, :, 2:6, 2:6], large.bias, stride=4)
    torch.testing.assert_close(embed(clip, 14)[0], rearrange(expected, "t d h w -> t (h w) d"))
    expected = F.conv2d(frames, large.weight, large.bias, stride=8)
    torch.testing.assert_close(embed(clip, 7)[0], rearrange(expected, "t d h w -> t (h w) d"))


@torch.no_grad()
def test_length_10_cuts_22_pixel_patches_from_220_pixels() -> None:
    embed = make(embed="kernel", patch=16, size=224).patch_embed
    clip = torch.randn(1, 3, 2, 224, 224)
    assert embed.proj["10"].weight.shape[2:] == (22, 22)
    small = resize_frames(clip.transpose(1, 2)[0], 220)
    expected = F.conv2d(small, embed.proj["10"].weight, embed.proj["10"].bias, stride=22)
    torch.testing.assert_close(embed(clip, 10)[0], rearrange(expected, "t d h w -> t (h w) d"), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [14, 10, 7])
def test_resize_shrinks_frames_to_whole_patches_of_the_same_size(length: int) -> None:
    embed = make().patch_embed
    clip, proj = torch.randn(2, 3, 3, 56, 56), embed.proj[str(length)]
    small = resize_frames(rearrange(clip, "b c t h w -> (b t) c h w"), length * 4)
    expected = F.conv2d(small, proj.weight, proj.bias, stride=4)
    expected = rearrange(expected, "(b t) d h w -> b t (h w) d", b=2)
    torch.testing.assert_close(embed(clip, length), expected)


@torch.no_grad()
def test_stem_convolves_then_cuts_the_same_patches() -> None:
    model = make(embed="stem")
    clip = clips(model)
    assert [model.patch_embed(clip, length).shape for length in (14, 7)] == [(2, 3, 196, 32), (2, 3, 49, 32)]
    stem = model.patch_embed.proj["14"]
    convolutions = [stem.conv1, stem.conv2, stem.conv3, stem.proj]
    assert [c.stride for c in convolutions] == [(2, 2), (1, 1), (1, 1), (2, 2)]
    assert [c.bias is None for c in convolutions] == [True, True, True, False]
    near, far = clip.clone(), clip.clone()
    far[..., 28:, :] += 1.0  # below the receptive field of the uppermost patches
    near[..., :4, :4] += 1.0
    before = model.patch_embed(clip, 14)
    assert torch.equal(model.patch_embed(far, 14)[:, :, :14], before[:, :, :14])
    assert not torch.allclose(model.patch_embed(near, 14)[:, :, 0], before[:, :, 0])


@torch.no_grad()
def test_shared_positions_are_the_upper_left_of_the_longest_grid() -> None:
    embed = make(share_pos=True).pos_embed
    prefix, patches = embed(torch.zeros(1, 1, 32), torch.zeros(1, 3, 49, 32), 7)
    grid = embed.grid["shared"].unflatten(0, (14, 14))
    assert torch.equal(patches[0, 2].unflatten(0, (7, 7)), grid[:7, :7])
    assert torch.equal(prefix[0], embed.cls["shared"])


# Attention.


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_softmax_attention(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = (torch.einsum("smid,smjd->smij", q.double(), k.double()) / 8**0.5).softmax(-1)
    expected = torch.einsum("smij,smjd->smid", weights, v.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attend(q, k, v).double(), expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_attention_takes_any_number_of_sequences() -> None:
    calls = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                calls.append(len(args[0]))
                return args[2]
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Calls():  # tensors of a GPU, without values
        q, k, v = torch.empty(3, 140_000, 1, 8, 64, device="cuda")
        assert attend(q, k, v).shape == q.shape
    assert calls == [65_535, 65_535, 8_930]


@torch.no_grad()
def test_only_the_time_embedding_depends_on_the_order_of_frames() -> None:
    model = make()
    clip = clips(model)
    backwards = clip.flip(2)
    assert not torch.allclose(model(clip, "7"), model(backwards, "7"), atol=1e-4)
    model.time_embed.zero_()
    torch.testing.assert_close(model(clip, "7"), model(backwards, "7"))


@torch.no_grad()
def test_temporal_attention_stays_at_its_position() -> None:
    block = make().blocks[0]
    patches = torch.randn(1, 3, 49, 32)
    other = patches.clone()
    other[:, 1, 5] += 1.0
    changed = block._attend_over_time(patches, 7) != block._attend_over_time(other, 7)
    assert changed.any(-1).any(1).nonzero()[:, 1].tolist() == [5]


def test_temporal_fc_starts_at_zero_in_all_blocks_but_the_first() -> None:
    weights = [block.temporal_fc.weight for block in fresh().blocks]
    assert weights[0].any() and not any(weight.any() for weight in weights[1:])


# Heads.


@torch.no_grad()
def test_only_students_have_a_distillation_token() -> None:
    model = make(distill_token=True)
    clip = clips(model)
    assert set(model.pos_embed.dist) == {"10", "7"}
    assert model(clip, "14", heads=True).dist is None
    student = model(clip, "10", heads=True)
    torch.testing.assert_close(model(clip, "10"), (student.cls + student.dist) / 2)
    assert not torch.allclose(student.cls, student.dist)

    before = {point: model(clip, point, heads=True).cls for point in POINTS}
    model.dist_token.add_(torch.randn(32))  # the class token attends to it
    same = {point: torch.allclose(before[point], model(clip, point, heads=True).cls) for point in POINTS}
    assert same == {"14": True, "10": False, "7": False}


@torch.no_grad()
@pytest.mark.parametrize("token", [False, True])
def test_the_dense_head_adds_the_maximum_over_patches_of_each_class(token: bool) -> None:
    model = make(dense_head=0.25, distill_token=token)
    clip = clips(model)
    heads = model(clip, "7", heads=True)
    assert heads.dense.shape == (2, 3 * 49, 5)
    plain = (heads.cls + heads.dist) / 2 if token else heads.cls
    torch.testing.assert_close(model(clip, "7"), plain + 0.25 * heads.dense.max(1).values)
    assert model(clip, "7", heads=True)._replace(dense=None).logits().equal(plain)
    model.aux_head.bias[2] += 4.0
    changed = model(clip, "7") - plain - 0.25 * heads.dense.max(1).values
    torch.testing.assert_close(changed[0], torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_residual_scale_multiplies_every_branch() -> None:
    """It has the effect of a smaller last linear map in each branch."""
    model, plain = make(residual_scale=0.5), make()
    plain.load_state_dict(model.state_dict())
    for name, parameter in plain.named_parameters():
        if ".attn.proj." in name or "temporal_fc" in name or ".fc2." in name:
            parameter.mul_(0.5)
    for point in POINTS:
        torch.testing.assert_close(model(clips(model), point), plain(clips(model), point))


@torch.no_grad()
def test_no_qkv_bias_equals_a_zero_qkv_bias() -> None:
    model, biased = make(qkv_bias=False), make()
    missing = set(biased.state_dict()) - set(model.state_dict())
    assert missing == {name for name in biased.state_dict() if name.endswith("qkv.bias")}
    biased.load_state_dict(model.state_dict() | {name: biased.state_dict()[name] * 0 for name in missing})
    torch.testing.assert_close(model(clips(model), "10"), biased(clips(model), "10"))


@torch.no_grad()
def test_align_corners_maps_corner_pixels_onto_corner_pixels() -> None:
    frames = torch.randn(2, 3, 56, 56)
    small = resize_frames(frames, 28, align_corners=True)
    torch.testing.assert_close(small[..., ::27, ::27], frames[..., ::55, ::55])
    model, other = make(align_corners=True), make()
    other.load_state_dict(model.state_dict())
    same = {point: model(clips(model), point).equal(other(clips(model), point)) for point in POINTS}
    assert same == {"14": True, "10": False, "7": False}


# Token mixing (swap).


@torch.no_grad()
@pytest.mark.parametrize("embed", ["resize", "stem"])
def test_swapped_tokens_come_from_the_partner(embed: str) -> None:
    model = make(embed=embed)
    batch, partners = clips(model, batch=3), torch.tensor([1, 0, 2])
    none, every = torch.zeros(3, 49, dtype=torch.bool), torch.ones(3, 49, dtype=torch.bool)
    plain = model(batch, "7")
    assert torch.equal(model(batch, "7", swap=(partners, none)), plain)
    torch.testing.assert_close(model(batch, "7", swap=(partners, every)), plain[partners])


@torch.no_grad()
def test_swapping_tokens_equals_pasting_pixels_for_plain_patches() -> None:
    model = make()
    batch, partners = clips(model, batch=2), torch.tensor([1, 0])
    mask = torch.zeros(2, 14, 14, dtype=torch.bool)
    mask[:, 3:9, 5:14] = True
    pasted = batch.clone()
    pasted[..., 12:36, 20:56] = batch.flip(0)[..., 12:36, 20:56]
    torch.testing.assert_close(model(batch, "14", swap=(partners, mask.flatten(1))), model(pasted, "14"))


# The point is an argument.


@torch.no_grad()
def test_clips_of_a_batch_do_not_affect_each_other() -> None:
    model = make()
    batch = clips(model, batch=3)
    for point in POINTS:
        alone = torch.cat([model(clip[None], point) for clip in batch])
        torch.testing.assert_close(model(batch, point), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_threads_may_run_different_points_of_one_model() -> None:
    model = make()
    clip = clips(model)
    expected = {point: model(clip, point) for point in POINTS}
    jobs = list(POINTS) * 10

    def run(point: str) -> Tensor:
        with torch.no_grad():
            return model(clip, point)

    with ThreadPoolExecutor(4) as pool:
        for point, logits in zip(jobs, pool.map(run, jobs), strict=True):
            torch.testing.assert_close(logits, expected[point])


@pytest.mark.parametrize("written", ["7@1.0", "7@1", " 7", Point(7)])
def test_a_point_may_be_written_in_several_ways(written: str | Point) -> None:
    model = make()
    assert torch.equal(model(clips(model), written), model(clips(model), "7"))


@pytest.mark.parametrize("point", ["28", "14@0.7", "x"])
def test_an_unknown_point_is_refused_with_the_known_ones(point: str) -> None:
    model = make()
    with pytest.raises(UserError, match=f"point {point}: this model has the points 14, 10, 7"):
        model(clips(model), point)


@pytest.mark.parametrize("shape", [(3, 3, 56, 56), (1, 3, 2, 56, 56), (1, 3, 3, 56, 48), (1, 1, 3, 56, 56)])
def test_clips_of_another_shape_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as error:
        make()(torch.zeros(shape), "14")
    assert "(B, 3, 3, 56, 56)" in str(error.value) and str(shape) in str(error.value)


# Precision, memory, compilation.


@torch.no_grad()
@pytest.mark.parametrize("embed", ["resize", "kernel", "stem"])
def test_bfloat16_is_near_float32(embed: str) -> None:
    model = make(embed=embed)
    clip = clips(model)
    expected = {point: model(clip, point) for point in POINTS}
    model.bfloat16()
    for point in POINTS:
        actual = model(clip.bfloat16(), point)
        assert actual.dtype == torch.bfloat16
        assert F.cosine_similarity(actual.float(), expected[point], dim=1).min() > 0.99


def gradients(model: nn.Module, clip: Tensor, point: str) -> dict[str, Tensor]:
    model.zero_grad()
    model(clip, point).logsumexp(1).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def public_block(block: Any, cls: Tensor, patches: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """A block of TimeSformer's public code in training, sequence by sequence.

    Drop path is drawn for each position in temporal attention, before `temporal_fc`, for each frame in spatial
    attention, and for each clip in the MLP.

    Args:
        block: Gives the weights, of one length.
        cls: (B, 1, D).
        patches: (B, T, N, D).
        keep: Probability that a branch is kept.
    """
    (clips, frames, positions, width), length = patches.shape, 14
    sizes = (clips, clips * positions, clips * frames)
    of_clips, *draws = [torch.empty(n, 1, 1).bernoulli_(keep).flatten() / keep for n in sizes]
    temporal = torch.zeros_like(patches)
    for clip in range(clips):
        for position in range(positions):
            sequence = block.temporal_norm(patches[clip, :, position], length)[None]  # (1, T, D)
            branch = block.temporal_attn(sequence)[0] * draws[0][clip * positions + position]
            temporal[clip, :, position] = block.temporal_fc(branch)
    patches = patches + temporal
    spatial = torch.zeros(clips, frames, 1 + positions, width)
    for clip in range(clips):
        for frame in range(frames):
            sequence = block.norm1(torch.cat([cls[clip], patches[clip, frame]]), length)[None]  # (1, 1 + N, D)
            spatial[clip, frame] = block.attn(sequence)[0] * draws[1][clip * frames + frame]
    cls, patches = cls + spatial[:, :, 0].mean(1, keepdim=True), patches + spatial[:, :, 1:]
    tokens = torch.cat([cls, patches.flatten(1, 2)], 1)
    tokens = tokens + block.mlp(block.norm2(tokens, length)) * of_clips[:, None, None]
    return tokens[:, :1], tokens[:, 1:].unflatten(1, (frames, positions))


def test_drop_path_of_sequences_is_that_of_timesformers_code() -> None:
    model = make(depth=2, drop_path=0.5, drop_path_unit="sequence").train()
    cls, patches = torch.randn(2, 1, 32), torch.randn(2, 3, 5, 32)
    torch.manual_seed(3)
    found = model.blocks[1](cls, patches, 14, 5)
    torch.manual_seed(3)
    expected = public_block(model.blocks[1], cls, patches, keep=0.5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.manual_seed(3)
    per_clip = make(depth=2, drop_path=0.5).train().blocks[1](cls, patches, 14, 5)
    assert not torch.allclose(per_clip[1], expected[1])
    model.eval()
    torch.testing.assert_close(model.blocks[1](cls, patches, 14, 5), public_block(model.blocks[1], cls, patches, 1.0))


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(drop_path: float) -> None:
    model = make(drop_path=drop_path).train()
    clip = clips(model)
    torch.manual_seed(2)
    expected = gradients(model, clip, "10")
    model.activation_checkpointing = True
    torch.manual_seed(2)
    actual = gradients(model, clip, "10")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "points"), [("aot_eager", POINTS), ("inductor", ("7",))]
)  # inductor: 1 min a graph
def test_compiles_to_one_graph_per_point(backend: str, points: tuple[str, ...]) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on CPUs")
    torch._dynamo.reset()
    model = make(depth=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    forward = torch.compile(model, backend=counter, fullgraph=True)
    clip = clips(model)
    with torch.no_grad():
        for point in points + points:
            torch.testing.assert_close(forward(clip, point), model(clip, point), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == len(points)


def test_the_recompile_limit_is_an_argument_where_torch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch._dynamo.config.cache_size_limit
    limits: list[int | None] = []

    def compile_new(model: nn.Module, *, recompile_limit: int | None = None) -> nn.Module:
        limits.append(recompile_limit)
        return model

    monkeypatch.setattr(torch, "compile", compile_new)
    compiled(make())
    assert limits == [2 * len(POINTS) + 8]
    assert torch._dynamo.config.cache_size_limit == before


@pytest.mark.parametrize(("before", "after"), [(8, 2 * len(POINTS) + 8), (100, 100)])
def test_older_torch_gets_a_higher_limit_for_the_process(
    monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    with torch._dynamo.config.patch(cache_size_limit=before):
        compiled(make())
        assert torch._dynamo.config.cache_size_limit == after
