"""Ctrl-C and SIGTERM: at once outside the training steps, after a checkpoint inside them.

The experiment opens a `StopRequest` around the whole run and ends it when the run's end is decided;
the loop defers it around its steps. What `run.py` starts ends with its launcher.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from peftkit.errors import Interrupted

ECHO_SECONDS = 3.0
"""A signal that comes again so soon is the same request: a batch system signals every process of
a job, and so does a launcher that got the signal as well."""

_LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
"""Variables that launchers set: torchrun's and that of `accelerate launch`."""
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Remembers the first signal; a second one stops at once, deferred or not.

    Once `is_over` is set no signal is heeded any more: how the run ends is decided, and its record
    comes first. It is set as an attribute, as a call would first let in a signal that waits.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_over = False
        self._deferring = False
        self._first = 0.0
        self._parent = os.getppid()

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take over SIGINT, SIGTERM and SIGHUP, and give them back afterwards. Main thread only.

        A launcher that is gone counts as SIGTERM: nobody would wait for the run any more. SIGHUP
        does too, unless it was ignored (`nohup`). A launched process whose run is over keeps
        them to its end, so that it can say how that was.
        """
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            if not (self.is_over and _is_launched()):
                for number, handler in previous.items():
                    signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a signal, for whoever looks at `number` or calls `check`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def check(self) -> None:
        """Stop if a signal came that was deferred, or swallowed by whoever was at work.

        Raises:
            Interrupted: it did.
        """
        if self.number is not None:
            raise Interrupted(self.number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.is_over or (self.number is not None and self._is_echo()):
            return
        again = self.number is not None
        self.number = signal.SIGTERM if number == signal.SIGHUP else number
        self._first = time.monotonic()
        if again or not self._deferring:
            raise Interrupted(self.number)

    def _is_echo(self) -> bool:
        """Whether a further signal says nothing new: see `ECHO_SECONDS`, or the launcher's end."""
        return time.monotonic() - self._first < ECHO_SECONDS or os.getppid() != self._parent


def mind_the_parent_only(_worker: int) -> None:
    """In a process that collates: end when its parent says so, and by no other SIGTERM or Ctrl-C.

    A signal to all processes of a job would take the batches from a run that is about to save.
    """
    numbers, parent = (signal.SIGINT, signal.SIGTERM), os.getppid()
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    _when_the_parent_dies(signal.SIGKILL)  # or it would keep the folder of the run locked
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def wait() -> None:
        while signal.sigwaitinfo(numbers).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _is_launched() -> bool:
    return any(name in os.environ for name in _LAUNCHED)


def end_with_the_launcher() -> None:
    """Have the kernel send SIGTERM if the launcher dies: that of one process passes nothing on.

    Does nothing in a process that was not launched, and outside Linux.
    """
    if _is_launched():
        _when_the_parent_dies(signal.SIGTERM)


def _when_the_parent_dies(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
