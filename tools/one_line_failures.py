"""Lets the other tools end after an error as `videoadapt` does: one line on stderr, and the same exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from videoadapt.commands.failure import FAILURES, fail, is_failure
from videoadapt.runtime.signals import Stopped


@contextmanager
def one_line_failures() -> Iterator[None]:
    """Exits after an error of the user or the machine, or a signal; a programming error shows its traceback."""
    try:
        yield
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    except FAILURES as error:
        if not is_failure(error):
            raise
        fail(error)
