"""Compares a policy with fixed points: would one cheaper point, or a random mixture of two, have been as good?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from videoadapt.evaluation.evaluated import gain_over_mixtures, reported_policy
from videoadapt.evaluation.intervals import bootstrap_interval, paired_difference
from videoadapt.routing.label_rules import Bools, Choice, Interval
from videoadapt.runtime.console import in_points, percent


class Measured(NamedTuple):
    """The mean cost of a policy on some videos, and its answers."""

    name: str
    macs: float
    right: Bools  # (videos,)


@dataclass(frozen=True)
class AgainstFixed:
    """A policy beside the fixed points, on the same videos. The names are keys of `evaluate.json`.

    Attributes:
        mixture: The random mixture of at most two fixed points that costs the same and is the most accurate: the
            fraction of the clips by policy, such as `{"fixed:14": 0.3, "fixed:7": 0.7}`.
        difference_to_mixture: Top-1 minus that of the mixture. Routing pays where it is above 0.
        cheaper_fixed: The most accurate of the fixed points that cost less and are not significantly less accurate;
            None if there is none.
        difference_to_cheaper_fixed: Top-1 minus that of this point.
    """

    mixture: dict[str, float]
    difference_to_mixture: Interval
    cheaper_fixed: str | None
    difference_to_cheaper_fixed: Interval | None


def against_fixed(policy: Measured, fixed: Sequence[Measured], sources: Choice | None = None) -> AgainstFixed | None:
    """Compares a policy with fixed points on the same videos.

    Args:
        policy: The policy.
        fixed: The fixed points.
        sources: Number of each video's source, `(videos,)`; None: each video is its own.

    Returns:
        The comparison; None if the policy costs less than every fixed point, or there is none.
    """
    mixture = _best_mixture(policy.macs, fixed) if fixed else None
    if mixture is None:
        return None
    differences = [
        (point, paired_difference(policy.right, point.right, sources=sources))
        for point in fixed
        if point.macs < policy.macs
    ]
    as_good = [(point, each) for point, each in differences if each[1] <= 0]
    cheaper, difference = min(as_good, key=lambda pair: (pair[1][0], pair[0].macs), default=(None, None))
    a, b, fraction = mixture
    return AgainstFixed(
        mixture={a.name: fraction} | ({b.name: 1 - fraction} if fraction < 1 else {}),
        difference_to_mixture=_difference_to_mixture(policy, *mixture, sources),
        cheaper_fixed=cheaper.name if cheaper else None,
        difference_to_cheaper_fixed=difference,
    )


def favoured_policy(policies: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str, str] | None:
    """Returns the policy that an evaluation favours over another one, and why.

    A policy that is proven to route well itself (`is_proven`) needs no other. Otherwise it is `proven_policy`; without
    one, a fixed point: a cheaper one that is not significantly less accurate; or, if the policy lies below the line
    between the fixed points, the end of the line that is nearer in cost; or the costliest point, if the policy is
    significantly less accurate.

    Args:
        policies: The rows of `evaluate.json`, by policy name. The first is the costliest point.
        name: The policy.

    Returns:
        The name of the favoured policy, and the reason in words; None if the evaluation favours the given one, or has
        not compared it.
    """
    row, costliest = policies.get(name, {}), next(iter(policies))
    if "mixture" not in row or is_proven(row):
        return None
    best = proven_policy(policies)
    if best is not None:
        return best, f"{worth(policies, best)}; {name} saves {percent(row['macs_saved'])} %"
    if cheaper := row["cheaper_fixed"]:
        less = percent(1 - policies[cheaper]["macs_per_video"] / row["macs_per_video"])
        difference = in_points(row["difference_to_cheaper_fixed"])
        return cheaper, (
            f"it costs {less} % less and is not significantly less accurate ({name} minus {cheaper}: {difference})"
        )
    mixture: Mapping[str, float] = row["mixture"]
    if row["difference_to_mixture"][0] < 0:
        mixed = " and ".join(f"{fraction:.0%} {point}" for point, fraction in mixture.items())
        difference = in_points(row["difference_to_mixture"])
        return max(mixture, key=lambda point: mixture[point]), (
            f"{name} lies below the line between the fixed points ({difference} against {mixed} by chance, at the same "
            "MACs)"
        )
    if row["difference_to_costliest"][2] < 0:
        return costliest, f"{name} is significantly less accurate ({in_points(row['difference_to_costliest'])})"
    return None


def proven_policy(policies: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns `reported_policy` if it is proven to route well; None otherwise."""
    best = reported_policy(policies)
    return best if is_proven(policies[best]) else None


def is_proven(row: Mapping[str, Any]) -> bool:
    """Returns whether a policy is above mixtures of fixed points beyond its interval, and no cheaper point suffices."""
    return gain_over_mixtures(row) > 0 and row["difference_to_mixture"][1] > 0 and row["cheaper_fixed"] is None


def worth(policies: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Returns in words what a policy saves and loses against the costliest point, and gains over mixtures."""
    row = policies[name]
    return (
        f"it saves {percent(row['macs_saved'])} % at {in_points(row['difference_to_costliest'])} to "
        f"{next(iter(policies))}, and gains {in_points(row['difference_to_mixture'])} over mixtures of fixed points"
    )


def sufficient_fixed(policies: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the cheapest fixed point that is not significantly less accurate than the costliest one.

    Args:
        policies: The rows of `evaluate.json`. The first one is the costliest point.

    Returns:
        The name of the policy; None if no cheaper point is as good, or all points cost the same.
    """
    costliest, *others = policies
    good = [name for name in others if name.startswith("fixed:") and policies[name]["difference_to_costliest"][2] >= 0]
    cheapest = max(good, key=lambda name: policies[name]["macs_saved"], default=costliest)
    return cheapest if policies[cheapest]["macs_saved"] > policies[costliest]["macs_saved"] else None


def _best_mixture(macs: float, fixed: Sequence[Measured]) -> tuple[Measured, Measured, float] | None:
    """Returns two fixed points and the fraction of the first one, for the most accurate mixture of these MACs."""
    costliest = max(fixed, key=lambda point: point.macs)
    if macs >= costliest.macs:
        return costliest, costliest, 1.0
    mixtures = [
        (a, b, (macs - b.macs) / (a.macs - b.macs)) for a, b in product(fixed, fixed) if a.macs > macs >= b.macs
    ]
    return max(
        mixtures, key=lambda each: each[2] * each[0].right.mean() + (1 - each[2]) * each[1].right.mean(), default=None
    )


def _difference_to_mixture(
    policy: Measured, a: Measured, b: Measured, fraction: float, sources: Choice | None
) -> Interval:
    """Returns the top-1 of a policy minus the expected one of a mixture, with a bootstrap interval."""

    def gain(own: Any, of_a: Any, of_b: Any) -> Any:  # of a video, or of all
        return own * 1.0 - fraction * of_a - (1 - fraction) * of_b

    gains = gain(policy.right, a.right, b.right)  # (videos,)
    kinds = [gain(*outcome) for outcome in product((False, True), repeat=3)]
    return float(gains.sum() / max(len(gains), 1)), *bootstrap_interval(gains, kinds, sources)
