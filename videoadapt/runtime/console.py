"""Messages and progress on stderr, tables on stdout, and the formats of numbers in them.

Only results go to stdout, so that the output of `--json` can be piped.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
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

from videoadapt.errors import one_line
from videoadapt.runtime.slurm import rank_env

_LOG_WIDTH = 160  # columns of a table in a file or a pipe; rich's default of 80 would wrap most cells
_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))

# Only rank 0 prints. Otherwise each message would appear once for each rank. The environment is read at import, because
# a process is one rank for its whole life.
console = Console(stderr=True, highlight=False, emoji=False, quiet=rank_env(os.environ).rank != 0)

# Of a context, not of the process: a thread that shows no progress does not silence the others.
_silent: ContextVar[bool] = ContextVar("silent", default=False)
_without_advice: ContextVar[bool] = ContextVar("without_advice", default=False)


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Hides messages, bars and tables on stderr inside the `with` block, in the calling thread alone.

    Args:
        shown: False hides them; True changes nothing.
    """
    token = _silent.set(_silent.get() or not shown)
    try:
        yield
    finally:
        _silent.reset(token)


def say(message: str) -> None:
    """Prints a message for people on stderr, on rank 0 only."""
    if _silent.get():
        return
    # No markup: paths and points may contain square brackets. No wrapping: log files are searched line by line.
    console.print(message, markup=False, soft_wrap=True)


def print_error(message: object) -> None:
    """Prints an error on stderr as one line, with the rank: log files of many ranks are searched with grep."""
    env = rank_env(os.environ)
    where = f" on rank {env.rank} of {env.world}" if env.world > 1 else ""
    print(f"error{where}: {one_line(message)}", file=sys.stderr, flush=True)


def advise(message: str) -> None:
    """Prints what the user may want to change, or to know before a long run: `say`, except inside `advice_hidden`."""
    if not _without_advice.get():
        say(message)


@contextmanager
def advice_hidden() -> Iterator[None]:
    """Hides the messages of `advise` inside the `with` block, in the calling thread alone.

    The demo is too short for advice on speed, and its first readers do not know the words yet.
    """
    token = _without_advice.set(True)
    try:
        yield
    finally:
        _without_advice.reset(token)


class Bar:
    """Progress in one line: `with Bar("train", total=100, unit="clips") as bar: bar.step(4, note="loss 0.5")`.

    On a terminal the line is updated in place, and in a notebook if it has ipywidgets. Elsewhere, as in a log file, a
    new line is printed at most every `every_s` seconds. A last line follows at the end, also after an exception.

    The time that is left is estimated without the first items, whose time holds what came before the work.

    Args:
        name: The name of the work, at the start of the line.
        total: Number of items.
        unit: The name of the items, such as `clips`.
        start: Number of items that an earlier run has done.
        every_s: Seconds between two lines of a log file.
    """

    def __init__(self, name: str, *, total: int, unit: str = "", start: int = 0, every_s: float = 30.0) -> None:
        self.name, self.total, self.unit, self.every_s = name, total, unit, every_s
        self.done = start
        self._first: tuple[float, int] | None = None  # the time after the first items of this run, and `done` then
        self._note = ""
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        # In a notebook rich draws with ipywidgets, and warns without them.
        live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        if live and not _silent.get():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            # transient: the live line is removed at the end, when `__exit__` prints the last one.
            self._progress = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
            )
            self._task = self._progress.add_task(name, total=total, completed=start, note="")

    def __enter__(self) -> Bar:
        self._start_time = self._last_line_time = time.monotonic()
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
        seconds = time.monotonic() - self._start_time
        say(f"{self.name}: {self.done}/{self.total} {self.unit} in {duration(seconds)} {self._note}".rstrip())

    def step(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more items as done, and shows `note` beside the progress."""
        self.done += count
        self._note = note
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if count and self._first is None:
            self._first = now, self.done
        if now - self._last_line_time >= self.every_s and self.done < self.total:
            self._last_line_time = now
            say(f"{self.name}: {self.done}/{self.total} {self.unit} {note}{self._left(now)}")

    def _left(self, now: float) -> str:
        """Returns the words for the time that is left; none before there is anything to estimate it from."""
        if self._first is None or self.done == self._first[1]:
            return ""
        since, done = self._first
        return f" {duration((now - since) / (self.done - done) * (self.total - self.done))} left"


def duration(seconds: float) -> str:
    """Formats a duration as `M:SS` or `H:MM:SS`: 75.2 is `1:15`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, to_stderr: bool = False) -> None:
    """Prints a table.

    Args:
        title: The line above the table.
        columns: The headers.
        rows: One cell for each column, printed with `str`. A column is aligned to the right if all its cells are
            numbers, or texts that begin like a number; otherwise to the left.
        to_stderr: Print to stderr instead of stdout, for tables that are not the result of a command.
    """
    if to_stderr and _silent.get():
        return
    table = Table(header_style="bold", expand=False)
    for number, column in enumerate(columns):
        numeric = all(_is_numeric(row[number]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # A separate console, because `console` writes to stderr.
    width = None if console.is_terminal else _LOG_WIDTH
    output = Console(stderr=to_stderr, highlight=False, emoji=False, width=width)
    output.print(title, style="italic", markup=False, soft_wrap=True)  # not the table's title, which wraps at its width
    output.print(table, markup=False)


def _is_numeric(cell: Any) -> bool:
    text = str(cell)  # "196 G", "75.3 (73.1 to 77.2)" and "-" (no value) are aligned as numbers, too
    return isinstance(cell, (int, float)) or text in {"", "-"} or text[0].isdigit() or text[0] in "+-−±"


def macs(value: float) -> str:
    """Formats a number of multiply-adds with three digits and a unit: 195.8e9 is `196 G`."""
    rounded = float(f"{value:.3g}")  # before the unit is chosen: 999.7e9 is 1 T, not 1000 G
    for unit, size in _UNITS:
        if rounded >= size:
            # `.3g` would print 1234 T as 1.23e+03 T; there is no larger unit.
            return f"{rounded / size:.3g} {unit}" if rounded < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f}"


def in_points(difference: Sequence[float]) -> str:
    """Formats a difference of two fractions, and the ends of its interval: `+1.2 points (-0.3 to +2.7)`."""
    return "{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * value for value in difference))


def signed_points(difference: Sequence[float]) -> str:
    """Formats the same for a column of points: `+1.2 (-0.3 to +2.7)`."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in difference))


def percent_interval(*values: float) -> str:
    """Formats a fraction and the ends of its interval: `75.3 (71.0 to 79.2)`."""
    return "{} ({} to {})".format(*map(percent, values))


def percent(value: float) -> str:
    """Formats a fraction in per cent, with one decimal and without a sign: 0.7534 is `75.3`."""
    return f"{100 * value:.1f}"
