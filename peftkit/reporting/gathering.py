"""Finding the runs below some folders, and saying in one line what cannot be read.

Called by the comparison; imports the record. A run is the folder of a `record.json`, or of a
`launch.json` that `peftkit compare` left where a run died before it could write a record.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.errors import RecipeError, RunError
from peftkit.reporting.record import RunRecord, read_record
from peftkit.yaml_source import load

RECORD_FILE = "record.json"
LAUNCH_FILE = "launch.json"
"""Written by a comparison whose run ended without a record; gone once the run begins again."""
RECIPE_FILE = "recipe.yaml"
MAX_PROBLEMS_IN_LINE = 3


@dataclass(frozen=True)
class Run:
    """One run, finished or not; `record` is None where it died before it could write one."""

    folder: Path
    name: str
    seed: int
    status: str
    error: str | None
    recipe: dict[str, Any] | None
    """The resolved recipe; None: the folder does not tell."""
    record: RunRecord | None

    @property
    def is_completed(self) -> bool:
        """Whether its scores may be compared."""
        return self.status == "completed" and self.record is not None


@dataclass(frozen=True)
class Problem:
    """One line for the reader of the report."""

    where: str
    text: str
    is_unreadable: bool = True
    """False: all was read, and this is what was left out of the comparison and why."""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass
class Gathered:
    """What lies below the folders, in the order of their paths."""

    runs: list[Run] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def gather(folders: Sequence[Path]) -> Gathered:
    """Read every run at or below `folders`, each folder once.

    A record whose bytes were seen before is left out with a line: a copy is no second run.
    """
    gathered = Gathered()
    seen: dict[str, Path] = {}
    for folder in _run_folders(folders, gathered.problems):
        try:
            run = _read(folder, seen)
        except RunError as error:
            gathered.problems.append(_in_one_line(error, folder))
        except _Copy as copy:
            text = f"the same record as {copy.original}; counted once"
            gathered.problems.append(Problem(str(folder), text, is_unreadable=False))
        else:
            gathered.runs.append(run)
    return gathered


class _Copy(Exception):
    def __init__(self, original: Path) -> None:
        self.original = original


def _run_folders(folders: Sequence[Path], problems: list[Problem]) -> Iterator[Path]:
    known: set[Path] = set()
    for folder in folders:
        found = _below(folder)
        if not found:
            problems.append(Problem(str(folder), _why_nothing(folder)))
        for path in found:
            if (resolved := path.resolve()) not in known:
                known.add(resolved)
                yield path


def _why_nothing(folder: Path) -> str:
    if folder.is_dir():
        return f"no {RECORD_FILE} at or below it"
    if folder.exists():
        return "is no folder; name that of a run or one above it"
    return "no such folder"


def _below(folder: Path) -> list[Path]:
    """Folders of runs; hidden ones (files in the making) and checkpoints are not entered.

    A run's own file stands for its folder.
    """
    if folder.name in (RECORD_FILE, LAUNCH_FILE) and folder.is_file():
        return [folder.parent]
    found = []
    for path, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if name[0] != "." and name != "checkpoints")
        if RECORD_FILE in files or LAUNCH_FILE in files:
            found.append(Path(path))
    return found


def _read(folder: Path, seen: dict[str, Path]) -> Run:
    path = folder / RECORD_FILE
    if not path.exists():
        return _launch(folder)
    record = read_record(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if seen.setdefault(digest, folder) != folder:
        raise _Copy(seen[digest])
    return Run(
        folder=folder,
        name=record.name,
        seed=record.seed,
        status=record.status,
        error=record.error,
        recipe=record.recipe,
        record=record,
    )


def _launch(folder: Path) -> Run:
    """A run that left no record: what its launcher knew of it."""
    path = folder / LAUNCH_FILE
    try:
        content = json.loads(path.read_bytes())
        return Run(
            folder=folder,
            name=str(content["recipe"]),
            seed=int(content["seed"]),
            status=str(content["status"]),
            error=content["error"] and str(content["error"]),
            recipe=_recipe_beside(folder),
            record=None,
        )
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise RunError(f"{path}: needs recipe, seed, status and error as a JSON object") from None


def _recipe_beside(folder: Path) -> dict[str, Any] | None:
    path = folder / RECIPE_FILE
    try:
        recipe = load(path).value if path.is_file() else None
    except RecipeError:
        return None
    return recipe if isinstance(recipe, dict) else None


def _in_one_line(error: RunError, folder: Path) -> Problem:
    """All that is wrong with one record, without the path that each of its lines begins with."""
    where = str(folder / RECORD_FILE)
    texts = [line.removeprefix(f"{where}: ") for line in error.problems]
    if len(texts) == 1 and (folder / LAUNCH_FILE).exists() and not Path(where).exists():
        where = str(folder / LAUNCH_FILE)
        texts = [texts[0].removeprefix(f"{where}: ")]
    rest = len(texts) - MAX_PROBLEMS_IN_LINE
    more = [f"and {rest} more"] if rest > 0 else []
    return Problem(where, " | ".join([*texts[:MAX_PROBLEMS_IN_LINE], *more]).replace("\n", " "))
