"""Stop signals: Ctrl-C, and the signals that SLURM sends before it ends a job.

This module does not import torch, so that a job can install its handlers before that import, which takes seconds.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import NoReturn

from videoadapt.runtime.console import say

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # the time limit is near; `sbatch --signal` chooses one of them
JOB_SIGNALS = (signal.SIGTERM, *WARNINGS)  # SIGTERM: the job is cancelled or preempted


class Stopped(KeyboardInterrupt):
    """Raised when work has been saved and ended early, because this process or another rank received a signal.

    Args:
        received: The signal.
    """

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.signal = received


class StopRequest:
    """Records stop signals, so that a loop can save and stop at the end of a step.

    Inside the `with` block, SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 set `received` and have no other effect. A
    second Ctrl-C raises `KeyboardInterrupt`. Signal handlers belong to the whole process: they are replaced on entry
    and restored on exit, and only the main thread may do that. In any other thread a request only copies the signal of
    an outer request: Python gives Ctrl-C to the main thread, and the work goes on to its end.

    Requests can be nested. The entry point of a job enters a request for `JOB_SIGNALS` before torch is imported,
    because a signal kills a process without a handler. On entry, the request of an inner loop copies the signal of
    the outer request. On exit, it copies its signal back to the outer request.

    Args:
        signals: The signals to record.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT, *JOB_SIGNALS)) -> None:
        self.received: signal.Signals | None = None
        self._signals = signals

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self.received is not None

    def stop(self) -> NoReturn:
        """Raises `Stopped`. Call it after everything is saved."""
        assert self.received is not None, "no signal was received"
        raise Stopped(self.received)

    def __enter__(self) -> StopRequest:
        # The outer request, if there is one: the current handler is its bound method `_handle`.
        self._outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        in_main_thread = threading.current_thread() is threading.main_thread()
        replaced = self._signals if in_main_thread else ()
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in replaced}
        if isinstance(self._outer, StopRequest):
            # Only now, because the outer request still records signals while the handlers are replaced one by one.
            self.received = self.received or self._outer.received
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if isinstance(self._outer, StopRequest) and self.requested:
            self._outer.received = self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's signature
        if number == signal.SIGINT:
            if self.requested:
                raise KeyboardInterrupt
            say("\nstopping once the work of this step is saved; Ctrl-C again stops at once")  # a step may be long
        if self.received not in WARNINGS:  # SIGTERM may follow a warning, which requests a requeue and so must stay
            self.received = signal.Signals(number)
