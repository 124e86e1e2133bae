"""Stop requests record signals, pass them between nested requests, and restore the handlers."""

from __future__ import annotations

import os
import signal

import pytest

from videoadapt.runtime.signals import JOB_SIGNALS, StopRequest


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, *JOB_SIGNALS])
def test_a_signal_is_recorded_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        send(number)
        assert stop.received == number
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(signal.SIGINT)
        assert stop.requested
        send(signal.SIGINT)


def test_an_inner_request_takes_over_an_earlier_signal() -> None:
    with StopRequest(JOB_SIGNALS) as early:
        send(signal.SIGUSR2)
        with StopRequest() as stop:
            assert stop.received == signal.SIGUSR2
        assert early.received == signal.SIGUSR2


def test_an_outer_request_gets_the_signal_of_the_inner_one() -> None:
    with StopRequest(JOB_SIGNALS) as early:
        with StopRequest() as stop:
            send(signal.SIGTERM)
        assert (stop.received, early.received) == (signal.SIGTERM, signal.SIGTERM)


@pytest.mark.parametrize("order", [(signal.SIGUSR2, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR2)])
def test_a_warning_is_not_replaced_by_sigterm(order: tuple[signal.Signals, ...]) -> None:
    with StopRequest() as stop:
        for number in order:
            send(number)
        assert stop.received == signal.SIGUSR2


def test_a_request_without_signals_changes_no_handler() -> None:
    before = [signal.getsignal(number) for number in JOB_SIGNALS]
    with StopRequest(()):
        assert [signal.getsignal(number) for number in JOB_SIGNALS] == before
