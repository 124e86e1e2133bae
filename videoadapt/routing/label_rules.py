"""Token-length labels: the cheapest point at which the model is right on a clip, derived from a table of outcomes.

The table has one row per clip and point; labels are derived from it, so that a rule can change without running the
model again. Points are numbered as in `model.points`: 0 is the costliest, the last the cheapest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from videoadapt.config.cascade import MEASURES, Measure
from videoadapt.errors import UserError

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Choice = npt.NDArray[np.int64]

# the splits whose clips each source of labels uses
LABEL_SPLITS = {"train": ("train",), "holdout": ("holdout",), "teacher": ("train", "holdout")}


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def confidence(probabilities: Floats, measure: Measure) -> Floats:
    """How sure an answer is, 0 to 1, from the probabilities of 2 or more classes, `(..., classes)` to `(...)`.

    The best class's probability; its margin over the second; or 1 - entropy / log(classes).
    """
    if measure == "probability":
        return probabilities.max(-1)
    if measure == "margin":
        return np.diff(np.partition(probabilities, -2)[..., -2:])[..., 0]
    surprise = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    return 1 + (probabilities * surprise).sum(-1) / np.log(probabilities.shape[-1])


def confidences(probabilities: Floats) -> dict[Measure, Floats]:
    """Returns `confidence` by every measure."""
    return {measure: confidence(probabilities, measure) for measure in MEASURES}


def outcome_table(
    videos: Sequence[str], clips: npt.NDArray[np.int64], truth: Choice, probabilities: Floats, points: Sequence[str]
) -> pd.DataFrame:
    """One row per clip and point, from probabilities `(clips, points, classes)` that are means over a clip's crops.

    `p_true` is the probability of the truth, `margin` how far it lies above the best other class (below: negative).
    `confidence_*` are the measures of `confidence`, which do not know the truth.
    """
    count = len(truth)
    prediction = probabilities.argmax(-1)  # (clips, points)
    p_true = np.take_along_axis(probabilities, truth[:, None, None], axis=2)[..., 0]
    others = probabilities.copy()
    np.put_along_axis(others, truth[:, None, None], -np.inf, axis=2)
    return pd.DataFrame(
        {
            "video": np.repeat(np.asarray(videos, dtype=object), len(points)),
            "clip": np.repeat(clips, len(points)),
            "point": np.tile(np.asarray(points, dtype=object), count),
            "truth": np.repeat(truth, len(points)),
            "prediction": prediction.ravel(),
            "right": (prediction == truth[:, None]).ravel(),
            "p_true": p_true.ravel(),
            "margin": (p_true - others.max(-1)).ravel(),
            **{f"confidence_{measure}": sure.ravel() for measure, sure in confidences(probabilities).items()},
        }
    )


def right_matrix(table: pd.DataFrame, points: Sequence[str], *, source: str = "train") -> tuple[pd.DataFrame, Bools]:
    """The clips of a table (`video, clip`) and whether the model is right on each at each point, `(clips, points)`.

    With source `teacher`, right means that a point agrees with the costliest one; the truth is not used.
    """
    predictions = table.pivot(index=["video", "clip"], columns="point", values="prediction")
    missing = set(points) - set(predictions.columns)
    if missing:
        raise UserError(f"label table: has no outcomes for the points {', '.join(sorted(missing))}; run `label` again")
    wanted = predictions[points[0]] if source == "teacher" else table.groupby(["video", "clip"])["truth"].first()
    right = predictions[list(points)].to_numpy() == wanted.loc[predictions.index].to_numpy()[:, None]
    return predictions.index.to_frame(index=False), right


def confidence_matrix(table: pd.DataFrame, points: Sequence[str], measure: Measure) -> Floats:
    """How sure the model is of each clip of a table at some points, `(clips, points)`."""
    column = f"confidence_{measure}"
    missing = set(points) - set(table["point"]) if column in table else set(points)
    if missing:
        raise UserError(f"label table: has no confidences at {', '.join(sorted(missing))}; run `label` again")
    matrix: Floats = table.pivot(index=["video", "clip"], columns="point", values=column)[list(points)].to_numpy()
    return matrix


def choose_labels(right: Bools, none_right: Literal["longest", "cheapest", "exclude"]) -> Choice:
    """The label of each clip, `(clips, points)` to `(clips,)`: its cheapest right point; -1 for a clip left out."""
    labels = last_true(right)
    fallback = {"longest": 0, "cheapest": right.shape[1] - 1, "exclude": -1}[none_right]
    return np.where(right.any(axis=1), labels, fallback)


def last_true(flags: Bools) -> Choice:
    """The last true column of each row: the cheapest point that qualifies; the last column where none does."""
    return flags.shape[1] - 1 - np.argmax(flags[:, ::-1], axis=1)


def cheapest_sufficient(probabilities: Floats, threshold: float) -> Choice:
    """The cheapest point that suffices with probability `threshold`, from label probabilities `(clips, points)`.

    A point suffices where the label is that point or a cheaper one, so the probabilities add up from the cheapest.
    """
    suffices = np.cumsum(probabilities[:, ::-1], axis=1)[:, ::-1]
    suffices[:, 0] = np.inf  # the costliest always does
    return last_true(suffices >= threshold)


def choose_threshold(probabilities: Floats, right: Bools, costs: Floats, *, tolerance: float) -> float:
    """The threshold of least mean cost that loses at most `tolerance` of the accuracy of the costliest point.

    Where none is so careful, it is 2: no probability reaches it, so that every clip gets the costliest point.

    `probabilities` and `right` are `(clips, points)` of clips that the assigner was not fitted on.
    """
    best, least = 2.0, np.inf
    allowed = right[:, 0].mean() - tolerance - 1e-12
    for threshold in np.linspace(0.5, 0.995, 100):
        choice = cheapest_sufficient(probabilities, float(threshold))
        accuracy, cost = right[np.arange(len(choice)), choice].mean(), costs[choice].mean()
        if accuracy >= allowed and cost < least:
            best, least = float(threshold), cost
    return best


def fit_threshold(confidences: Floats, costs: Floats, mean_cost: float) -> float:
    """Finds the highest threshold, one for a whole cascade, at which a clip costs at most `mean_cost` on average.

    The truth is not needed. As in `Cascade`, a clip with a NaN confidence goes on to the next point.

    Args:
        confidences: `(clips, points)`, points in the order of the cascade.
        costs: Cost of each of these points, `(points,)`, in the unit of `mean_cost`.
        mean_cost: The mean cost of a clip.

    Returns:
        The threshold. 2 if the mean cost pays for all points of every clip: no confidence reaches 2.

    Raises:
        UserError: The lowest threshold costs more. It is 0: every clip ends at the first point, apart from NaN.
    """

    def cost(threshold: float) -> float:
        goes_on = np.cumprod(~(confidences[:, :-1] >= threshold), axis=1)  # whether a clip runs each further point
        return float(costs[0] + (goes_on @ costs[1:]).mean())

    # The mean cost only changes at confidences that occur. NaN is no threshold, and would break the bisection.
    found = confidences[:, :-1]
    candidates = np.unique(np.append(found[~np.isnan(found)], [0.0, 2.0]))
    if cost(candidates[0]) > mean_cost:
        raise UserError(
            f"cascade: its first point alone costs {cost(candidates[0]):.3g}, which is more than {mean_cost:g}"
        )
    return float(candidates[bisect_right(candidates, mean_cost, key=cost) - 1])
