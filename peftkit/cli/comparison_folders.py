"""What lies in the folders of a comparison's runs, and so what is left to do.

Called by the verb `compare` before anything runs and by `comparison_runs` when a run has ended.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftkit.cli.comparison_plan import PlannedRun
from peftkit.errors import RecipeError, RunError, UsageError
from peftkit.recipe import resolved_yaml
from peftkit.reporting.gathering import LAUNCH_FILE
from peftkit.reporting.record import RunRecord, read_record
from peftkit.run_folder import changes, has_checkpoint, try_lock
from peftkit.staging import write_file

Task = Literal["start", "overwrite", "resume", "keep"]

_STOPPED = ("interrupted", "terminated")


@dataclass(frozen=True)
class Found:
    """What is to be done about a run: `keep` what is there, or one of the ways to start it."""

    task: Task
    record: RunRecord | None = None
    error: str | None = None
    """Why it ended without a record, from `launch.json`."""


def survey(runs: Sequence[PlannedRun], *, retry_failed: bool) -> list[Found]:
    """Look into the folder of every run, in the order of `runs`.

    Raises:
        UsageError: folders that hold runs of other settings, or a record that cannot be read; all
            of them, with what differs.
    """
    found: list[Found] = []
    problems: list[str] = []
    for run in runs:
        try:
            one = _found(run, retry_failed=retry_failed)
        except RunError as error:
            problems += [f"{line}; or remove {run.folder}" for line in error.problems]
            continue
        # What a retry throws away may have been of other settings: often they are the remedy.
        retried = one.task == "overwrite" and retry_failed and not _was_stopped(one.record)
        problems += [] if retried else _other_settings(run, one.task)
        found.append(one)
    if problems:
        raise UsageError(problems)
    return found


def _found(run: PlannedRun, *, retry_failed: bool) -> Found:
    error = launch_error(run.folder)
    if error is not None:
        return Found("overwrite" if retry_failed else "keep", error=error)
    file = run.folder / "record.json"
    record = read_record(file) if file.is_file() else None
    if record is None or _was_stopped(record):
        return Found(_way_to_go_on(run.folder), record)
    again = retry_failed and record.status != "completed"
    return Found("overwrite" if again else "keep", record)


def _was_stopped(record: RunRecord | None) -> bool:
    return record is not None and record.status in _STOPPED


def _way_to_go_on(folder: Path) -> Task:
    if has_checkpoint(folder):
        return "resume"
    return "overwrite" if folder.is_dir() and any(folder.iterdir()) else "start"


def _other_settings(run: PlannedRun, task: Task) -> list[str]:
    """What stands against counting the folder as this run, in at most one line."""
    stored = run.folder / "recipe.yaml"
    if not stored.is_file():
        return []
    try:
        changed = changes(stored, resolved_yaml(run.recipe))
    except RecipeError:
        return [f"{stored}: is damaged; remove {run.folder} and the run is repeated"]
    if task != "resume":  # the same folder, seen from another current folder
        changed = [line for line in changed if not line.startswith("output_dir: ")]
    if not changed:
        return []
    return [
        f"{run.folder}: holds a run of other settings: {'; '.join(changed)}; "
        "give another --out, or remove that folder"
    ]


def launch_error(folder: Path) -> str | None:
    """The reason that `note_launch_failure` left; None if there is none."""
    try:
        content = json.loads((folder / LAUNCH_FILE).read_bytes())
        return str(content["error"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{LAUNCH_FILE} cannot be read"


def note_launch_failure(run: PlannedRun, error: str) -> None:
    """Leave `launch.json` for a run that has no record to say how it ended.

    It goes as soon as a run claims the folder. A record that an earlier part of the run left is
    of the past, and removed.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "status": "failed",
        "error": error,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_file(run.folder / LAUNCH_FILE, f"{text}\n".encode())
    (run.folder / "record.json").unlink(missing_ok=True)


def record_stamp(run: PlannedRun) -> tuple[int, int] | None:
    """Tells one record from the next in the same place; None if there is none."""
    try:
        status = (run.folder / "record.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def new_record(run: PlannedRun, *, before: tuple[int, int] | None) -> RunRecord | None:
    """The record that the run wrote since `record_stamp` gave `before`; None if it wrote none."""
    if record_stamp(run) in (None, before):
        return None
    with suppress(RunError):
        return read_record(run.folder / "record.json")
    return None


@contextmanager
def locked(out: Path, runs: Iterable[PlannedRun]) -> Iterator[int]:
    """Make the folder and keep other comparisons out of it; gives the lock's descriptor.

    The descriptor is handed to every launcher: a run that a killed comparison has left behind
    still counts as at work, even before it has its own folder.

    Raises:
        RunError: a run or another comparison is at work, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        busy = [run.folder for run in runs if is_at_work(run.folder)]
        descriptor = None if busy else try_lock(out)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror}") from None
    if descriptor is None:
        what = "another comparison, or a run that one left behind, is at work in this folder"
        raise RunError(
            [
                f"{folder}: a run is at work in this folder; wait until it has ended"
                for folder in busy
            ]
            or f"{out}: {what}; wait until it has ended"
        )
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_at_work(folder: Path) -> bool:
    """Whether a run holds the lock of its folder."""
    if not folder.is_dir():
        return False
    descriptor = try_lock(folder)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False
