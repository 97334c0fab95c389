"""Carries out the runs of a comparison: each in processes of its own, several at once if asked.

Called by the verb `compare`; starts the same launcher as the verb `run`.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftkit.cli import launch
from peftkit.cli.comparison_folders import (
    is_at_work,
    new_record,
    note_launch_failure,
    record_stamp,
)
from peftkit.cli.comparison_progress import Display
from peftkit.cli.comparison_rows import Row

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
MAX_REASON_CHARACTERS = 500

_FLAGS = {"overwrite": ["--overwrite"], "resume": ["--resume"]}
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Places:
    """Where runs go: one environment for each that may be at work, and the comparison's lock."""

    environments: Sequence[Mapping[str, str]]
    lock: int
    debug: bool = False


@dataclass
class _Running:
    row: Row
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    stamp: tuple[int, int] | None


@dataclass
class _Work:
    """What waits, what runs, and the signal that has stopped it all."""

    waiting: list[Row]
    free: list[Mapping[str, str]]
    running: list[_Running] = field(default_factory=list)
    stopped_by: signal.Signals | None = None


def environments(jobs: int) -> list[dict[str, str]]:
    """The environment of each run that is at work at a time.

    A run side by side with others gets its share of the processor's cores, and a GPU of its own
    where there are enough for all.
    """
    shared = launch.launch_environment(os.environ, jobs=jobs)
    gpus = own_gpus(jobs)
    return [shared | ({VISIBLE_GPUS: gpus[n]} if gpus else {}) for n in range(jobs)]


def own_gpus(jobs: int) -> list[str]:
    """A CUDA device for each of `jobs` runs side by side; empty if there are too few, or one run.

    torch counts only what CUDA_VISIBLE_DEVICES leaves, so the names are taken from there.
    """
    if jobs == 1:
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    listed = os.environ.get(VISIBLE_GPUS)
    names = listed.split(",")[:count] if listed else [str(n) for n in range(count)]
    return names[:jobs] if len(names) >= jobs else []


def carry_out(rows: Sequence[Row], places: Places, shown: Display) -> signal.Signals | None:
    """Run every row that waits, in order, changing the rows; return the signal that stopped it.

    A signal is passed on to the runs at work, whose end is awaited; no further run is started.
    """
    work = _Work([row for row in rows if row.state == "waiting"], list(places.environments))
    with launch.noted_signals() as pending:
        try:
            while work.running or (work.waiting and not work.stopped_by):
                while work.waiting and work.free and not work.stopped_by and not pending:
                    _start_next(work, places, shown)
                time.sleep(launch.POLL_SECONDS)
                while pending:
                    _stop(work, pending.pop(0), shown)
                for one in [one for one in work.running if one.process.poll() is not None]:
                    _finish(work, one, shown)
                for one in work.running:
                    one.row.read_log()
                shown.draw()
        except BaseException:  # nothing is left running behind a comparison that breaks
            for one in work.running:
                launch.pass_on(signal.SIGTERM, one.process.pid)
            for one in work.running:
                one.process.wait()
            raise
    return work.stopped_by


def _start_next(work: _Work, places: Places, shown: Display) -> None:
    row = work.waiting.pop(0)
    run = row.run
    stamp = record_stamp(run)
    row.begin()
    flags = [*_FLAGS.get(row.task, ()), *(["--debug"] if places.debug else [])]
    run.output.parent.mkdir(parents=True, exist_ok=True)
    run.output.unlink(missing_ok=True)  # an earlier run's processes may still write into theirs
    environment = work.free.pop(0)
    with run.output.open("wb") as output:
        try:
            process = launch.start(
                launch.launch_command([*run.script_arguments(), *flags]),
                environment=environment,
                output=output.fileno(),
                keep_open=[places.lock],
            )
        except OSError as error:
            work.free.append(environment)
            _failed(row, f"could not be started: {error.strerror}")
            shown.ended(row)
            return
    work.running.append(_Running(row, process, environment, stamp))
    shown.began(row)


def _stop(work: _Work, number: signal.Signals, shown: Display) -> None:
    work.stopped_by = work.stopped_by or number
    for one in work.running:
        launch.pass_on(number, one.process.pid)
    count = len(work.running)
    if count:
        runs = "the run that is" if count == 1 else f"the {count} runs that are"
        shown.say(f"{number.name}: waiting for {runs} at work to save a checkpoint and end")


def _finish(work: _Work, one: _Running, shown: Display) -> None:
    work.running.remove(one)
    work.free.append(one.environment)
    row = one.row
    row.read_log()
    record = new_record(row.run, before=one.stamp)
    if record is not None:
        row.end_with(record)
    elif is_at_work(row.run.folder):
        row.end_without_record("stopped", "another run is at work in its folder")
    elif work.stopped_by:
        row.end_without_record("stopped", "before it had begun")
    else:
        _failed(row, _reason(one.process.returncode, row.run.output))
    shown.ended(row)


def _failed(row: Row, reason: str) -> None:
    note_launch_failure(row.run, reason)
    row.end_without_record("failed", reason)


def _reason(ended: int, output: Path) -> str:
    """Why there is no record, in one line: a signal, else the last that the run said."""
    if number := launch.killing_signal(ended):
        guess = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"killed by signal {int(number)}{guess}"
    with output.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return said[:MAX_REASON_CHARACTERS] or f"ended without a record (launcher: {ended})"
