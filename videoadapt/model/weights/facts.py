"""What a source of pretrained weights says about the model that it fits, and about the normalisation of its frames."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import timm
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from videoadapt.config.parse import MAX_CONFIG_BYTES, parse_json, read_text
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import CheckpointError, one_line
from videoadapt.model.checkpoint import KEY
from videoadapt.model.weights.layouts import SUPERVIT, Layout, recognise
from videoadapt.model.weights.sources import Weights, read_weights

Rgb: TypeAlias = tuple[float, float, float]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TIMESFORMER = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
# Tensor shapes do not show the heads. Published ViTs have heads of 64 channels, but for LV-ViT-T, SO400M, H, g and G.
_HEAD_WIDTH = 64
_HEADS = {240: 4, 1152: 16, 1280: 16, 1408: 16, 1664: 16}  # by width
_LAYER_SCALE = 1e-5  # only the initial value: the weights replace it
_SAID = 300  # characters of a header that are shown
_BRANCHES = {240: 1.0, 768: 1 / 3}  # factor of LV-ViT's branches by width: T, and L; the others halve them


class Normalisation(NamedTuple):
    """Mean and deviation of RGB values in [0, 1] with which weights were trained."""

    mean: Rgb
    std: Rgb
    origin: str  # who says so, for messages


@dataclass(frozen=True)
class WeightsFacts:
    """The settings that fit a source of weights."""

    label: str  # names the source and its layout
    model: dict[str, Any]  # keys of the section `model`, without the classes, and their values
    normalisation: Normalisation | None  # None if the source does not state it
    origin: str  # what the source says of itself, and who states the normalisation; see `describe_origin`


def weights_facts(source: str) -> WeightsFacts:
    """Reads weights, and finds the settings of a model that they fill.

    Args:
        source: A file, a folder or the name of a timm model; see `load_weights`.

    Raises:
        CheckpointError: The source cannot be read, or is no ViT.
        UserError: timm cannot download the weights.
    """
    weights = read_weights(source)
    layout = require_layout(weights)
    label = f"{weights.label} ({layout.kind})"
    own = _own_model(Path(source))
    model = own or _architecture(layout, weights)
    stated = stated_normalisation(source, layout)
    return WeightsFacts(label, model, stated, describe_origin(source, stated))


def describe_origin(source: str | Path, stated: Normalisation | None) -> str:
    """Returns in one line what a file of weights says of itself, and who states its normalisation.

    A name alone proves little: weights that were trained further often keep the name of those they began with.

    Args:
        source: A file, a folder or the name of a timm model.
        stated: The normalisation that the source states.
    """
    says = [f"{key}: {value}" for key, value in _header(Path(source)).items() if key not in {KEY, "format"}]
    header = f"its header says: {one_line('; '.join(says))[:_SAID]}" if says else "it does not say where it is from"
    known = f"mean and std by {stated.origin}" if stated else "mean and std are not stated"
    return f"{header}; {known}" if Path(source).exists() else known


def stated_licence(source: str) -> str:
    """Returns the licence that weights state, or else what their file says of itself; empty if it says nothing.

    Args:
        source: A file, a folder or the name of a timm model. A file that is named after a timm model may be another.
    """
    path = Path(source)
    if not path.exists():
        settings = timm.get_pretrained_cfg(source) if timm.is_model(source) else None
        return str(settings.license or "") if settings is not None else ""
    says = {key.lower(): value for key, value in _header(path).items() if key not in {KEY, "format"}}
    if (card := path / "README.md").is_file():
        says |= ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    stated = says.get("license") or says.get("licence")
    if stated:
        return one_line(str(stated))[:_SAID]
    source_says = one_line(str(says.get("source", "")))[:_SAID]
    return f"not named; of its source the file says: {source_says}" if source_says else ""


def _header(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file, or of the one in a folder; empty for every other source."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError):
        return {}  # damage is reported when the tensors are read


def require_layout(weights: Weights) -> Layout:
    """Returns the layout of weights.

    Raises:
        CheckpointError: The names of the tensors are of no known ViT.
    """
    layout = recognise(weights.tensors)
    if layout is None:
        names = list(weights.tensors)
        sample = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"  # noqa: PLR2004
        raise CheckpointError(
            f"{weights.label}: expected the weights of a ViT (timm's names) or TimeSformer (facebookresearch's, "
            f"Hugging Face's or videoadapt's), got {len(names)} tensors named {sample}"
        )
    return layout


def stated_normalisation(source: str | Path, layout: Layout) -> Normalisation | None:
    """Returns the normalisation that a source of weights was trained with; None if nothing states it.

    The released TimeSformers have one normalisation, whatever the processor of a converted folder states.

    Args:
        source: A file, a folder or the name of a timm model.
        layout: The layout of its tensors.
    """
    path = Path(source)
    if own := _own_model(path):
        return Normalisation(tuple(own["mean"]), tuple(own["std"]), "its own settings")
    if layout.temporal:
        return Normalisation(*_TIMESFORMER, "TimeSformer's code")
    if layout.kind == SUPERVIT:
        return Normalisation(*_IMAGENET, "SuperViT's code")
    if path.is_dir():
        return _of_folder(path)
    return _of_timm(path.name if path.is_file() else str(source), is_file=path.is_file())


def require_normalisation(model: ModelConfig, source: str, stated: Normalisation | None) -> str:
    """Checks that a model normalises frames as its initial weights expect them.

    A config that states `model.mean` and `model.std` decides. Otherwise the defaults must be those of the weights.

    Args:
        model: The model of the config.
        source: `train.init`.
        stated: The normalisation that the weights state, if they do.

    Returns:
        A message for the user if the config states another normalisation than the weights; otherwise empty.

    Raises:
        CheckpointError: The config leaves the normalisation out, and the weights have another one or state none.
    """
    if stated is not None and _same(stated, model):
        return ""
    decided = {"mean", "std"} <= model.model_fields_set
    if stated is None:
        if decided:
            return ""
        raise CheckpointError(
            f"train.init: {source} does not state the mean and deviation that it was trained with, and the config "
            f"neither; set both: {as_keys(*_IMAGENET)} (ImageNet: DeiT, DINO, DINOv2, MAE), "
            f"{as_keys((0.5,) * 3, (0.5,) * 3)} (timm's augreg) or {as_keys(*_TIMESFORMER)} (TimeSformer)"
        )
    message = (
        f"{source} was trained with {as_keys(stated.mean, stated.std)} (by {stated.origin}), the config has "
        f"{as_keys(model.mean, model.std)}"
    )
    if decided:
        return f"note: {message}; the config decides"
    raise CheckpointError(
        f"train.init: {message}, the default; set those of the weights, or write the default into the config"
    )


def as_keys(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Returns the settings of a normalisation as words of a command."""
    mean_text, std_text = (",".join(f"{value:g}" for value in values) for values in (mean, std))
    return shlex.join([f"model.mean=[{mean_text}]", f"model.std=[{std_text}]"])  # zsh expands bare brackets


def _same(stated: Normalisation, model: ModelConfig) -> bool:
    pairs = zip((*stated.mean, *stated.std), (*model.mean, *model.std), strict=True)
    return all(abs(theirs - ours) < 1e-3 for theirs, ours in pairs)  # noqa: PLR2004 - some files round to 3 digits


def _own_model(path: Path) -> dict[str, Any] | None:
    """Returns the section `model` of one of our checkpoints, without its classes; None for every other source."""
    if not path.is_file():
        return None
    try:
        model = ModelConfig(**json.loads(_header(path).get(KEY, "null"))["model"])
    except (ValueError, TypeError, KeyError):
        return None  # damage is reported when the tensors are read
    return model.model_dump(mode="json", exclude={"num_classes"})


def _architecture(layout: Layout, weights: Weights) -> dict[str, Any]:
    kernel = next(iter(layout.tensors.get("patch_embed.proj.weight", {}).values()), None)
    hidden = next(iter(layout.tensors["blocks.0.mlp.fc1.weight"].values())).tensor.shape[0]
    found: dict[str, Any] = {
        "width": layout.width,
        "depth": layout.depth,
        "heads": weights.heads or _HEADS.get(layout.width) or max(1, layout.width // _HEAD_WIDTH),
        "mlp_ratio": hidden / layout.width,
        "patch": kernel.tensor.shape[-1] if kernel else 16,
        "qkv_bias": layout.qkv_bias,
        "layer_scale": _LAYER_SCALE if layout.layer_scale else None,
    }
    if layout.stem:  # LV-ViT, also as the backbone of SuperViT; its code has torch's epsilon
        found |= {"embed": "stem", "norm_eps": 1e-5, "residual_scale": _BRANCHES.get(layout.width, 0.5)}
    if layout.dense_head:
        found["dense_head"] = dense_head_of(layout)
    if layout.kind == SUPERVIT:
        found["align_corners"] = True
    if layout.temporal and "time_embed" in layout.tensors:
        found["num_frames"] = len(next(iter(layout.tensors["time_embed"].values())).tensor)
    return found


def dense_head_of(layout: Layout) -> float:
    """Returns the weight of the head on patches in the code that a layout comes from: of SuperViT, or of LV-ViT."""
    return 0.25 if layout.kind == SUPERVIT else 0.5


def _of_folder(folder: Path) -> Normalisation | None:
    """Reads transformers' `preprocessor_config.json`, or the `config.json` of a timm model on Hugging Face."""
    for name, inner, mean, std in (
        ("preprocessor_config.json", None, "image_mean", "image_std"),
        ("config.json", "pretrained_cfg", "mean", "std"),
    ):
        try:
            values = parse_json(read_text(folder / name, MAX_CONFIG_BYTES))
        except (OSError, ValueError):
            continue
        found = values.get(inner) if inner and isinstance(values, dict) else values
        if isinstance(found, Mapping):
            both = _rgb(found.get(mean)), _rgb(found.get(std))
            if both[0] and both[1]:
                return Normalisation(both[0], both[1], f"its {name}")
    return None


def _rgb(values: Any) -> Rgb | None:
    try:
        red, green, blue = map(float, values)
    except (TypeError, ValueError):
        return None
    return red, green, blue


def _of_timm(name: str, *, is_file: bool) -> Normalisation | None:
    """Returns the normalisation of a timm model, also for a file that is named after one."""
    stem = Path(name).stem if is_file else name
    settings = timm.get_pretrained_cfg(stem) if timm.is_model(stem) else None
    if settings is None:
        return None
    origin = f"timm's settings of {stem}{', the name of the file' if is_file else ''}"
    mean, std = _rgb(settings.mean), _rgb(settings.std)
    return Normalisation(mean, std, origin) if mean and std else None
