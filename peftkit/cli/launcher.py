"""`python -m peftkit.cli.launcher`: `accelerate launch` without its own tracebacks.

Started by `cli.launch` in the place of `accelerate.commands.launch`, which it calls. The processes
of the run say themselves what went wrong; `--debug` starts Accelerate's own launcher instead.
"""

import logging
import sys


def main() -> int:
    """Launch by `sys.argv`; return 1 if the run or the launcher fails."""
    try:
        from accelerate.commands.launch import main as accelerate_launch
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        _silence()
        accelerate_launch()
    except KeyboardInterrupt:
        return 1
    except (ChildFailedError, SignalException):
        return 1
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        print(f"accelerate launch: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _silence() -> None:
    """Drop what the launcher of several processes logs about a signal or a failed process."""
    import torch.distributed.run  # noqa: F401  its loggers set their own levels as they are made

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
