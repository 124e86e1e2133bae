"""Asks how well the points of a run could be chosen from the answer of a cheap point, beside its assigner and cascades.

    python tools/probe_routing.py RUN [--point 4]    # a run with labels and an evaluation of one view for each video

An assigner sees pixels, and with few labels it may learn nothing. Here the cheap point has run already, and logistic
regressions predict from it which points are right: from its confidence alone, as the policy `leap` does; from its
probabilities, too ("answer"); or from its class token, too ("features"). They are fitted to the clips that `label`
read, with the L2 penalty that cross-validation over their sources prefers. A clip that needs another point pays for
both. Nothing is fitted to the evaluated videos; each row is one price of a MAC, given before, and lies beside the most
accurate random mixture of two fixed points of the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader

import videoadapt as va
from one_line_failures import one_line_failures
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
from videoadapt.routing.label_inputs import outcomes_path
from videoadapt.routing.label_rules import Bools, Choice, Floats, confidences, right_matrix, softmax
from videoadapt.routing.leap_rules import Logistic, answer_features, mean_cost, worth_most
from videoadapt.runtime.console import Bar, percent, print_table
from videoadapt.runtime.files import read_parquet

PRICES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the costliest point's MACs, in probability of a right answer
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_FOLDS = 5
_BATCH = 16


def main(
    run: Path, point: Annotated[str, typer.Option(help="The point that runs first. Default: the cheapest.")] = ""
) -> None:
    """Prints the curves of a run."""
    config = load_config(run)
    points = list(config.model.points)
    if point and point not in points:
        raise UserError(f"--point {point}: this run has {', '.join(points)}")
    first = points.index(point or points[-1])
    model = load_model(run).eval()
    manifest = Manifest.load(manifest_path(run))
    labelled, right = right_matrix(read_parquet(outcomes_path(run), "run `label` first"), points)
    tests = read_evaluated_table(run, "videos", ["policy", "video", "source", "right", "failed"])
    tests = tests[~tests["failed"]]  # no point has an answer on them
    fixed = [tests[tests["policy"] == f"fixed:{each}"].set_index("video") for each in points]
    costs = np.array([point_macs(config.model)[each] for each in points], dtype=float)
    shares = costs / costs.max()
    rights = np.stack([each["right"].to_numpy() for each in fixed], axis=1)
    sources = pd.factorize(fixed[0]["source"])[0]
    measured = [Measured(f"fixed:{p}", c, rights[:, i]) for i, (p, c) in enumerate(zip(points, costs, strict=True))]
    seen = _answers(model, manifest, config, labelled["video"], points[first])
    new = _answers(model, manifest, config, fixed[0].index, points[first])
    groups = pd.factorize(of_videos(manifest, labelled["video"]).sources)[0]
    for name in ("confidence", "answer", "features"):
        chances = fit(seen[name], right, groups)(new[name])
        rows = []
        for price in PRICES:
            choice = worth_most(chances, shares, first, price)
            mean = costs.max() * mean_cost(choice, shares, first)
            own = Measured("", mean, rights[np.arange(len(choice)), choice])
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


def fit(features: Floats, right: Bools, groups: Choice) -> Logistic:
    """Returns the regressions with the penalty that folds by group prefer.

    Raises:
        UserError: There is one group only.
    """
    folds = min(_FOLDS, int(groups.max()) + 1)
    if folds == 1:
        raise UserError("all labelled clips are of one source; cross-validation needs two or more")
    fold = groups % folds

    def loss(penalty: float, k: int) -> float:
        chances = Logistic.fit(features[fold != k], right[fold != k], penalty)(features[fold == k])
        return float(-np.log(np.clip(np.where(right[fold == k], chances, 1 - chances), 1e-6, 1)).mean())

    losses = [np.mean([loss(penalty, k) for k in range(folds)]) for penalty in PENALTIES]
    return Logistic.fit(features, right, PENALTIES[int(np.argmin(losses))])


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
    sure = answer_features(confidences(p))
    answer = np.concatenate([p, sure], axis=1)
    return {
        "confidence": sure,
        "answer": answer,
        "features": np.concatenate([torch.cat(tokens).double().numpy(), answer], axis=1),
    }


if __name__ == "__main__":
    with one_line_failures():
        typer.run(main)
