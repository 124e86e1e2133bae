"""Cuts one point out of a model: a plain TimeSformer in the layout of Hugging Face's transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from videoadapt.config.points import Point, canonical
from videoadapt.config.sections import DataConfig, EvaluateConfig, ModelConfig
from videoadapt.errors import UserError, few
from videoadapt.model.embed import resize_frames
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.layouts import NO_LENGTH, split_length, to_hugging_face
from videoadapt.model.weights.load import load_weights
from videoadapt.runtime.files import write_json

_STUDENTS = ("dist_token", "head_dist")  # tensors that points without a distillation token do not use
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # as Pillow numbers them


def require_plain(model: TimeSformer, point: str) -> str:
    """Checks that a point is a TimeSformer without additions of this package.

    Args:
        model: The model.
        point: One of its points, in any spelling.

    Returns:
        The point as `model.points` writes it.

    Raises:
        UserError: The model does not have the point, or the point needs more than a plain TimeSformer has. The message
            names the reason.
    """
    point, config = canonical(point), model.config
    if point not in config.points:
        raise UserError(f"export.point: the model has no point {point}; it has {few(config.points)}")
    reasons = {
        "it drops tokens (keep below 1)": Point.parse(point).keep < 1,
        "it has a distillation token (model.distill_token)": point in model.distilled,
        f"its patches are made by model.embed: {config.embed}, not resize": config.embed != "resize",
        "its length shares weights with the others (model.share_norm, share_patch or share_pos)": config.share_norm
        or config.share_patch
        or config.share_pos,
        "it has no temporal attention (model.temporal)": not config.temporal,
        "it has a head on patches (model.dense_head)": config.dense_head is not None,
        "it has LayerScale (model.layer_scale)": config.layer_scale is not None,
        "its residual branches are scaled (model.residual_scale)": config.residual_scale != 1.0,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError(
            f"export.point: {point} is no plain TimeSformer: {'; '.join(found)}. Leave export.point out for ONNX and "
            "torch.export, which take every point"
        )
    return point


def cut_tensors(model: TimeSformer, point: str) -> dict[str, Tensor]:
    """Returns the tensors of a plain point by the names of Hugging Face's `TimesformerForVideoClassification`."""
    length = str(Point.parse(point).length)
    tensors, position = {}, {}
    for name, tensor in model.state_dict().items():
        base, key = split_length(name)
        if key not in (NO_LENGTH, length) or base.startswith(_STUDENTS):
            continue
        if base.startswith("pos_embed."):
            position[base] = tensor
        else:
            tensors[to_hugging_face(base)] = tensor.float().contiguous()
    rows = torch.cat([position["pos_embed.cls"], position["pos_embed.grid"]])  # (1 + N, D)
    tensors[to_hugging_face("pos_embed")] = rows[None].float()
    times = to_hugging_face("time_embed")
    tensors[times] = tensors[times][None]  # (1, T, D)
    return tensors


def hugging_face_config(model: TimeSformer, point: str) -> dict[str, Any]:
    """Returns the contents of transformers' `config.json` for a plain point."""
    config = model.config
    names = model.class_names or tuple(map(str, range(config.num_classes)))
    return {
        "architectures": ["TimesformerForVideoClassification"],
        "model_type": "timesformer",
        "attention_type": "divided_space_time",
        "image_size": Point.parse(point).length * config.patch,
        "patch_size": config.patch,
        "num_channels": 3,
        "num_frames": config.num_frames,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def processor_config(config: ModelConfig, point: str, evaluate: EvaluateConfig, data: DataConfig) -> dict[str, Any]:
    """Returns the contents of transformers' `preprocessor_config.json`: how the point's pixels are cut from a frame."""
    side = Point.parse(point).length * config.patch
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(side / evaluate.crop_pct)},
        "resample": _RESAMPLE[data.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def write_cut(folder: Path, model: TimeSformer, point: str, evaluate: EvaluateConfig, data: DataConfig) -> None:
    """Writes a plain point as a folder that `TimesformerForVideoClassification.from_pretrained` loads."""
    save_file(cut_tensors(model, point), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "preprocessor_config.json", processor_config(model.config, point, evaluate, data))
    write_json(folder / "config.json", hugging_face_config(model, point))


def cut_logits(folder: Path, model: TimeSformer, point: str, clips: Tensor) -> tuple[Tensor, str]:
    """Computes the logits of a written folder, with transformers where it is installed.

    Args:
        folder: The folder.
        model: The model that the point was cut from.
        point: The point.
        clips: Normalised float clips `(B, C, T, S, S)` of the model's size.

    Returns:
        Logits `(B, classes)`, and the name of the package whose class computed them.
    """
    length = Point.parse(point).length
    side = length * model.config.patch
    frames = clips.transpose(1, 2).flatten(0, 1)  # (B T, C, S, S)
    small = resize_frames(frames, side, align_corners=model.config.align_corners).unflatten(0, (len(clips), -1))
    if importlib.util.find_spec("transformers") is not None:
        from transformers import TimesformerForVideoClassification

        theirs = TimesformerForVideoClassification.from_pretrained(folder).eval()
        return theirs(small).logits, "transformers"  # small is (B, T, C, side, side)
    plain = TimeSformer(model.config.model_copy(update={"points": (str(length),), "size": side})).eval()
    load_weights(plain, folder)
    return plain(small.transpose(1, 2), str(length)), "videoadapt"
