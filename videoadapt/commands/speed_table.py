"""Prints the measured cost of policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from videoadapt.errors import few, plural
from videoadapt.runtime.console import duration, print_table, say


def print_speed(speed: Mapping[str, Any] | None) -> None:
    """Prints the table of measured costs, and what it covers.

    Args:
        speed: The key `speed` of `evaluate.json`.
    """
    if speed is None:
        say("clips/s: not measured (evaluate.speed_seconds or evaluate.speed_clips is 0)")
        return
    of = f" of {speed['clips_wanted']}" if speed["clips"] < speed["clips_wanted"] else ""
    limit = f"; evaluate.speed_seconds={speed['limit_s']:g} allows no more" if of else ""
    if not speed["clips_per_s"]:
        say(f"clips/s: not measured{limit}: one clip at each point took {duration(speed['seconds'])}")
        return
    _print_policies(speed)
    rounds = speed["file_rounds"]
    files = f"with decoding, {plural(rounds, 'round')}" if rounds else "not measured"
    say(
        f"clips/s: assigner, routing and model over decoded clips, {_covered(speed)}{of}; from files: {files}; in "
        f"{duration(speed['seconds'])} on {speed['date']}{limit}"
    )
    say(
        "efficiency: speed-up / by MACs, both against the fixed costliest point and on the clips that were timed; 1 = "
        "every saved multiply-add saves its time"
    )
    from videoadapt.evaluation.evaluated import unclear_speeds  # it imports pandas

    if unclear := unclear_speeds(speed["policies"]):
        say(
            f"clips/s and speed-up disagree on what is faster: {few(unclear)}. The rounds differ too much to tell; a "
            "larger evaluate.speed_seconds, or a quiet machine, gives more and more equal ones"
        )


def _covered(speed: Mapping[str, Any]) -> str:
    return f"median of {plural(speed['rounds'], 'round')} in turn over {plural(speed['clips'], 'clip')}"


def _print_policies(speed: Mapping[str, Any]) -> None:
    policies = speed["policies"]
    columns = [
        "policy",
        "clips/s",
        "speed-up",
        "by MACs",
        f"efficiency ({_ends(speed['rounds'])})",
        f"efficiency from files ({_ends(speed['file_rounds'])})",
        "alone p50/p95",
        "time in",
    ]
    rows = [_cells(name, policy) for name, policy in policies.items()]
    if any(policy["joules_per_clip"] is not None for policy in policies.values()):
        columns.append("J/clip")
    print_table("measured cost", columns, [row[: len(columns)] for row in rows])


def _ends(rounds: int) -> str:
    from videoadapt.evaluation.intervals import has_interval  # it imports pandas

    return "95 %" if has_interval(rounds) else "range"


def _cells(name: str, policy: Mapping[str, Any]) -> tuple[str, ...]:
    joules, p50 = policy["joules_per_clip"], policy["p50_ms"]
    return (
        name,
        f"{policy['clips_per_s']:.1f}",
        f"{policy['speedup'][0]:.2f}",
        f"{policy['macs_ratio']:.2f}",
        _interval(policy["routed_efficiency"]),
        _interval(policy["end_to_end_efficiency"]),
        "-" if p50 is None else f"{p50:.1f}/{policy['p95_ms']:.1f} ms",
        _largest(policy["stages_s"]),
        "-" if joules is None else f"{joules:.2f}",
    )


def _interval(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    middle, low, high = values
    if low != high:
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return "1.00" if middle == 1 else f"{middle:.2f} (once)"  # 1: of the policy that the others are compared with


def _largest(stages_s: Mapping[str, float]) -> str:
    """Returns the stages that take most of the time over decoded clips."""
    routed = {stage: seconds for stage, seconds in stages_s.items() if stage != "decode"}
    total = sum(routed.values()) or 1.0
    fractions = sorted(((seconds / total, stage) for stage, seconds in routed.items()), reverse=True)
    return ", ".join(f"{stage} {fraction:.0%}" for fraction, stage in fractions[:3] if fraction >= 0.01)  # noqa: PLR2004 - 1 %
