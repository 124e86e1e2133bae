"""What the results of all benchmarks have in common: where and when they were measured, and their tables."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from videoadapt.config.load import Config
from videoadapt.config.sections import Section
from videoadapt.evaluation.intervals import LEVEL, has_interval
from videoadapt.runtime.machine import machine, versions


def measured_with(settings: Section, packages: Sequence[str], config: Config | None = None) -> dict[str, Any]:
    """Returns the first entries of a benchmark's JSON: date, machine, versions, settings, and config if there is one.

    Args:
        settings: The settings of the benchmark.
        packages: Those whose versions matter.
        config: What was measured.
    """
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": machine() | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "versions": versions(packages),
        "settings": settings.model_dump(mode="json"),
    }
    return found if config is None else found | {"config": config.model_dump(mode="json")}


def print_machine(result: Mapping[str, Any]) -> None:
    """Prints the date, machine and versions of a benchmark's result."""
    print(
        f"{result['date']}, {result['machine']['cpu']}, {result['machine']['cpus']} CPUs, {result['machine']['system']}"
    )
    print(", ".join(f"{name} {number}" for name, number in result["versions"].items()))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], rounds: int = 0) -> str:
    """Returns a markdown table.

    Args:
        columns: The heads. `{level}` becomes what `with_interval` shows after so many rounds: `95 %` or `range`.
        rows: The cells.
        rounds: Values of each median.
    """
    level = f"{100 * LEVEL:.0f} %" if has_interval(rounds) else "range"
    lines = [[column.format(level=level) for column in columns], ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_interval(values: Sequence[float], factor: float = 1.0, digits: int = 2) -> str:
    """Returns the cell of a median and its interval, in another unit."""
    middle, low, high = (f"{value * factor:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"
