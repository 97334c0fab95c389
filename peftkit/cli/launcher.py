"""`python -m peftkit.cli.launcher`: `accelerate launch` without its own tracebacks.

Started by `cli.launch` in the place of `accelerate.commands.launch`, which it calls. The processes
of the run say themselves what went wrong; `--debug` starts Accelerate's own launcher instead.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from peftkit.cli.launch import EXIT_FILE
from peftkit.errors import SIGNALLED
from peftkit.importing import undisturbed_imports

STOPPED = -signal.SIGTERM
"""How a process ends that the launcher stops because another one has ended."""


def main() -> int:
    """Launch by `sys.argv`; return 1 if the run or the launcher fails, 128 + n after signal n."""
    try:
        with undisturbed_imports():
            from accelerate.commands.launch import main as accelerate_launch
            from torch.distributed.elastic.multiprocessing import SignalException
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        _silence()
        _pass_signals_on()
        if "--quiet" in sys.argv[:2]:
            sys.argv.remove("--quiet")  # it would make 1 of the signal that a run died of
        accelerate_launch()
    except subprocess.CalledProcessError as error:
        return _code(error.returncode)
    except ChildFailedError as error:
        ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        _name_the_killed(ended)
        return _code(min(ended.values(), key=lambda code: (code == STOPPED, code)))
    except SignalException as error:
        return SIGNALLED + error.sigval
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"accelerate launch: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _name_the_killed(codes: Mapping[int, int]) -> None:
    """Say why the run is over where its first process has spoken and cannot know it."""
    if not Path(os.environ.get(EXIT_FILE, "")).is_file():
        return
    for rank, ended in sorted(codes.items()):
        if ended < 0 and ended != STOPPED:
            print(
                f"rank {rank}: killed by {signal.Signals(-ended).name}, most often for lack of "
                "memory; the other processes were stopped",
                file=sys.stderr,
            )


def _code(ended: int) -> int:
    """Exit code for that of a run's process, which is negative after a signal."""
    return SIGNALLED - ended if ended < 0 else 1


def _pass_signals_on() -> None:
    """Hand a signal to the run and await its end; without a run yet, die of it.

    Accelerate's launcher of one process would leave its run alone. That of several passes signals
    on by handlers of its own, which take the place of these.
    """
    import psutil  # type: ignore[import-untyped]

    def receive(number: int, _frame: FrameType | None) -> None:
        children = psutil.Process().children()
        for child in children:
            child.send_signal(number)
        if not children:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)


def _silence() -> None:
    """Drop what the launcher of several processes logs about a signal or a failed process."""
    import torch.distributed.run  # noqa: F401  its loggers set their own levels as they are made

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
