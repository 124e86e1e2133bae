"""The token-length assigner: a small network that predicts a clip's label from a few small frames.

Two families: EfficientNet-B0 on each frame (ReViT), or a few convolutions on all frames at once. The assigner decides
once per clip, and the crops of the clip share the decision (ReViT, section 3.3, decides once per image).
"""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from videoadapt.config.sections import AssignConfig
from videoadapt.errors import CheckpointError
from videoadapt.model.checkpoint import Checkpoint, Checkpoints, Guard, find_checkpoint, load_tensors

# The stages of EfficientNet-B0 in timm's notation: type, repeats, kernel, stride, expansion, channels, squeeze ratio.
B0_STAGES = (
    "ds_r1_k3_s1_e1_c16_se0.25",
    "ir_r2_k3_s2_e6_c24_se0.25",
    "ir_r2_k5_s2_e6_c40_se0.25",
    "ir_r3_k3_s2_e6_c80_se0.25",
    "ir_r3_k5_s1_e6_c112_se0.25",
    "ir_r4_k5_s2_e6_c192_se0.25",
    "ir_r1_k3_s1_e6_c320_se0.25",
)
STEM_CHANNELS = 32
FIRST_CHANNELS = (
    32  # of the family `convolutions`, times `assign.channel_multiplier`; each further one has twice as many
)


class Convolutions(nn.Sequential):
    """Convolutions with stride 2 on a stack of frames, `(B, C * A, s, s)` to features `(B, num_features)`.

    The frames are channels, so the first convolution can take their differences, which show motion, and every layer
    runs once for a clip and not once for each frame.

    Args:
        config: Number of frames, number of convolutions, and their width.
    """

    def __init__(self, config: AssignConfig) -> None:
        layers: list[nn.Module] = []
        channels = 3 * config.frames
        for stage in range(config.stages):
            wider = max(1, round(FIRST_CHANNELS * config.channel_multiplier)) * 2**stage
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = channels


def _efficientnet(config: AssignConfig) -> nn.Module:
    # timm takes a second to import, and most commands need no assigner
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.efficientnet import EfficientNet

    rounded = partial(round_channels, multiplier=config.channel_multiplier)
    return EfficientNet(
        block_args=decode_arch_def([[stage] for stage in B0_STAGES[: config.stages]]),
        num_features=rounded(1280),
        stem_size=STEM_CHANNELS,
        round_chs_fn=rounded,
        act_layer=nn.SiLU,
        num_classes=0,  # no head: the network returns features
    )


class Assigner(nn.Module):
    """A small network and a linear head.

    `efficientnet` sees each frame alone; the head gets the frames' mean and standard deviation, since the standard
    deviation shows motion, which the mean hides. `convolutions` see all frames together.

    Args:
        config: Family, width and depth of the network, and number and size of the frames.
        points: Number of points to choose from.
    """

    def __init__(self, config: AssignConfig, points: int) -> None:
        super().__init__()
        self.config = config
        by_frame = config.family == "efficientnet"
        self.net = _efficientnet(config) if by_frame else Convolutions(config)
        features = int(self.net.num_features)  # type: ignore[arg-type]
        self.head = nn.Linear(2 * features if by_frame else features, points)

    def forward(self, thumbnails: Tensor) -> Tensor:
        """Returns logits, `(B, points)`.

        Args:
            thumbnails: uint8 `(B, C, A, s, s)`: A frames of each clip.
        """
        if self.config.family == "convolutions":
            stack = thumbnails.flatten(1, 2)  # (B, C A, s, s)
            # Centred, in one pass over the pixels. The first batch norm divides by their scale.
            logits: Tensor = self.head(self.net(stack.to(self.head.weight.dtype).sub_(127.5)))
            return logits  # (B, points)
        frames = rearrange(thumbnails, "b c a h w -> (b a) c h w")  # the network sees each frame alone
        x = self.net(frames.to(self.head.weight.dtype) / 127.5 - 1.0)  # 0..255 to -1..1; (B A, features)
        x = rearrange(x, "(b a) f -> b a f", b=thumbnails.shape[0])  # (B, A, features)
        # Equal frames have variance 0, where the square root has an infinite gradient.
        spread = (x.var(1, correction=0) + 1e-6).sqrt()  # (B, features)
        return self.head(torch.cat([x.mean(1), spread], dim=-1))  # (B, 2 features) to (B, points)

    @torch.inference_mode()
    def probabilities(self, thumbnails: Tensor) -> Tensor:
        """Returns the probability of each point to be the clip's label, float32 `(B, points)`; see `forward`."""
        return self(thumbnails).float().softmax(-1)

    def for_inference(self) -> Assigner:
        """Returns a copy in eval mode that computes the same up to rounding, about 2.5 times as fast on CPUs.

        Each batch norm is folded into the convolution before it, and the weights lie as the fastest kernels want them.
        """
        copied = copy.deepcopy(self).eval()
        _fold_batch_norms(copied.net)
        return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fold_batch_norms(module: nn.Module) -> None:
    """Folds each BatchNorm into the convolution before it, in place. `torch.fx` would miss timm's own BatchNorm."""
    for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, getattr(norm, "act", nn.Identity()))  # timm's holds the activation, too
    for child in module.children():
        _fold_batch_norms(child)


@lru_cache(maxsize=16)  # the pass takes 0.2 s, and every prediction asks for it
def assigner_macs(config: AssignConfig, points: int) -> int:
    """Returns the MACs of one decision (one clip), counted by torch on a forward pass without data.

    Args:
        config: The size of the assigner.
        points: Number of points that it chooses from.
    """
    with torch.device("meta"):  # shapes without memory
        assigner = Assigner(config, points).eval()
        thumbnails = torch.zeros(1, 3, config.frames, config.size, config.size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        assigner(thumbnails)
    return counter.get_total_flops() // 2  # torch counts multiplications and additions apart


def expected_cost(logits: Tensor, wrong: Tensor, costs: Tensor, *, mu: float) -> Tensor:
    """Computes `sum_p q_p (cost_p / cost_max + mu wrong_p)`: the expected cost if a clip's point is drawn from q.

    Args:
        logits: The logits of the assigner, `(B, points)`; q is their softmax.
        wrong: Float `(B, points)`, 1 where the model is wrong on the clip, 0 where it is right.
        costs: Cost of each point, `(points,)`, in any unit.
        mu: Price of a wrong answer, in units of the costliest point's cost.

    Returns:
        The expected cost of each clip, `(B,)`.
    """
    # (points,) + (B, points): the costs broadcast over the clips
    return (logits.float().softmax(-1) * (costs / costs.max() + mu * wrong)).sum(-1)


def assigner_loss(logits: Tensor, labels: Tensor, wrong: Tensor, costs: Tensor, config: AssignConfig) -> Tensor:
    """Returns the mean loss of a batch: cross-entropy with the labels (ReViT), or `expected_cost`.

    Args:
        logits: The logits of the assigner, `(B, points)`.
        labels: Number of each clip's label, `(B,)`.
        wrong: As in `expected_cost`.
        costs: As in `expected_cost`.
        config: Chooses the loss, and holds `mu`.
    """
    if config.loss == "ce":
        return F.cross_entropy(logits.float(), labels)
    return expected_cost(logits, wrong, costs, mu=config.mu).mean()


def assigner_checkpoints(run: Path, guard: Guard = nullcontext) -> Checkpoints:
    """Returns the checkpoints of stage 2 in a run folder, written inside `guard`."""
    return Checkpoints(run / "assigner", "assigner", guard=guard)


def load_assigner(source: str | Path) -> tuple[Assigner, tuple[str, ...], float]:
    """Loads the assigner of a checkpoint file or of a run folder.

    Returns:
        The assigner in eval mode, the points that it was fitted for (costliest first), and its threshold.

    Raises:
        CheckpointError: There is no fitted assigner, or its file cannot be read.
    """
    return restore_assigner(find_checkpoint(Path(source), assigner_checkpoints))


def restore_assigner(checkpoint: Checkpoint) -> tuple[Assigner, tuple[str, ...], float]:
    """Builds the assigner of a checkpoint; returns and raises as `load_assigner`."""
    if checkpoint.meta.get("threshold", 0.0) is None:
        # `assign` writes the threshold last, after all epochs.
        raise CheckpointError(
            f"{checkpoint.path}: this assigner is not fitted to the end; run `videoadapt assign` again"
        )
    points = tuple(map(str, checkpoint.value("points", list)))
    threshold, settings = checkpoint.value("threshold", float), checkpoint.value("assign", dict)
    try:
        config = AssignConfig(**settings)
    except ValueError as error:  # pydantic's
        raise CheckpointError(
            f"{checkpoint.path}: its settings describe no assigner ({' '.join(str(error).split())[:200]})"
        ) from None
    assigner = Assigner(config, len(points))
    load_tensors(assigner, checkpoint.tensors_under("model"), checkpoint.path)
    return assigner.eval(), points, threshold
