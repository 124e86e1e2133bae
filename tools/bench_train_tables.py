"""How `bench train` is printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from videoadapt.performance.bench.machine import print_machine
from videoadapt.runtime.console import print_table

_MIB, _MS, _PERCENT = 1 << 20, 1000, 100


def print_bench_train(result: dict[str, Any]) -> None:
    """What each step takes, what one rank achieves, and k lengths beside k models."""
    run, settings, rows = result["config"]["run"], result["settings"], result["rows"]
    print_machine(result)
    place = "core" if result["machine"]["device"] == "cpu" else "GPU"
    precision = run["precision"] + (", compiled" if result["config"]["train"]["compile"] else "")
    print(
        f"{precision}, {settings['batch']} made-up clips a step, {settings['steps']} steps a turn, medians of "
        f"{settings['rounds']} rounds; decoding is not part of a step. Each rank has a {place} of its own; there are "
        f"{result['machine']['ranks']}. Load {result['machine']['load']:.1f}"
    )
    if result["bytes_per_s"]:
        print(f"A sum over 2 ranks: {result['bytes_per_s'] / 1e6:.0f} MB/s from each to the next")
    print_table("A step", _STEP, [_step_cells(row) for row in rows])
    title = f"One rank; {result['peak_macs_per_s'] / 1e9:.1f} GMAC/s is what a large matrix product achieves"
    print_table(title, _RANK, [_rank_cells(row) for row in rows if row["ranks"] == 1 and row["step_s"]])
    print_table("k lengths in one model, beside k models", _LENGTHS, [_length_cells(row) for row in result["lengths"]])
    for name, cause in result["left_out"].items():
        print(f"left out: {name}: {cause}")


_STEP = (
    *("step", "ranks", "ms", "min .. max", "x alone", "FLOPs bound", "to it", "communication %", "wait ms"),
    *("predicted ms", "error %"),
)
_RANK = ("step", "clips/s", "share of peak %", "peak MiB", "parameters, M")
_LENGTHS = (
    *("lengths", "one rank ms", "k ranks ms", "k models ms", "parameters, M", "k models M"),
    *("one rank MiB", "of k ranks, each MiB", "k models MiB"),
)


def _step_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    measured = row["step_s"] is not None
    return (
        row["name"],
        str(row["ranks"]),
        _number(row["step_s"], _MS),
        " .. ".join(_number(edge(row["rounds_s"]), _MS) for edge in (min, max)) if measured else "- (predicted)",
        _number(row["times_alone"], 1, 2),
        _number(row["flops_bound"] if row["ranks"] == 1 else None, 1, 2),
        _number(row["times_bound"] if row["ranks"] == 1 else None, 1, 2),
        _number(row["communication"], _PERCENT, 0),
        _number(row["waited_s"] or None, _MS),
        _number(row["predicted_s"], _MS),
        _number(row["prediction_error"], _PERCENT, 0),
    )


def _rank_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        _number(row["clips_per_s"], 1, 2),
        _number(row["peak_fraction"], _PERCENT, 0),
        _number(row["peak_bytes"], 1 / _MIB, 0),
        _number(row["parameters"], 1e-6, 2),
    )


def _length_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        ", ".join(row["points"]),
        _number(row["sequential_s"], _MS),
        _number(row["grouped_s"], _MS) + (" predicted" if row["grouped_is_predicted"] else ""),
        _number(row["separate_s"], _MS),
        _number(row["parameters"], 1e-6, 2),
        _number(row["separate_parameters"], 1e-6, 2),
        *(_number(row[key], 1 / _MIB, 0) for key in ("peak_bytes", "grouped_peak_bytes", "separate_peak_bytes")),
    )


def _number(value: float | None, unit: float, digits: int = 1) -> str:
    return "-" if value is None else f"{value * unit:.{digits}f}"
