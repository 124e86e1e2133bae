"""Label rules: a clip's token-length label is the cheapest point at which the model is right.

Labels are derived from a table of outcomes with one row per clip and point, so that a rule can change without running
the model again. Points are numbered as in `model.points`: 0 is the costliest, the last is the cheapest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from videoadapt.config.cascade import MEASURES, NEVER, Measure
from videoadapt.config.sections import Average
from videoadapt.data.index.sources import Split
from videoadapt.errors import UserError, few

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Choice = npt.NDArray[np.int64]
Interval = tuple[float, float, float]  # a value, and the lower and upper end of its 95 % interval

NO_CLASS = -1  # stands for the prediction where a probability is NaN; equals no truth

# The splits whose clips each source of labels uses.
LABEL_SPLITS: dict[str, tuple[Split, ...]] = {
    "train": ("train",),
    "holdout": ("holdout",),
    "teacher": ("train", "holdout"),
}


def softmax(logits: Floats) -> Floats:
    """Returns probabilities over the last axis, in float64 and in the shape of `logits`."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))  # no overflow: the largest is exp(0)
    return shifted / shifted.sum(-1, keepdims=True)


def average_views(logits: Floats, axis: int | tuple[int, ...], average: Average) -> Floats:
    """Returns the probabilities of several views together, in float64.

    Args:
        logits: Logits of each view, `(..., classes)`.
        axis: The axis, or axes, of the views; they are removed.
        average: `probabilities`: the mean of the views' probabilities. `logits`: the softmax of their mean logits, as
            in TimeSformer's code.
    """
    return probabilities_of_mean(values_to_average(logits, average).mean(axis), average)


def values_to_average(logits: Floats, average: Average) -> Floats:
    """Returns the values of views whose mean is taken: probabilities or logits, in float64."""
    return logits.astype(np.float64) if average == "logits" else softmax(logits)


def probabilities_of_mean(means: Floats, average: Average) -> Floats:
    """Returns the probabilities `(..., classes)` of a mean of `values_to_average`."""
    return softmax(means) if average == "logits" else means


def running_answers(logits: Floats, average: Average) -> Floats:
    """Returns the probabilities of the first view, of the first two together, and so on, in float64.

    The mean over all views of a video is the last of them wherever it is needed, so that a policy which has run all
    views gives the answer of another one to the bit.

    Args:
        logits: Logits of the views of units in the order in which they run (`config.views.view_order`),
            `(units, views, ..., classes)`.
        average: As in `average_views`.

    Returns:
        `(units, views, ..., classes)`.
    """
    values = values_to_average(logits, average)
    counts = np.arange(1, values.shape[1] + 1).reshape(-1, *(1,) * (values.ndim - 2))  # (views, 1, ..., 1)
    return probabilities_of_mean(np.cumsum(values, axis=1) / counts, average)  # `cumsum` adds view after view


def predictions(probabilities: Floats) -> Choice:
    """Returns the number of the best class, `(..., classes)` to `(...)`.

    `NO_CLASS` where a probability is NaN, as after an overflow in bf16. `argmax` would name the first NaN, class 0.
    """
    return np.where(np.isnan(probabilities).any(-1), NO_CLASS, probabilities.argmax(-1))


def confidence(probabilities: Floats, measure: Measure) -> Floats:
    """Computes how sure the model is, between 0 and 1; NaN probabilities give NaN.

    Args:
        probabilities: `(..., classes)`. Of a single class, every measure is its probability.
        measure: `probability`: the probability of the best class. `margin`: the difference between the best and the
            second probability. `entropy`: 1 - entropy / log(classes).

    Returns:
        The confidence, `(...)`.
    """
    if measure == "probability" or probabilities.shape[-1] == 1:
        return probabilities.max(-1)
    if measure == "margin":
        return np.diff(np.partition(probabilities, -2)[..., -2:])[..., 0]  # the best minus the second
    logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))  # 0 log 0 counts as 0
    # Rounding may give less than 0 where all classes are equally probable.
    return np.maximum(1 + (probabilities * logs).sum(-1) / np.log(probabilities.shape[-1]), 0.0)


def confidences(probabilities: Floats) -> dict[Measure, Floats]:
    """Returns `confidence` by every measure."""
    return {measure: confidence(probabilities, measure) for measure in MEASURES}


def outcome_table(
    videos: Sequence[str], clips: npt.NDArray[np.int64], truth: Choice, probabilities: Floats, points: Sequence[str]
) -> pd.DataFrame:
    """Makes the table of outcomes, one row per clip and point.

    Args:
        videos: Video of each clip.
        clips: Number of each clip within its video, `(clips,)`.
        truth: Class number of each clip, `(clips,)`.
        probabilities: Means over the crops of each clip, `(clips, points, classes)`.
        points: The points of the model.

    Returns:
        The table. `p_true` is the probability of the true class. `margin` is `p_true` minus the highest probability of
        another class, negative where the model is wrong. `confidence_*` are the measures of `confidence`,
        which do not read the truth.
    """
    count = len(truth)
    prediction = predictions(probabilities)  # (clips, points)
    p_true = np.take_along_axis(probabilities, truth[:, None, None], axis=2)[..., 0]  # (clips, points)
    others = probabilities.copy()
    np.put_along_axis(others, truth[:, None, None], -np.inf, axis=2)  # so that max finds the best wrong class
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
    """Reads where the model is right from a table of outcomes.

    Args:
        table: The table, in any order; it may have further points. Classes are numbers, or names as in the table of
            `label`.
        points: The points of the model.
        source: The label source. With `teacher`, a point is right where it agrees with the costliest point; the truth
            is not read.

    Returns:
        The clips as a table of `video, clip`, and whether the model is right on each at each point, `(clips, points)`.

    Raises:
        UserError: The table has no outcomes for a point.
    """
    answers = table.pivot(index=["video", "clip"], columns="point", values="prediction")
    missing = set(points) - set(answers.columns)
    if missing:
        raise UserError(f"label table: has no outcomes for the points {few(sorted(missing))}; run `label` again")
    # With `teacher`, the costliest point is the truth.
    wanted = answers[points[0]] if source == "teacher" else table.groupby(["video", "clip"])["truth"].first()
    # (clips, points) == (clips, 1); the two tables may list the clips in different orders
    given = answers[list(points)].to_numpy()
    answered = pd.notna(given) & (given != NO_CLASS)
    right = (given == wanted.loc[answers.index].to_numpy()[:, None]) & answered
    return answers.index.to_frame(index=False), right


def confidence_matrix(table: pd.DataFrame, points: Sequence[str], measure: Measure) -> Floats:
    """Returns the confidences in a table of outcomes at some points, `(clips, points)`.

    Raises:
        UserError: The table has no confidences at a point, or none at all because an older version made it.
    """
    column = f"confidence_{measure}"
    missing = set(points) - set(table["point"]) if column in table else set(points)
    if missing:
        raise UserError(f"label table: has no confidences at {few(sorted(missing))}; run `label` again")
    matrix: Floats = table.pivot(index=["video", "clip"], columns="point", values=column)[list(points)].to_numpy()
    return matrix


def choose_labels(right: Bools, none_right: Literal["longest", "cheapest", "exclude"]) -> Choice:
    """Returns each clip's label: the cheapest point at which the model is right, as its number (ReViT, section 3.3).

    Args:
        right: Whether the model is right, `(clips, points)`.
        none_right: The label of a clip on which no point is right: the `longest` (costliest) point, the `cheapest`,
            or -1 (`exclude`).

    Returns:
        The labels, `(clips,)`.
    """
    labels = last_true(right)
    fallback = {"longest": 0, "cheapest": right.shape[1] - 1, "exclude": -1}[none_right]
    return np.where(right.any(axis=1), labels, fallback)


def last_true(flags: Bools) -> Choice:
    """Returns the last true column of each row, the cheapest point that qualifies; the last column if none does."""
    return flags.shape[1] - 1 - np.argmax(flags[:, ::-1], axis=1)  # argmax finds the first true, or 0 if there is none


def cheapest_sufficient(probabilities: Floats, threshold: float) -> Choice:
    """Returns the cheapest point of each clip that suffices with probability `threshold`, `(clips,)`.

    A point suffices if the label is that point or a cheaper one, so the probabilities add up from the cheapest.

    Args:
        probabilities: Probability of each point to be the label, `(clips, points)`. With a sum of NaN, no point but
            the costliest suffices.
        threshold: Between 0 and 1; above 1, every clip gets the costliest point.
    """
    suffices = np.cumsum(probabilities[:, ::-1], axis=1)[:, ::-1]  # (clips, points): of this point or a cheaper one
    suffices[:, 0] = np.inf  # the costliest point always suffices, also with NaN or rounding
    return last_true(suffices >= threshold)


def fit_threshold(confidences: Floats, costs: Floats, mean_cost: float) -> float:
    """Finds the highest threshold, one for a whole cascade, at which a clip costs at most `mean_cost` on average.

    The truth is not needed. As in `Cascade`, a clip with a NaN confidence goes on to the next point.

    Args:
        confidences: `(clips, points)`, points in the order of the cascade.
        costs: Cost of each of these points, `(points,)`, in the unit of `mean_cost`.
        mean_cost: The mean cost of a clip.

    Returns:
        The threshold. `NEVER` if the mean cost pays for all points of every clip.

    Raises:
        UserError: The lowest threshold costs more. It is 0: every clip ends at the first point, apart from NaN.
    """

    def cost(threshold: float) -> float:
        goes_on = np.cumprod(~(confidences[:, :-1] >= threshold), axis=1)  # whether a clip runs each further point
        return float(costs[0] + (goes_on @ costs[1:]).mean())

    # The mean cost only changes at confidences that occur. NaN is no threshold, and would break the bisection.
    found = confidences[:, :-1]
    candidates = np.unique(np.append(found[~np.isnan(found)], [0.0, NEVER]))
    if cost(candidates[0]) > mean_cost:
        raise UserError(
            f"cascade: its first point alone costs {cost(candidates[0]):.3g}, which is more than cost={mean_cost:g}; "
            "begin with a cheaper point of model.points, or allow a higher cost"
        )
    # The cost rises with the threshold, so the last candidate that is cheap enough is the answer.
    return float(candidates[bisect_right(candidates, mean_cost, key=cost) - 1])
