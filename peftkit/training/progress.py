"""What a person sees while training: a bar on a terminal, plain lines elsewhere, on stderr.

Called by the loop; silent on ranks above 0. The same figures go to the run's `log.jsonl` and to its
trackers.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peftkit.errors import RunError
from peftkit.staging import write_file
from peftkit.training.trackers import Trackers

_STEPS = ("step", "total_steps")


class Progress:
    """Shows and logs training steps of the main process.

    `resumed_after` is the step that a resumed run goes on after; None for a run from the start.
    """

    def __init__(
        self,
        log: Path,
        trackers: Trackers,
        *,
        total_steps: int,
        resumed_after: int | None,
        visible: bool,
    ) -> None:
        start_step = resumed_after or 0
        self._log, self._trackers = log, trackers
        self._visible = visible
        self._total = total_steps
        if visible:
            with _writable(log):
                _truncate(log, start_step)
        if visible and resumed_after is not None:
            reason = "" if start_step else ", as there is no checkpoint"
            print(f"resuming after step {start_step}{reason}", file=sys.stderr, flush=True)
        trackers.start(resumed_after=resumed_after)
        terminal = visible and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)
            if terminal
            else None
        )

    def step(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update()

    def report(self, row: dict[str, Any]) -> None:
        """Log one row; `row` has at least `step`.

        Raises:
            RunError: the log cannot be written.
        """
        if not self._visible:
            return
        with _writable(self._log), self._log.open("a") as stream:
            stream.write(_json(row) + "\n")
        self._trackers.log(row)
        words = "  ".join(
            f"{key} {_short(value)}" for key, value in row.items() if key not in _STEPS
        )
        line = f"step {row['step']}/{self._total}  {words}"
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        elif "loss" in row:
            self._bar.set_postfix_str(f"loss {_short(row['loss'])}")
        else:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def _writable(log: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{log}: the log cannot be written: {error.strerror}; once that is mended, --resume "
            "goes on after the last checkpoint"
        ) from error


def _truncate(log: Path, start_step: int) -> None:
    """Drop rows after the step that a resumed run starts from."""
    if not log.exists():
        return
    kept = [line for line in log.read_text().splitlines() if _step_of(line) <= start_step]
    write_file(log, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    """The step of a row; infinite for one that was cut short when the run was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json(row: dict[str, Any]) -> str:
    """One line of JSON, which has no NaN and no infinity: null stands for them."""
    finite = {
        k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()
    }
    return json.dumps(finite, allow_nan=False)
