"""Ends a command or a job after an error: one line on stderr, and an exit code that says whose error it is."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from videoadapt.errors import RunError, UserError
from videoadapt.runtime.console import print_error

# Exit codes
RUN_FAILED = 1
INPUT_WRONG = 2

FAILURES = (UserError, OSError, MemoryError, RuntimeError)  # the classes of the errors that `is_failure` accepts


def is_failure(error: Exception) -> bool:
    """Returns whether an error is the user's or the machine's; all others are programming errors.

    OSError: a full disk, a missing permission, a lost file system. Of RuntimeErrors, `RunError` and a lack of memory.
    """
    return isinstance(error, (UserError, RunError, OSError)) or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    # torch's own class, torch.OutOfMemoryError, is of GPUs alone; without a GPU torch raises a RuntimeError.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def fail(error: Exception) -> NoReturn:
    """Prints a failure as one line on stderr, after its traceback if the user wants it, and exits."""
    if os.environ.get("VIDEOADAPT_TRACEBACK", "0") not in {"", "0"}:
        traceback.print_exception(error)
    lack = "not enough memory; take smaller batches, frames or models, or a larger machine: "
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        lack = (
            "the GPU has not enough memory; raise train.accumulate (the same results), set "
            "train.activation_checkpointing=true or parallel.overlap=off, or lower train.batch; after training, lower "
            "evaluate.batch: "
        )
    print_error(f"{lack if _is_out_of_memory(error) else ''}{error}")
    if excerpt := getattr(error, "excerpt", ""):
        print(excerpt, file=sys.stderr)
    sys.exit(INPUT_WRONG if isinstance(error, UserError) else RUN_FAILED)
