"""Signals only set a flag; an inner request knows what an outer one has received, and hands on what it receives."""

from __future__ import annotations

import os
import signal

import pytest

from videoadapt.runtime.signals import JOB_SIGNALS, StopRequest


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, *JOB_SIGNALS])
def test_a_signal_sets_a_flag_and_handlers_are_put_back(number: signal.Signals) -> None:
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


def test_what_came_before_the_loop_stops_the_loop() -> None:
    with StopRequest(JOB_SIGNALS) as early:
        send(signal.SIGUSR2)
        with StopRequest() as stop:
            assert stop.received == signal.SIGUSR2
        assert early.received == signal.SIGUSR2


def test_what_came_in_the_loop_is_known_outside() -> None:
    with StopRequest(JOB_SIGNALS) as early:
        with StopRequest() as stop:
            send(signal.SIGTERM)
        assert (stop.received, early.received) == (signal.SIGTERM, signal.SIGTERM)


@pytest.mark.parametrize("order", [(signal.SIGUSR2, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR2)])
def test_a_warning_asks_for_another_start_whatever_else_comes(order: tuple[signal.Signals, ...]) -> None:
    with StopRequest() as stop:
        for number in order:
            send(number)
        assert stop.received == signal.SIGUSR2


def test_outside_a_job_no_signal_is_held_back() -> None:
    before = [signal.getsignal(number) for number in JOB_SIGNALS]
    with StopRequest(()):
        assert [signal.getsignal(number) for number in JOB_SIGNALS] == before
