"""The runs of a comparison as they go: state, steps, and the time that is left.

Made by the verb `compare`, changed by `comparison_runs`, shown by `comparison_progress`.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftkit.cli.comparison_folders import Found, Task
from peftkit.cli.comparison_plan import PlannedRun
from peftkit.reporting.record import RunRecord

State = Literal["waiting", "running", "done", "failed", "stopped"]

_TAIL_BYTES = 4096


@dataclass
class Row:
    """One run of the comparison, as far as it has got."""

    run: PlannedRun
    task: Task
    state: State = "waiting"
    detail: str = ""
    """The score, or the reason of a failure, in one line."""
    seconds: float | None = None
    """Wall time of a run that has ended."""
    begun: float | None = None
    """`time.time()` at its start here."""
    first_step: int = 0
    """The step that a resumed run goes on after."""
    step: int = 0
    total_steps: int | None = None
    stepped: float | None = None
    """`time.time()` when `step` was logged."""
    seen_first: tuple[int, float] | None = None
    """The first step that was seen in the log, and when it was logged: loading is over then."""

    def begin(self) -> None:
        """It is started now."""
        self.state, self.begun = "running", time.time()
        self.first_step = _newest_checkpoint(self.run.folder) if self.task == "resume" else 0

    def end_with(self, record: RunRecord) -> None:
        """It has left a record, here or in an earlier comparison."""
        if record.status == "completed":
            self.state, self.detail = "done", _leading_score(record)
        elif record.status in ("interrupted", "terminated"):
            self.state, self.detail = "stopped", _one_line(record.error or record.status)
        else:
            self.state, self.detail = "failed", _failure(record)
        if self.begun is None:
            self.first_step = record.resumed_after_step or 0
            self.seconds = (record.finished - record.started).total_seconds()
        else:
            self.seconds = time.time() - self.begun

    def end_without_record(self, state: State, reason: str) -> None:
        """It has left nothing that says how it ended."""
        self.state, self.detail = state, _one_line(reason)
        self.seconds = None if self.begun is None else time.time() - self.begun

    def elapsed(self, now: float) -> float | None:
        """Seconds that it has taken so far."""
        return self.seconds if self.begun is None or self.seconds is not None else now - self.begun

    def read_log(self) -> None:
        """Take the steps from the end of the run's log, once it is that of this start."""
        log = self.run.folder / "log.jsonl"
        try:
            written = log.stat().st_mtime
        except OSError:
            return
        if self.begun is None or written < self.begun:
            return
        steps = [row for row in _last_rows(log) if "total_steps" in row]
        if steps and steps[-1]["step"] != self.step:
            self.step, self.total_steps = steps[-1]["step"], steps[-1]["total_steps"]
            self.stepped = written
            self.seen_first = self.seen_first or (self.step, written)


def rows_of(runs: Sequence[PlannedRun], found: Sequence[Found]) -> list[Row]:
    """A row for each run; those that are kept have ended already."""
    rows = []
    for run, one in zip(runs, found, strict=True):
        row = Row(run, one.task)
        if one.task == "keep" and one.record is not None:
            row.end_with(one.record)
        elif one.task == "keep":
            row.end_without_record("failed", one.error or "")
        rows.append(row)
    return rows


def seconds_left(rows: Sequence[Row], *, jobs: int, now: float) -> float | None:
    """Wall time until all runs are over; None as long as there is nothing to tell it by."""
    usual = _usual_seconds(rows, now)
    running = [_left(row, usual, now) for row in rows if row.state == "running"]
    waiting = [_usual(row, usual) for row in rows if row.state == "waiting"]
    known = [seconds for seconds in (*running, *waiting) if seconds is not None]
    if len(known) < len(running) + len(waiting):
        return None
    longest = max((seconds for seconds in running if seconds is not None), default=0.0)
    return max(longest, sum(known) / jobs)


def run_seconds_left(row: Row, rows: Sequence[Row], now: float) -> float | None:
    """Wall time until one run is over; None unless it is running and something is known."""
    return _left(row, _usual_seconds(rows, now), now) if row.state == "running" else None


def _usual_seconds(rows: Sequence[Row], now: float) -> dict[str, float]:
    """Recipe name → seconds of a whole run: of those that are done, else of one under way."""
    done: dict[str, list[float]] = {}
    under_way: dict[str, float] = {}
    for row in rows:
        name = row.run.recipe.name
        if row.state == "done" and row.seconds is not None and not row.first_step:
            done.setdefault(name, []).append(row.seconds)
        elif row.state == "running" and (left := _left_by_steps(row, now)) is not None:
            under_way[name] = left + now - (row.begun or now)
    return under_way | {name: sum(all_) / len(all_) for name, all_ in done.items()}


def _usual(row: Row, usual: Mapping[str, float]) -> float | None:
    """Of a run that waits; another recipe's time is better than nothing."""
    if row.run.recipe.name in usual:
        return usual[row.run.recipe.name]
    return sum(usual.values()) / len(usual) if usual else None


def _left(row: Row, usual: Mapping[str, float], now: float) -> float | None:
    by_steps = _left_by_steps(row, now)
    if by_steps is not None:
        return by_steps
    whole = None if row.first_step else _usual(row, usual)
    return None if whole is None or row.begun is None else max(0.0, whole - (now - row.begun))


def _left_by_steps(row: Row, now: float) -> float | None:
    """By the pace of the steps since the first that was seen; what follows training is left out."""
    if row.stepped is None or row.seen_first is None or row.total_steps is None:
        return None
    first_step, first_logged = row.seen_first
    if row.step <= first_step:
        return None
    seconds_a_step = (row.stepped - first_logged) / (row.step - first_step)
    return max(0.0, seconds_a_step * (row.total_steps - row.step) - (now - row.stepped))


def duration(seconds: float | None) -> str:
    """Seconds as people say them; a dash for what is not known."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def tally(rows: Sequence[Row]) -> str:
    """How many runs are in which state."""
    counted = {state: sum(row.state == state for row in rows) for state in _STATES_TOLD}
    parts = [f"{count} {state}" for state, count in counted.items() if count or state == "done"]
    return f"{len(rows)} runs: {', '.join(parts)}"


_STATES_TOLD: tuple[State, ...] = ("done", "failed", "stopped", "running", "waiting")


def left_words(rows: Sequence[Row], *, jobs: int, now: float) -> str:
    """The time that is left, as a part of a line."""
    if all(row.state not in ("running", "waiting") for row in rows):
        return "nothing left"
    left = seconds_left(rows, jobs=jobs, now=now)
    return "time left not known yet" if left is None else f"about {duration(left)} left"


def _leading_score(record: RunRecord) -> str:
    """The first validation metric that is not the loss."""
    scores = record.metrics.get("validation", {})
    named = [name for name in scores if name != "loss"] or list(scores)
    return f"{named[0]} {scores[named[0]]:.4f}" if named else ""


def _failure(record: RunRecord) -> str:
    """The error, with the status where it says more than that the run failed."""
    status, error = record.status.replace("_", " "), _one_line(record.error or "")
    if error and (status == "failed" or error.startswith(status)):
        return error
    return f"{status}: {error}" if error else status


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _newest_checkpoint(folder: Path) -> int:
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _last_rows(log: Path) -> list[dict[str, Any]]:
    """The whole rows at the end of a log that may be growing."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut short at either end
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows
