"""Parts of the model that are not trained (`train.freeze`)."""

from __future__ import annotations

from typing import Literal

from videoadapt.model.timesformer import TimeSformer

_HEADS = ("head", "head_dist", "aux_head")


def freeze(model: TimeSformer, parts: Literal["backbone"] | int | None) -> None:
    """Freezes parts of a model: their parameters get no gradient, so that no optimizer moves them.

    The frozen parts come first in the forward pass. torch keeps no activations for them, and the backward pass ends
    where they do.

    Args:
        model: Changed in place.
        parts: `train.freeze`: how many blocks, after the embeddings and tokens; `backbone`: everything but the heads;
            None: nothing.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not _is_frozen(name, parts))


def set_training_mode(model: TimeSformer, parts: Literal["backbone"] | int | None) -> None:
    """Sets the training mode, and the inference mode of the frozen parts.

    In training mode a BatchNorm would move its statistics, and drop path would leave out frozen blocks.
    """
    model.train()
    for name, module in model.named_modules():
        if name and _is_frozen(name, parts):
            module.eval()


def _is_frozen(name: str, parts: Literal["backbone"] | int | None) -> bool:
    """Returns whether a parameter or module, by its name in the model, is frozen."""
    first, _, rest = name.partition(".")
    if parts is None or first in _HEADS:
        return False
    if parts == "backbone":
        return True
    if first == "blocks":
        return bool(rest) and int(rest.partition(".")[0]) < parts  # not the list of all blocks
    return first != "norm"
