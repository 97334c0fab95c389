"""The errors that peftkit raises on purpose.

Bottom of the import order: every room may import this module, it imports nothing of peftkit.
Each message is one line per problem: where, what was found, what is allowed, what to do.
"""

import signal
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

SIGNALLED: Final = 128
"""Added to the number of a signal that ended a process, as a shell does it."""


class PeftkitError(Exception):
    """Base of every expected failure; `exit_code` is what the process ends with.

    `everywhere` says that every process of a run raises it alike, so that only the first speaks.
    """

    exit_code = 1
    everywhere = False

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class UsageError(PeftkitError):
    """A command line that cannot be carried out as written."""

    exit_code = 2
    everywhere = True


class RecipeError(UsageError):
    """A recipe with problems; holds all of them, one line each."""


class SourceError(PeftkitError):
    """A base model or data set that cannot be found, read or trusted."""


class DataError(PeftkitError):
    """Data that does not fit the task: columns, labels, splits, lengths."""


class MethodError(PeftkitError):
    """A method that does not fit the model: depth, target modules, architecture."""


class RegistryError(PeftkitError):
    """A delta that cannot be saved, found, verified or attached."""


class RunError(PeftkitError):
    """A run that cannot start or go on: folder exists, launch mismatch, non-finite loss."""


class SharedError(RunError):
    """A `RunError` that every process finds alike: the first of each machine says it for all."""

    everywhere = True


class ResumeError(SharedError):
    """A run that cannot be taken up; the record that its folder holds stays."""


class PeerError(RunError):
    """Another process of the run failed, and says so itself; `status` is the record's."""

    def __init__(self, status: str, problems: str | Iterable[str]) -> None:
        self.status = status
        super().__init__(problems)


class NonFiniteError(SharedError):
    """NaN or Inf in a loss or a gradient; names the optimizer step and the examples."""


class Interrupted(BaseException):
    """A run was asked to stop. Not an Exception, so that no library's handler takes it for a fault.

    `status` is the record's: `interrupted` or `terminated`; `exit_code` is 128 + the signal's
    number, as a shell has it: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int, *, saved_step: int | None = None) -> None:
        self.exit_code = SIGNALLED + number
        self.everywhere = saved_step is not None  # a checkpoint is written by all together
        self.status = "interrupted" if number == signal.SIGINT else "terminated"
        hint = "" if saved_step is None else f"; --resume goes on after step {saved_step}"
        self.problems = [f"stopped by {signal.Signals(number).name}{hint}"]
        super().__init__(self.problems[0])


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Closest match and the sorted choices, ready to follow "unknown …".

    >>> suggestion("loar", ["lora", "full"])
    "did you mean 'lora'? Choices: full, lora"
    """
    known = sorted(choices)
    close = get_close_matches(name, known, n=1, cutoff=0.5)  # 'aplha' is 0.53 of 'lora_alpha'
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Choices: {', '.join(known)}"
