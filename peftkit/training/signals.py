"""Ctrl-C and SIGTERM: at once outside the training steps, after a checkpoint inside them.

The experiment opens a `StopRequest` around the whole run; the loop defers it around its steps.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from peftkit.errors import Interrupted


class StopRequest:
    """Remembers the first signal; a second one stops at once, deferred or not."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferring = False

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take over SIGINT and SIGTERM, and give them back afterwards. Main thread only."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a signal; the loop looks at `number` between steps.

        Raises:
            Interrupted: on leaving, if a signal came that the loop did not see any more.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.check()

    def check(self) -> None:
        """Stop if a signal came and whoever was at work swallowed it.

        Raises:
            Interrupted: it did.
        """
        if self.number is not None:
            raise Interrupted(self.number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        again = self.number is not None
        self.number = number
        if again or not self._deferring:
            raise Interrupted(number)
