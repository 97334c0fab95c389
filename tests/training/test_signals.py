"""Signals: noted while training, at once elsewhere, and the second one always at once."""

import os
import signal

import pytest

from peftkit.errors import Interrupted
from peftkit.training.signals import StopRequest

BOTH = pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGINT, "interrupted", "stopped by SIGINT"),
        (signal.SIGTERM, "terminated", "stopped by SIGTERM"),
    ],
)


def send(number):
    os.kill(os.getpid(), number)


def listen(body):
    with StopRequest().listening() as stop:
        body(stop)


@BOTH
def test_outside_training_a_signal_stops_at_once(number, status, message):
    reached = []

    def body(stop):
        send(number)
        reached.append("after the signal")

    with pytest.raises(Interrupted) as raised:
        listen(body)
    assert (str(raised.value), raised.value.status, reached) == (message, status, [])
    assert raised.value.exit_code == 1


@BOTH
def test_in_training_the_first_is_noted_and_the_second_stops_at_once(number, status, message):
    reached = []

    def body(stop):
        with stop.deferred():
            send(number)
            reached.append(stop.number)
            send(number)
            reached.append("after the second")

    with pytest.raises(Interrupted) as raised:
        listen(body)
    assert (str(raised.value), raised.value.status) == (message, status)
    assert reached == [number]


def test_a_signal_that_the_loop_no_longer_saw_is_not_lost():
    reached = []

    def body(stop):
        with stop.deferred():
            send(signal.SIGTERM)
            reached.append("in training")
        reached.append("after training")

    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
        listen(body)
    assert reached == ["in training"]


def test_an_error_in_training_is_not_covered_up_by_a_noted_signal():
    def body(stop):
        with stop.deferred():
            send(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        listen(body)


def test_handlers_are_given_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def body(stop):
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        listen(body)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_library_that_catches_every_error_does_not_swallow_a_signal():
    def body(_):
        try:
            send(signal.SIGINT)
        except Exception:  # as the Hub's client and many others do
            pytest.fail("taken for a fault of the library")

    with pytest.raises(Interrupted, match=r"^stopped by SIGINT$"):
        listen(body)


def test_a_swallowed_signal_is_found_by_looking():
    def body(stop):
        try:
            send(signal.SIGTERM)
        except BaseException:
            stop.check()

    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
        listen(body)


def test_looking_without_a_signal_finds_none():
    listen(lambda stop: stop.check())
