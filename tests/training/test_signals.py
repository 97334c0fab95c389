"""Signals: noted while training, at once elsewhere, and the second one always at once."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from peftkit.errors import Interrupted
from peftkit.training import signals
from peftkit.training.signals import StopRequest

BOTH = pytest.mark.parametrize(
    ("number", "status", "code", "message"),
    [
        (signal.SIGINT, "interrupted", 130, "stopped by SIGINT"),
        (signal.SIGTERM, "terminated", 143, "stopped by SIGTERM"),
        (signal.SIGHUP, "terminated", 143, "stopped by SIGTERM"),
    ],
)


@pytest.fixture(autouse=True)
def a_terminal():
    """Under `nohup` a hang-up is ignored, and stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(number):
    os.kill(os.getpid(), number)


def later(monkeypatch, seconds):
    """Let the clock go on without waiting."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + seconds)


def listen(body):
    with StopRequest().listening() as stop:
        body(stop)


@BOTH
def test_outside_training_a_signal_stops_at_once(number, status, code, message):
    reached = []

    def body(stop):
        send(number)
        reached.append("after the signal")

    with pytest.raises(Interrupted) as raised:
        listen(body)
    assert (str(raised.value), raised.value.status, reached) == (message, status, [])
    assert raised.value.exit_code == code


@BOTH
def test_in_training_the_first_is_noted_and_the_second_stops_at_once(
    number, status, code, message, monkeypatch
):
    reached = []

    def body(stop):
        with stop.deferred():
            send(number)
            reached.append(stop.number)
            later(monkeypatch, signals.ECHO_SECONDS + 1)
            send(number)
            reached.append("after the second")

    with pytest.raises(Interrupted) as raised:
        listen(body)
    assert (str(raised.value), raised.value.status) == (message, status)
    assert reached == [signal.SIGTERM if number == signal.SIGHUP else number]


def test_a_signal_that_comes_twice_at_the_same_time_is_one_request(monkeypatch):
    reached = []

    def body(stop):
        with stop.deferred():
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            later(monkeypatch, signals.ECHO_SECONDS - 1.5)
            send(signal.SIGINT)
            reached.append(stop.number)
        stop.check()

    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
        listen(body)
    assert reached == [signal.SIGTERM]


def test_the_end_of_the_launcher_does_not_hurry_a_run_that_is_stopping(monkeypatch):
    reached = []

    def body(stop):
        with stop.deferred():
            send(signal.SIGTERM)
            later(monkeypatch, signals.ECHO_SECONDS + 1)
            monkeypatch.setattr(os, "getppid", lambda: 1)
            send(signal.SIGTERM)
            reached.append(stop.number)
        stop.check()

    with pytest.raises(Interrupted):
        listen(body)
    assert reached == [signal.SIGTERM]


def test_a_run_under_nohup_does_not_mind_a_lost_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        listen(lambda stop: send(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
CHILD = """
import sys, time
from peftkit.errors import Interrupted
from peftkit.training.signals import StopRequest, end_with_the_launcher
end_with_the_launcher()
try:
    with StopRequest().listening():
        print(flush=True)
        time.sleep(60)
except Interrupted as stopped:
    sys.stderr.write(str(stopped))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of that")
def test_a_launcher_that_dies_takes_the_run_with_it():
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], env=environment, **pipes)
    launcher.stdout.readline()
    launcher.kill()
    assert launcher.communicate(timeout=60)[1] == "stopped by SIGTERM"


FORKED = """
import os, sys, time
from peftkit.training.signals import mind_the_parent_only
child = os.fork()
if child == 0:
    mind_the_parent_only(0)
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of that")
def test_a_run_that_is_killed_leaves_no_process_that_collates():
    parent = subprocess.Popen([sys.executable, "-c", FORKED], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


ENDING = """
import os, signal, sys
from peftkit.errors import Interrupted
from peftkit.training.signals import StopRequest
try:
    with StopRequest().listening() as stop:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            stop.is_over = True
except Interrupted as stopped:
    os.kill(os.getpid(), signal.SIGTERM)
    sys.stderr.write(str(stopped))
    sys.exit(3)
"""


def test_a_launched_run_that_is_over_comes_to_its_end_undisturbed():
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    command = [sys.executable, "-c", ENDING]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (3, "stopped by SIGTERM")


def test_a_deferred_signal_is_found_by_looking():
    reached = []

    def body(stop):
        with stop.deferred():
            send(signal.SIGTERM)
            reached.append("in training")
        stop.check()
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


def test_a_run_that_is_over_heeds_no_signal_however_late(monkeypatch):
    reached = []

    def body(stop):
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
        stop.is_over = True
        for seconds in (0, signals.ECHO_SECONDS + 1):
            later(monkeypatch, seconds)
            send(signal.SIGINT)
            reached.append(seconds)

    listen(body)
    assert len(reached) == 2


def test_handlers_are_given_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(n) for n in numbers]

    def body(stop):
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        listen(body)
    assert [signal.getsignal(n) for n in numbers] == before


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
