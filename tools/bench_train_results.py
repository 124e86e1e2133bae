"""The figures of `bench_train.py` that follow from measured times, and its tables."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_train_steps import StepTime
from videoadapt.performance.bench.results import print_machine
from videoadapt.runtime.console import print_table

_MIB, _MS, _PERCENT = 1 << 20, 1000, 100


@dataclass(frozen=True)
class Row:
    """One case in `train.json`. The fields from `step_s` on are None if the case was not measured.

    Ratios between cases are medians over rounds of the ratio within a round.
    """

    name: str
    kind: str
    points: list[str]
    ranks: int
    plan: str
    macs: float  # MACs of all passes of a step, forward and backward, the mean over draws
    clips: int
    parameters: int | None
    predicted_s: float | None
    flops_bound: float = 1.0  # MACs relative to the costliest length alone
    step_s: float | None = None  # time of the slowest rank, the median over rounds
    rounds_s: list[float] | None = None
    times_alone: float | None = None  # time relative to the costliest length alone
    times_bound: float | None = None  # `times_alone` relative to `flops_bound`
    communication: float | None = None  # fraction of the step; noise can make it negative
    waited_s: float | None = None  # wait for the teacher's logits, on the rank that waits longest
    prediction_error: float | None = None  # predicted / measured - 1
    clips_per_s: float | None = None
    peak_fraction: float | None = None  # MACs per second of a rank relative to a large matrix product
    peak_bytes: int | None = None


@dataclass(frozen=True)
class LengthsRow:
    """k lengths in one model beside k separate models, which one rank trains one after the other."""

    points: list[str]
    sequential_s: float | None
    grouped_s: float | None  # time with one rank for each length
    grouped_is_predicted: bool
    separate_s: float | None
    parameters: int | None
    separate_parameters: int | None
    peak_bytes: int | None
    grouped_peak_bytes: int | None
    separate_peak_bytes: int | None


def with_times(rows: Sequence[Row], turns: Mapping[str, Sequence[Sequence[StepTime]]], peak: float) -> list[Row]:
    """Returns the rows with the figures that follow from measured times.

    Args:
        rows: Rows without times; the first is the costliest length alone.
        turns: The times of each round by rank, by name of the case. A case that was not measured is missing.
        peak: MACs per second of a large matrix product.
    """
    alone = [_slowest_s(turn) for turn in turns[rows[0].name]]
    rows = [dataclasses.replace(row, flops_bound=row.macs / rows[0].macs) for row in rows]
    return [_timed(row, turns[row.name], alone, peak) if row.name in turns else row for row in rows]


def _slowest_s(turn: Sequence[StepTime]) -> float:
    return max(time.seconds for time in turn)


def _timed(row: Row, turns: Sequence[Sequence[StepTime]], alone: Sequence[float], peak: float) -> Row:
    seconds = [_slowest_s(turn) for turn in turns]
    step_s = statistics.median(seconds)
    times_alone = statistics.median(step / base for step, base in zip(seconds, alone, strict=True))
    communication = [1 - max(t.silent_s for t in turn) / step for turn, step in zip(turns, seconds, strict=True)]
    return dataclasses.replace(
        row,
        step_s=step_s,
        rounds_s=seconds,
        times_alone=times_alone,
        times_bound=times_alone / row.flops_bound,
        communication=statistics.median(communication) if row.ranks > 1 else None,
        waited_s=statistics.median(max(time.waited_s for time in turn) for turn in turns),
        prediction_error=row.predicted_s and row.predicted_s / step_s - 1,
        clips_per_s=row.clips / step_s,
        peak_fraction=row.macs / step_s / (peak * row.ranks),
        peak_bytes=max(time.peak_bytes for time in turns[-1]),
    )


def by_lengths(rows: Sequence[Row]) -> list[LengthsRow]:
    """Compares one model at k lengths with k separate models, for k = 1 and every k of a sequential case."""
    alone = {row.points[0]: row for row in rows if row.kind == "alone"}
    table = []
    for one in (rows[0], *(row for row in rows if row.kind == "sequential")):
        k = len(one.points)
        groups = (row for row in rows if row.kind == "groups" and row.points == one.points and row.ranks == k)
        group = next(groups, one)  # `one` for k = 1, and where groups are impossible
        separate = [alone[point] for point in one.points if point in alone]
        table.append(
            LengthsRow(
                points=one.points,
                sequential_s=one.step_s,
                grouped_s=group.step_s or group.predicted_s,
                grouped_is_predicted=group.step_s is None,
                separate_s=_sum(row.step_s for row in separate),
                parameters=one.parameters,
                separate_parameters=_sum(row.parameters for row in separate),
                peak_bytes=one.peak_bytes,
                grouped_peak_bytes=group.peak_bytes,
                separate_peak_bytes=_sum(row.peak_bytes for row in separate),
            )
        )
    return table


def _sum(values: Iterable[Any]) -> Any:
    """Returns the sum, or None if a value is None."""
    known = list(values)
    return None if None in known else sum(known)


def print_bench_train(result: Mapping[str, Any]) -> None:
    """Prints the content of `train.json`: times of steps, what one rank achieves, and one model beside k models."""
    run, settings = result["config"]["run"], result["settings"]
    rows, lengths = [Row(**row) for row in result["rows"]], [LengthsRow(**row) for row in result["lengths"]]
    print_machine(result)
    slot = "core" if result["device"] == "cpu" else "GPU"
    precision = run["precision"] + (", compiled" if result["config"]["train"]["compile"] == "on" else "")
    print(
        f"{precision}, {settings['batch']} random clips a step, {settings['steps']} steps a turn, medians of "
        f"{settings['rounds']} rounds; decoding is not part of a step. One {slot} for each rank; this machine has "
        f"{result['ranks']}. Load {result['machine']['load']:.1f}"
    )
    if result["bytes_per_s"]:
        print(f"All-reduce over 2 ranks: {result['bytes_per_s'] / 1e6:.0f} MB/s from each rank to the next")
    print_table("A step", _STEP_COLUMNS, [_step_cells(row) for row in rows])
    title = f"One rank; a large matrix product runs at {result['peak_macs_per_s'] / 1e9:.1f} GMAC/s"
    print_table(title, _RANK_COLUMNS, [_rank_cells(row) for row in rows if row.ranks == 1 and row.step_s])
    print_table("k lengths in one model, beside k models", _LENGTHS_COLUMNS, [_lengths_cells(row) for row in lengths])
    for name, cause in result["left_out"].items():
        print(f"left out: {name}: {cause}")


_STEP_COLUMNS = (
    *("step", "ranks", "ms", "min .. max", "x alone", "FLOPs bound", "to it", "communication %", "wait ms"),
    *("predicted ms", "error %"),
)
_RANK_COLUMNS = ("step", "clips/s", "% of peak", "peak MiB", "parameters, M")
_LENGTHS_COLUMNS = (
    *("lengths", "one rank ms", "k ranks ms", "k models ms", "parameters, M", "k models M"),
    *("one rank MiB", "of k ranks, each MiB", "k models MiB"),
)


def _step_cells(row: Row) -> tuple[str, ...]:
    edges = [] if row.rounds_s is None else [min(row.rounds_s), max(row.rounds_s)]
    return (
        row.name,
        str(row.ranks),
        _number(row.step_s, _MS),
        " .. ".join(_number(edge, _MS) for edge in edges) or "- (predicted)",
        _number(row.times_alone, 1, 2),
        # The bound holds for one rank: more ranks share the MACs.
        _number(row.flops_bound if row.ranks == 1 else None, 1, 2),
        _number(row.times_bound if row.ranks == 1 else None, 1, 2),
        _number(row.communication, _PERCENT, 0),
        _number(row.waited_s or None, _MS),
        _number(row.predicted_s, _MS),
        _number(row.prediction_error, _PERCENT, 0),
    )


def _rank_cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        _number(row.clips_per_s, 1, 2),
        _number(row.peak_fraction, _PERCENT, 0),
        _number(row.peak_bytes, 1 / _MIB, 0),
        _number(row.parameters, 1e-6, 2),
    )


def _lengths_cells(row: LengthsRow) -> tuple[str, ...]:
    return (
        ", ".join(row.points),
        _number(row.sequential_s, _MS),
        _number(row.grouped_s, _MS) + (" predicted" if row.grouped_is_predicted else ""),
        _number(row.separate_s, _MS),
        _number(row.parameters, 1e-6, 2),
        _number(row.separate_parameters, 1e-6, 2),
        *(_number(n, 1 / _MIB, 0) for n in (row.peak_bytes, row.grouped_peak_bytes, row.separate_peak_bytes)),
    )


def _number(value: float | None, factor: float, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"
