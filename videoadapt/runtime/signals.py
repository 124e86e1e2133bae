"""How a process is asked to stop: Ctrl-C, and the signals of a cluster. Imports no torch: see `StopRequest`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import NoReturn

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # the time limit is near: what a job asks its cluster to send
JOB_SIGNALS = (signal.SIGTERM, *WARNINGS)  # SIGTERM: the job loses its nodes soon


class Stopped(KeyboardInterrupt):
    """Work ended early, saved, because a signal asked for it: this process or another rank of its job."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.signal = received


class StopRequest:
    """While entered, a first Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 only sets `received`, for a loop to stop at a step.

    A signal kills a process that has no handler for it, and importing torch takes seconds: the entry point of a job
    enters a request for `JOB_SIGNALS` before, and a loop's own request, entered inside, knows what came earlier.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT, *JOB_SIGNALS)) -> None:
        self.received: signal.Signals | None = None
        self._signals = signals

    @property
    def requested(self) -> bool:
        """Whether any signal has come."""
        return self.received is not None

    def stop(self) -> NoReturn:
        """To call once all is saved. Raises `Stopped`."""
        assert self.received is not None, "nobody asked for it"
        raise Stopped(self.received)

    def __enter__(self) -> StopRequest:
        self._outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        if isinstance(self._outer, StopRequest):  # afterwards: a signal may have come while handlers changed
            self.received = self.received or self._outer.received
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(self._outer, StopRequest) and self.requested:
            self._outer.received = self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's signature
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received not in WARNINGS:  # SIGTERM may follow a warning, which still asks for another start
            self.received = signal.Signals(number)
