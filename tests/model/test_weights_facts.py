"""What weights say about the model that they fit, and that training does not start with another normalisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from videoadapt.config.sections import ModelConfig
from videoadapt.errors import CheckpointError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.facts import (
    Normalisation,
    describe_origin,
    require_normalisation,
    stated_licence,
    weights_facts,
)
from videoadapt.model.weights.load import load_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write_vit(path: Path) -> Path:
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, init_values=1e-5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(vit.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("name", "beside", "expected"),
    [
        ("deit_tiny_patch16_224.safetensors", {}, IMAGENET),  # the name of a timm model
        ("mine.safetensors", {}, None),
        ("hf/model.safetensors", {"preprocessor_config.json": {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}}, 0.1),
        ("hub/model.safetensors", {"config.json": {"pretrained_cfg": {"mean": [0.3] * 3, "std": [0.2] * 3}}}, 0.3),
    ],
)
def test_normalisation_is_what_the_source_states(tmp_path: Path, name: str, beside: dict, expected: object) -> None:
    path = write_vit(tmp_path / name)
    for other, values in beside.items():
        (path.parent / other).write_text(json.dumps(values))
    facts = weights_facts(str(path.parent if beside else path))
    found = facts.normalisation
    if isinstance(expected, float):
        assert found and (found.mean, found.std) == ((expected,) * 3, (0.2,) * 3)
    else:
        assert (found and (found.mean, found.std)) == expected
    assert {key: facts.model[key] for key in ("width", "depth", "heads", "patch", "layer_scale", "mlp_ratio")} == {
        **{"width": 192, "depth": 2, "heads": 3, "patch": 16},
        **{"layer_scale": 1e-5, "mlp_ratio": 4.0},
    }
    model = TimeSformer(ModelConfig(**facts.model, points=("14",), num_frames=1, temporal=False))
    assert load_weights(model, path.parent if beside else path).filled == 1.0


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (1152, 16), (1280, 16)])  # S, SO400M, H
def test_heads_of_a_file_are_those_of_the_published_model(tmp_path: Path, width: int, heads: int) -> None:
    shapes = {"attn.qkv.weight": (3 * width, width), "mlp.fc1.weight": (4 * width, width)}
    save_file({f"blocks.0.{name}": torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    assert weights_facts(str(tmp_path / "a.safetensors")).model["heads"] == heads


def test_a_file_is_described_by_its_header_and_who_states_its_normalisation(tmp_path: Path) -> None:
    path = write_vit(tmp_path / "deit_tiny_patch16_224.safetensors")
    assert "does not say where it is from; mean and std by timm's settings of deit" in weights_facts(str(path)).origin
    save_file(load_file(path), path, {"format": "pt", "source": "tuned\nfurther"})
    assert weights_facts(str(path)).origin.startswith("its header says: source: tuned further; mean and std by timm's")
    assert describe_origin("deit_tiny_patch16_224", None) == "mean and std are not stated"


def test_the_licence_is_that_of_the_header_or_of_timm_and_else_what_the_file_says(tmp_path: Path) -> None:
    path = write_vit(tmp_path / "deit_tiny_patch16_224.safetensors")
    assert stated_licence(str(path)) == ""  # the name of a file proves nothing
    save_file(load_file(path), path, {"source": "tuned\nfurther"})
    assert stated_licence(str(path)) == "not named; of its source the file says: tuned further"
    save_file(load_file(path), path, {"License": "MIT", "source": "tuned"})
    assert stated_licence(str(path)) == "MIT"
    assert stated_licence("deit_tiny_patch16_224.fb_in1k") == "apache-2.0"
    path.rename(tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert stated_licence(str(tmp_path)) == "cc-by-nc-4.0"


def test_weights_with_another_normalisation_need_a_config_that_states_its_own() -> None:
    imagenet = Normalisation(*IMAGENET, "timm")
    with pytest.raises(CheckpointError, match=r"set those of the weights.*") as error:
        require_normalisation(ModelConfig(), "a.pth", imagenet)
    assert "'model.mean=[0.485,0.456,0.406]' 'model.std=[0.229,0.224,0.225]'" in str(error.value)
    with pytest.raises(CheckpointError, match="does not state"):
        require_normalisation(ModelConfig(), "a.pth", None)
    own = ModelConfig(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))
    assert "the config decides" in require_normalisation(own, "a.pth", imagenet)
    assert require_normalisation(own, "a.pth", None) == ""
    assert require_normalisation(ModelConfig(mean=IMAGENET[0], std=IMAGENET[1]), "a.pth", imagenet) == ""


def test_a_video_model_keeps_its_frames(tmp_path: Path) -> None:
    model = TimeSformer(ModelConfig(width=32, depth=1, heads=2, num_frames=6, points=("14",)))
    torch.save({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "a.pth")
    assert weights_facts(str(tmp_path / "a.pth")).model["num_frames"] == 6
