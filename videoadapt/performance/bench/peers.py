"""Other implementations of a config's model, for comparison: Hugging Face's TimeSformer, and timm's ViT for images."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from videoadapt.config.points import Point
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError


def peer_side(config: ModelConfig) -> int:
    """Returns the height and width in pixels of a peer's frames: those of the costliest point."""
    return Point.parse(config.points[0]).length * config.patch


class HuggingFace(nn.Module):
    """Hugging Face's TimeSformer at the costliest length, with random weights. It has no drop path.

    Raises:
        UserError: transformers is not installed, or the config's model has no temporal attention, a stem, or a head on
            patches.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        try:
            from transformers import TimesformerConfig, TimesformerForVideoClassification
        except ImportError as error:
            raise UserError(f"transformers is not installed ({error}); pip install transformers") from None
        if not config.temporal:
            raise UserError(
                "Hugging Face's TimeSformer always has temporal attention; this config has model.temporal=false"
            )
        if config.embed == "stem" or config.dense_head is not None:
            raise UserError("Hugging Face's TimeSformer has neither a stem nor a head on patches")
        sizes: dict[str, Any] = {"image_size": peer_side(config), "patch_size": config.patch}
        sizes |= {"num_frames": config.num_frames, "hidden_size": config.width, "num_hidden_layers": config.depth}
        sizes |= {"num_attention_heads": config.heads, "intermediate_size": int(config.width * config.mlp_ratio)}
        self.model = TimesformerForVideoClassification(TimesformerConfig(**sizes, num_labels=config.num_classes))

    def forward(self, clips: Tensor) -> Tensor:
        """Maps clips `(B, C, T, H, W)` to logits `(B, classes)`."""
        return self.model(clips.transpose(1, 2)).logits


class TimmViT(nn.Module):
    """timm's ViT at the costliest length, with random weights, for models of images.

    Raises:
        UserError: The config's model is not a plain ViT.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.temporal or config.num_frames > 1 or config.embed == "stem" or config.dense_head is not None:
            raise UserError("timm's ViT is a model of single images without a stem and without a head on patches")
        self.model = VisionTransformer(
            img_size=peer_side(config),
            patch_size=config.patch,
            num_classes=config.num_classes,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=config.qkv_bias,
            init_values=config.layer_scale,
        )

    def forward(self, clips: Tensor) -> Tensor:
        """Maps clips `(B, C, 1, H, W)` to logits `(B, classes)`."""
        return self.model(clips[:, :, 0])


def peer_of(config: ModelConfig) -> dict[str, nn.Module]:
    """Returns the peer that a config's model has, by name; empty if it has none or its library is not installed."""
    name, peer = ("Hugging Face", HuggingFace) if config.temporal else ("timm", TimmViT)
    try:
        return {name: peer(config)}
    except UserError:
        return {}
