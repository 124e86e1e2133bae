"""What people and programs see of a run: messages and progress on stderr, results on stdout, metrics in files.

Standard output carries results alone, so that `--json` can be piped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from videoadapt.runtime.slurm import rank_env

# Rank 0 speaks for the job.
console = Console(stderr=True, highlight=False, quiet=rank_env(os.environ).rank != 0)


def say(message: str) -> None:
    """A message for people, on stderr."""
    console.print(message, markup=False, soft_wrap=True)


class Bar:
    """One line of progress: `with Bar("train", total=100, unit="clips") as bar: bar.step(4, note="...")`.

    On a terminal it is live; elsewhere (a log file) it is a line at most every `every_s` seconds.
    """

    def __init__(self, name: str, *, total: int, unit: str = "", start: int = 0, every_s: float = 30.0) -> None:
        self.name, self.total, self.unit, self.every_s = name, total, unit, every_s
        self.done = self._started_at = start
        self._note = ""
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._progress = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
            )
            self._task = self._progress.add_task(name, total=total, completed=start, note="")

    def __enter__(self) -> Bar:
        self._start = self._last = time.monotonic()
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
        seconds = time.monotonic() - self._start
        say(f"{self.name}: {self.done}/{self.total} {self.unit} in {duration(seconds)} {self._note}".rstrip())

    def step(self, count: int = 1, note: str = "") -> None:
        """Go on by `count`; `note` stands beside the bar."""
        self.done += count
        self._note = note
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self._last >= self.every_s and self.done < self.total:
            self._last = now
            left = (now - self._start) * (self.total - self.done) / max(self.done - self._started_at, 1)
            say(f"{self.name}: {self.done}/{self.total} {self.unit} {note} {duration(left)} left")


def duration(seconds: float) -> str:
    """`75.2` as `1:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, aside: bool = False) -> None:
    """A table on stdout, or, aside, on stderr; text to the left, numbers (as strings or numbers) to the right."""
    table = Table(title=title, title_justify="left", header_style="bold", expand=False)
    for number, column in enumerate(columns):
        numeric = all(_looks_numeric(row[number]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(stderr=aside, highlight=False, width=None if console.is_terminal else 160).print(table, markup=False)


def _looks_numeric(cell: Any) -> bool:
    return (
        isinstance(cell, (int, float)) or str(cell)[:1].isdigit() or str(cell) in {"", "-"} or str(cell)[:1] in "+-−±"
    )


def macs(value: float) -> str:
    """`196 G`: multiply-adds to three digits, with a unit."""
    rounded = float(f"{value:.3g}")  # first, for 999.7 G is 1 T
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= size:
            return f"{rounded / size:.3g} {unit}" if rounded / size < 1000 else f"{value / size:.0f} {unit}"  # noqa: PLR2004
    return f"{value:.0f}"


def percent(value: float) -> str:
    """`75.3`: a share in per cent."""
    return f"{100 * value:.1f}"
