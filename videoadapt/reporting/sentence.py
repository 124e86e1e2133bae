"""The first sentence of the page: what routing saved, at what loss. A bad result is said as plainly as a good one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from videoadapt.errors import plural
from videoadapt.evaluation.evaluated import gain_over_mixtures, routing_policies
from videoadapt.evaluation.intervals import has_interval

_SPACE = "\N{NARROW NO-BREAK SPACE}"
_LEVEL = f"95{_SPACE}%"
_FEW_CLIPS = 16  # fewer are not a sample of the mix of points
_LIKE_ALL = 0.03  # a ratio of MACs that differs by more from that of all clips is said
_SAME = 0.0005  # a change that is written as 0.0 points
Tone = Literal["good", "mixed", "bad", "plain"]


@dataclass(frozen=True)
class Figure:
    """One large number of the first screen."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Headline:
    """The first screen of one run.

    Attributes:
        sentence: What was saved at what loss.
        tone: `good` only if something was saved without a significant loss.
        remarks: What else a reader must know to judge the sentence, a sentence each.
        figures: The numbers behind it.
    """

    sentence: str
    tone: Tone
    remarks: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def points(value: float) -> str:
    """Returns a difference of two fractions in percentage points, with a sign and a true minus."""
    return f"{100 * value:+.1f}".replace("-", "−")


def share(value: float) -> str:
    """Returns a fraction in percent."""
    return f"{100 * value:.1f}{_SPACE}%".replace("-", "−")


def interval(low: float, high: float) -> str:
    """Returns the ends of an interval of a difference, in percentage points."""
    return f"{points(low)} to {points(high)}"


def headline(
    policies: Mapping[str, Mapping[str, Any]],
    reported: str,
    speed: Mapping[str, Any] | None,
    guessing: float | None = None,
    *,
    rounds: int = 0,
    clips: int | None = None,
    calibrated: Collection[str] = (),
) -> Headline:
    """Writes the first screen from the rows of `evaluate.json`.

    Args:
        policies: The rows by policy name. The first is the fixed costliest point.
        reported: The policy that the page is about.
        speed: `speed.policies[reported]`, as far as it was measured.
        guessing: The top-1 of always answering with the largest class, if it is known.
        rounds: Of the measured speed; few rounds have a range, and no interval.
        clips: Of a round; None if it is not known.
        calibrated: The policies that carry a promise of `calibrate`.
    """
    ends = f"{_LEVEL} interval" if has_interval(rounds) else "range"
    timed = f" of {plural(rounds, 'round')} over {plural(clips, 'clip')}" if clips and rounds else ""
    costliest, row = next(iter(policies)), policies[reported]
    promised = [_result(policies, name, calibrated) for name in calibrated if name not in (reported, "assigned")]
    if reported == costliest:
        alone = _fixed_only(policies, reported, guessing)
        return replace(alone, remarks=[*alone.remarks, *promised])
    change, low, high = row["difference_to_costliest"]
    faster = speedup(policies, reported, speed)
    lost, saved = high < 0, row["macs_saved"] > 0
    tone: Tone = "bad" if not saved else "mixed" if lost else "good"
    found = (
        _how_it_works(reported),
        _result(policies, "assigned", calibrated) if reported != "assigned" and "assigned" in policies else "",
        _among_others(policies, reported),
        _no_better_than_guessing(row, guessing),
        _on_the_clock(faster, f"{ends}{timed}"),
        _timed_mix(speed, row["macs_saved"]) if faster else "",
        _few_timed(clips, rounds) if faster else "",
        _beside_chance(row, "difference_to_random", "random routing with the same mix of points"),
        _beside_chance(row, "difference_to_mixture", "random mixtures of fixed points at the same cost"),
        _beside_fixed(policies, row),
        *promised,
    )
    remarks = [text for text in found if text]
    if faster and (faster[0] if faster[1] is None else faster[1]) <= 1 and tone == "good":
        tone = "mixed"
    if tone == "good" and (row.get("cheaper_fixed") or _no_better_than_guessing(row, guessing)):
        tone = "mixed"
    return Headline(
        _result(policies, reported, calibrated),
        tone,
        remarks,
        _figures(row, faster, speed, ends.removesuffix(" interval")),
    )


def speedup(
    policies: Mapping[str, Mapping[str, Any]], name: str, speed: Mapping[str, Any] | None
) -> tuple[float, float | None, float | None] | None:
    """Returns how many times as fast as the costliest point a policy ran, with its interval where it has one."""
    if speed and speed.get("speedup"):
        value, low, high = speed["speedup"]
        return value, low, high
    fixed, own = next(iter(policies.values())).get("clips_per_s"), policies[name].get("clips_per_s")
    return (own / fixed, None, None) if fixed and own else None


def _result(policies: Mapping[str, Mapping[str, Any]], name: str, calibrated: Collection[str]) -> str:
    """Returns in a sentence what a policy saved, at what loss."""
    costliest, row = next(iter(policies)), policies[name]
    kind = "The calibrated policy" if name in calibrated else "The policy"
    subject = "The assigner" if name == "assigned" else f"{kind} {name}"
    return f"{subject} {_saving(row['macs_saved'], costliest)} and {_loss(*row['difference_to_costliest'])}"


def _among_others(policies: Mapping[str, Mapping[str, Any]], reported: str) -> str:
    tried = len(routing_policies(policies))
    if tried <= 1 or gain_over_mixtures(policies[reported]) <= 0:
        return ""
    return (
        f"Of the {tried} policies here that route, {reported} gains most over random mixtures of fixed points, among "
        "those that save and are not proven to lose. It was chosen on these clips, and no interval allows for it."
    )


def _saving(saved: float, costliest: str) -> str:
    against = f"against running every clip at {costliest.removeprefix('fixed:')}"
    if saved > 0:
        return f"saved {share(saved)} of the multiply-adds {against}"
    return f"saved nothing: it took {share(-saved)} more multiply-adds {against}"


def _loss(change: float, low: float, high: float) -> str:
    ends = f"{_LEVEL} interval {interval(low, high)}"
    if high < 0:
        return f"lost {100 * -change:.1f} points of top-1 accuracy ({ends})."
    if low > 0:
        return f"gained {100 * change:.1f} points of top-1 accuracy ({ends})."
    if change == low == high == 0:
        return "gave the same answers."
    if abs(change) < _SAME:
        return f"kept the top-1 accuracy ({points(change)} points, {ends})."
    return f"changed top-1 accuracy by {points(change)} points, which is not significant ({ends})."


def _how_it_works(name: str) -> str:
    """Returns what the kind of a policy is, for a reader who has not seen its name before."""
    if ":views:" in name:
        return "It runs the views of a video one after the other until the answer is sure enough."
    kinds = {
        "assigned": "The assigner is a small network that gives each clip its point.",
        "leap": "A leap runs its first point on each clip, and then at most one other, by how sure the first one is; a "
        "clip that goes on pays for both.",
        "cascade": "A cascade runs its points one after the other until the answer is sure enough; a clip that goes on "
        "pays for all that it ran.",
    }
    return kinds.get(name.partition(":")[0], "")


def _timed_mix(speed: Mapping[str, Any] | None, saved: float) -> str:
    """Returns what the multiply-adds of the timed clips promise, where they are not like all clips."""
    promised = (speed or {}).get("macs_ratio")
    if promised is None or saved >= 1:
        return ""
    of_all = 1 / (1 - saved)
    if abs(promised / of_all - 1) <= _LIKE_ALL:
        return ""
    efficiency = speed["routed_efficiency"][0] if speed and speed.get("routed_efficiency") else 1.0
    return (
        f"By their multiply-adds, the timed clips promise {promised:.2f} times, and all clips {of_all:.2f}: at "
        f"the same efficiency, all clips would run {efficiency * of_all:.2f} times as fast."
    )


def _on_the_clock(faster: tuple[float, float | None, float | None] | None, kind: str) -> str:
    if faster is None:
        return "Its speed was not measured."
    value, low, high = faster
    ends = f" ({low:.2f} to {high:.2f}, the {kind})" if low is not None and high is not None else ""
    if low is not None and low <= 1 < value:
        return f"On the clock it is not significantly faster: {value:.2f} times the clips per second{ends}."
    if value > 1:
        return f"On the clock it ran {value:.2f} times as fast{ends}."
    return f"On the clock it was no faster: {value:.2f} times the clips per second{ends}."


def _few_timed(clips: int | None, rounds: int) -> str:
    if clips is None or (clips >= _FEW_CLIPS and has_interval(rounds)):
        return ""
    return f"This is of {plural(clips, 'clip')} in {plural(rounds, 'round')}, too few to rely on."


def _beside_chance(row: Mapping[str, Any], key: str, chance: str) -> str:
    if key not in row:
        return ""
    change, low, high = row[key]
    ends = f"{points(change)} points, {_LEVEL} interval {interval(low, high)}"
    if low > 0:
        return f"It beats {chance} ({ends})."
    if high < 0:
        return f"It is worse than {chance} ({ends})."
    return f"It is not measurably better than {chance} ({ends})."


def _beside_fixed(policies: Mapping[str, Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    cheaper = row.get("cheaper_fixed")
    if cheaper is None:
        return ""
    saved = share(policies[cheaper]["macs_saved"])
    change, low, high = row["difference_to_cheaper_fixed"]
    return (
        f"Running every clip at {cheaper.removeprefix('fixed:')} saves {saved} and is not significantly less accurate "
        f"(routing against it: {points(change)} points, {_LEVEL} interval {interval(low, high)})."
    )


def _no_better_than_guessing(row: Mapping[str, Any], guessing: float | None) -> str:
    if guessing is None or row["top1_low"] > guessing:
        return ""
    return f"It is not proven to be better than always answering with the largest class ({share(guessing)})."


def _fixed_only(policies: Mapping[str, Mapping[str, Any]], costliest: str, guessing: float | None) -> Headline:
    """Returns the first screen of a run without an assigner or cascade: what its fixed points save and lose."""
    row = policies[costliest]
    ends = f"{100 * row['top1_low']:.1f} to {100 * row['top1_high']:.1f}"
    point, top1 = costliest.removeprefix("fixed:"), share(row["top1"])
    sentence = f"Nothing is routed in this run: the costliest point, {point}, reaches {top1} top-1 ({_LEVEL}: {ends})."
    remarks = [
        f"Running every clip at {name.removeprefix('fixed:')} saves {share(other['macs_saved'])} of the multiply-adds "
        f"and {_loss(*other['difference_to_costliest'])}"
        for name, other in policies.items()
        if name.startswith("fixed:") and name != costliest
    ]
    if warning := _no_better_than_guessing(row, guessing):
        remarks.insert(0, warning)
    return Headline(sentence, "plain", remarks, [Figure("top-1", top1, f"{_LEVEL}: {ends}")])


def _figures(
    row: Mapping[str, Any],
    faster: tuple[float, float | None, float | None] | None,
    speed: Mapping[str, Any] | None,
    kind: str,
) -> list[Figure]:
    change, low, high = row["difference_to_costliest"]
    assigner = ", assigner included" if "difference_to_random" in row else ""  # it imitates the assigner
    figures = [
        Figure("multiply-adds saved", share(row["macs_saved"]), f"mean over clips{assigner}"),
        Figure("top-1, in points", points(change), f"{_LEVEL}: {interval(low, high)}"),
        Figure("top-1", share(row["top1"]), f"{_LEVEL}: {100 * row['top1_low']:.1f} to {100 * row['top1_high']:.1f}"),
    ]
    if faster is not None:
        value, low_s, high_s = faster
        ends = f"{kind}: {low_s:.2f} to {high_s:.2f}" if low_s is not None and high_s is not None else "of the clips/s"
        figures.append(Figure("speed, measured", f"{value:.2f} ×", ends))
    efficiency = (speed or {}).get("routed_efficiency")
    if efficiency:
        value, low_e, high_e = efficiency
        figures.append(Figure("routed efficiency", f"{value:.2f}", f"{kind}: {low_e:.2f} to {high_e:.2f}"))
    return figures
