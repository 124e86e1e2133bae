"""Routing: the policy gives each clip its point, clips of one point run in full batches, results return in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from videoadapt.data.clips.views import normalise
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.label_rules import Bools, Choice, Floats, confidence, softmax
from videoadapt.routing.policy import Cascade, Evidence, Policy


@dataclass(frozen=True)
class Routed:
    """The chosen point of each clip, `(clips,)`, and the logits of its views there, `(clips, crops, classes)`."""

    choice: Choice
    logits: Floats


@torch.inference_mode()
def view_logits(model: TimeSformer, views: Tensor, point: str, *, batch: int) -> Tensor:
    """Float32 logits `(V, classes)` on the CPU, of uint8 views `(V, C, T, S, S)`, `batch` views at a time."""
    weight = model.head.weight
    outputs = []
    for part in views.split(batch):
        clips = normalise(part.to(weight.device), model.config.mean, model.config.std, weight.dtype)
        outputs.append(model(clips, point).float())
    return torch.cat(outputs).cpu()


def assign_probabilities(assigner: Assigner, thumbnails: Tensor) -> Floats:
    """The assigner's label probabilities `(clips, points)` of uint8 thumbnails `(clips, C, A, s, s)`."""
    return assigner.probabilities(thumbnails.to(assigner.head.weight.device)).cpu().double().numpy()


def route(
    model: TimeSformer,
    views: Tensor,
    policy: Policy,
    *,
    batch: int,
    thumbnails: Tensor | None = None,
    right: Bools | None = None,
) -> Routed:
    """Runs each clip of uint8 `(clips, crops, C, T, S, S)` at the point that the policy chooses, or along its chain.

    `batch` views run at a time; the results are those of running each clip alone. `thumbnails` are for a policy with
    an assigner, `right` for the oracle.
    """
    if isinstance(policy, Cascade):
        return _run_chain(model, views, policy, batch=batch)
    assigned = None
    if policy.assigner is not None:
        if thumbnails is None:
            raise ValueError(f"policy {policy.name}: needs the clips' thumbnails")
        assigned = assign_probabilities(policy.assigner, thumbnails)
    clips, crops = views.shape[:2]
    choice = policy.choose(Evidence(clips, model.config.points, assigned, right))
    logits = np.empty((clips, crops, model.config.num_classes), np.float32)
    for number, point in enumerate(model.config.points):
        here = np.flatnonzero(choice == number)
        if len(here):
            logits[here] = _run(model, views, here, point, batch=batch)
    return Routed(choice, logits)


def _run(model: TimeSformer, views: Tensor, clips: Choice, point: str, *, batch: int) -> Floats:
    """The logits of some of the clips, `(clips, crops, classes)`."""
    out = view_logits(model, views[torch.from_numpy(clips)].flatten(0, 1), point, batch=batch)
    logits: Floats = out.unflatten(0, (len(clips), views.shape[1])).numpy()
    return logits


def _run_chain(model: TimeSformer, views: Tensor, policy: Cascade, *, batch: int) -> Routed:
    """Each point of the chain in full batches of the clips that none before was sure of."""
    choice = np.empty(len(views), np.int64)
    logits = np.empty((*views.shape[:2], model.config.num_classes), np.float32)
    left = np.arange(len(views))
    for point, threshold in zip(policy.chain, (*policy.thresholds, 0.0), strict=True):  # the last is always sure
        if len(left):
            logits[left] = _run(model, views, left, point, batch=batch)
            choice[left] = model.config.points.index(point)
            left = left[confidence(softmax(logits[left]).mean(1), policy.measure) < threshold]
    return Routed(choice, logits)
