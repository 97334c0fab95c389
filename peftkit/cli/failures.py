"""The one place where an exception becomes lines on stderr and an exit code.

Called by the `peftkit` command and by `run.py`; imports only `errors`.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from peftkit.errors import SIGNALLED, Interrupted, PeerError, PeftkitError, SharedError

MAX_SURPRISE_CHARACTERS = 500
SPEAKER_SECONDS = 20.0
"""How long a process that leaves the word to the first one waits for it."""

_CODES = (0, 1, 2, SIGNALLED + signal.SIGINT, SIGNALLED + signal.SIGTERM)


def exit_code_of(action: Callable[[], object], *, debug: bool) -> int:
    """Run `action`; its int result is the exit code, anything else counts as 0.

    A `PeftkitError`, or a signal that stopped a run, prints one line per problem. Any other
    exception prints one line that names it. `debug` adds the traceback in both cases. The result
    is always 0, 1 or 2, or 130 after Ctrl-C and 143 after SIGTERM.
    """
    _open_missing_streams()
    try:
        code = _ended(action)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _tell(["interrupted"], code=SIGNALLED + signal.SIGINT, debug=debug)
    except BrokenPipeError:
        return _reader_went_away()
    except (PeftkitError, Interrupted) as error:
        _let_the_first_speak(error)
        return _tell(_lines(error), code=_allowed(error.exit_code), debug=debug)
    except Exception as error:  # a bug, or a library's own class: one line all the same
        _let_the_first_speak(error)
        return _tell(_by_rank([_surprise(error, debug=debug)]), code=1, debug=debug)


def _open_missing_streams() -> None:
    """`peftkit ls >&-`: Python has no stream then, but every writer expects one."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - open to the end


def _ended(action: Callable[[], object]) -> int:
    try:
        result = action()
    except SystemExit as stop:
        return _allowed(stop.code)
    return _allowed(result if isinstance(result, int) else 0)


def _allowed(code: object) -> int:
    """The code that the command promises; every other one counts as 1."""
    if code is None:
        return 0
    return code if isinstance(code, int) and code in _CODES else 1


def _lines(error: PeftkitError | Interrupted) -> list[str]:
    """The problems, unless another process says them."""
    return [] if _is_said_by_another(error) else _by_rank(error.problems)


def _by_rank(lines: list[str]) -> list[str]:
    """On a further rank each line says so."""
    rank = int(os.environ.get("RANK", "0"))
    return [f"rank {rank}: {line}" for line in lines] if rank else lines


def _is_said_by_another(error: PeftkitError | Interrupted) -> bool:
    """Whether the first process, or the first of this machine, finds the same and says it."""
    if isinstance(error, SharedError):
        return os.environ.get("LOCAL_RANK", "0") != "0"
    if isinstance(error, PeerError):
        return True
    is_shared = isinstance(error, Interrupted) or error.everywhere
    return is_shared and os.environ.get("RANK", "0") != "0"


def _let_the_first_speak(error: BaseException) -> None:
    """Wait, on a further rank, until the launcher ends this process because the first has ended.

    Most of what one process meets the first one meets as well, a little later perhaps, and
    launchers stop every process as soon as one ends. Of a signal they know.
    """
    first_of_machine = isinstance(error, SharedError) and os.environ.get("LOCAL_RANK", "0") == "0"
    if os.environ.get("RANK", "0") == "0" or first_of_machine or isinstance(error, Interrupted):
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # a run that is over does not heed them otherwise
    time.sleep(SPEAKER_SECONDS)


def _surprise(error: Exception, *, debug: bool) -> str:
    text = " ".join(str(error).split())[:MAX_SURPRISE_CHARACTERS]
    advice = "" if debug else " (unexpected; rerun with --debug for the traceback)"
    return f"{type(error).__name__}{': ' if text else ''}{text}{advice}"


def _tell(lines: list[str], *, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    for line in lines:
        print(line, file=sys.stderr)
    return code


def _reader_went_away() -> int:
    """`peftkit ls | head -1`: point stdout elsewhere, or the interpreter complains as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
