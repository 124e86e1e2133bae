"""Asks how well the points of a run could be chosen from the answer of a cheap point, beside its assigner and cascades.

    python tools/probe_routing.py RUN [--point 4]    # a run with labels and an evaluation of one view for each video

An assigner sees pixels, and with few labels it may learn nothing. Here the cheap point has run already, and logistic
regressions predict from it which points are right: from its probabilities ("answer"), or from its class token
("features"). They are fitted to the clips that `label` read, with the L2 penalty that cross-validation over their
sources prefers. A clip that needs another point pays for both. Nothing is fitted to the evaluated videos; each row is
one price of a MAC, given before, and lies beside the most accurate random mixture of two fixed points of the same cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader

import videoadapt as va
from record_run import interval
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, load_config
from videoadapt.data.clips.views import preprocess
from videoadapt.data.index.manifest import Manifest, manifest_path
from videoadapt.errors import UserError
from videoadapt.evaluation.against_fixed import Measured, against_fixed
from videoadapt.evaluation.evaluated import read_evaluated_table
from videoadapt.model.checkpoint import load_model
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.label_rules import Bools, Choice, Floats, right_matrix, softmax
from videoadapt.runtime.console import Bar, percent, print_table

PRICES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the costliest point's MACs, in probability of a right answer
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_FOLDS = 5
_BATCH = 16

Chances = Callable[[Floats], Floats]  # (clips, features) to the probability that each point is right (clips, points)


def main(
    run: Path, point: Annotated[str, typer.Option(help="The point that runs first. Default: the cheapest.")] = ""
) -> None:
    """Prints the curves of a run."""
    config = load_config(run)
    points = list(config.model.points)
    first = points.index(point or points[-1])
    model = load_model(run).eval()
    manifest = Manifest.load(manifest_path(run))
    labelled, right = right_matrix(pd.read_parquet(run / "labels" / "outcomes.parquet"), points)
    tests = read_evaluated_table(run, "videos", ["policy", "video", "source", "right"])
    fixed = [tests[tests["policy"] == f"fixed:{each}"].set_index("video") for each in points]
    costs = np.array([point_macs(config.model)[each] for each in points], dtype=float)
    rights = np.stack([each["right"].to_numpy() for each in fixed], axis=1)
    sources = pd.factorize(fixed[0]["source"])[0]
    measured = [Measured(f"fixed:{p}", c, rights[:, i]) for i, (p, c) in enumerate(zip(points, costs, strict=True))]
    seen = _answers(model, manifest, config, labelled["video"], points[first])
    new = _answers(model, manifest, config, fixed[0].index, points[first])
    groups = pd.factorize(of_videos(manifest, labelled["video"]).sources)[0]
    for name in ("answer", "features"):
        chances = fit(seen[name], right, groups)(new[name])
        rows = []
        for price in PRICES:
            choice, macs = choose(chances, costs, first, price)
            own = Measured("", float(macs.mean()), rights[np.arange(len(choice)), choice])
            beside = against_fixed(own, measured, sources)
            mix = " / ".join(percent(float((choice == i).mean())) for i in range(len(points)))
            difference = interval(beside.difference_to_mixture) if beside else ""
            saved = percent(1 - own.macs / costs.max())
            rows.append((f"{price:g}", percent(own.right.mean()), saved, difference, mix))
        title = f"from the {name} of {points[first]}, fitted to {len(right)} clips; {len(rights)} videos"
        print_table(title, ("price", "top-1 %", "MACs saved %", "to the mixture", f"% at {' / '.join(points)}"), rows)


def of_videos(manifest: Manifest, videos: Sequence[str]) -> Manifest:
    """Returns a manifest with these videos in this order."""
    columns = list(manifest.table.columns)
    return Manifest(manifest.table.set_index("video", drop=False).loc[list(videos), columns], manifest.classes)


def choose(chances: Floats, costs: Floats, first: int, price: float) -> tuple[Choice, Floats]:
    """Returns the point of each clip and its cost: the largest chance minus price, where `first` has been paid.

    Args:
        chances: Probability that each point is right, `(clips, points)`.
        costs: MACs of the points, `(points,)`.
        first: The point that every clip runs.
        price: What the MACs of the costliest point cost, in probability.
    """
    further = np.where(np.arange(len(costs)) == first, 0, costs)
    choice = np.argmax(chances - price * further / costs.max(), axis=1)
    return choice, costs[first] + further[choice]


def fit(features: Floats, right: Bools, groups: Choice) -> Chances:
    """Returns logistic regressions, one for each point, with the penalty that folds by group prefer."""
    fold = groups % _FOLDS
    losses = [
        np.mean([_loss(_regress(features[fold != k], right[fold != k], penalty)(features[fold == k]), right[fold == k])
                 for k in range(_FOLDS)])
        for penalty in PENALTIES
    ]  # fmt: skip
    return _regress(features, right, PENALTIES[int(np.argmin(losses))])


def _loss(chances: Floats, right: Bools) -> float:
    return float(-np.log(np.clip(np.where(right, chances, 1 - chances), 1e-6, 1)).mean())


def _regress(features: Floats, right: Bools, penalty: float) -> Chances:
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x, y = torch.from_numpy((features - mean) / deviation), torch.from_numpy(right.astype(float))
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y) + penalty * weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    w, b = weight.detach().numpy(), bias.detach().numpy()
    return lambda new: 1 / (1 + np.exp(-((new - mean) / deviation @ w + b)))


@torch.inference_mode()
def _answers(
    model: TimeSformer, manifest: Manifest, config: Config, videos: Sequence[str], point: str
) -> dict[str, Floats]:
    """Runs a point, and returns `answer` and `features` of each video, `(videos, features)`."""
    tokens: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    dataset = va.ClipDataset(of_videos(manifest, videos), config, views="evaluation")
    logits = []
    with Bar(f"point {point}", total=len(dataset), unit="videos") as bar:
        for clips, *_ in DataLoader(dataset, batch_size=_BATCH):
            if clips.shape[1] != 1:
                raise UserError(f"{config.run.dir}: has {clips.shape[1]} views of a video; expected one")
            logits.append(model(preprocess(model, clips[:, 0], point), point))
            bar.step(len(clips))
    hook.remove()
    p = softmax(torch.cat(logits).double().numpy())
    ranked = -np.sort(-p, axis=1)
    entropy = -(p * np.log(p + 1e-12)).sum(axis=1, keepdims=True)
    answer = np.concatenate([p, ranked[:, :2], ranked[:, :1] - ranked[:, 1:2], entropy], axis=1)
    return {"answer": answer, "features": np.concatenate([torch.cat(tokens).double().numpy(), answer], axis=1)}


if __name__ == "__main__":
    typer.run(main)
