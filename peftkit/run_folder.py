"""The folder of one run: claimed before anything is loaded, never written over by accident.

Called by the experiment.
"""

import shutil
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from peftkit.errors import RunError
from peftkit.recipe import Recipe, resolved_yaml
from peftkit.reporting.record import read_record
from peftkit.staging import write_file

OnExists = Literal["refuse", "overwrite", "resume"]

_OWN_FILES = ("recipe.yaml", "record.json", "predictions.parquet", "log.jsonl", "checkpoints")


def claim(folder: Path, recipe: Recipe, accelerator: Accelerator, *, on_exists: OnExists) -> None:
    """Make the folder, or deal with the one that is there; every process learns the outcome.

    Raises:
        RunError: the folder exists and must not be touched, or cannot be made; or the recipe to
            resume differs from the one that the run was started with.
    """
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        problem[0] = _claim(folder, resolved_yaml(recipe), on_exists)
    broadcast_object_list(problem)
    if problem[0]:
        raise RunError(problem[0])


def _claim(folder: Path, recipe: str, on_exists: OnExists) -> str | None:
    """Carry it out; returns what stands against it."""
    try:
        if folder.exists() and any(folder.iterdir()):
            if on_exists == "refuse":
                return f"{folder}: the run's folder exists; add --overwrite or --resume"
            if on_exists == "resume":
                return _resumable(folder, recipe)
            _empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "recipe.yaml", recipe.encode())
    except OSError as error:
        return f"{folder}: cannot be written: {error.strerror}"
    return None


def _resumable(folder: Path, recipe: str) -> str | None:
    stored = folder / "recipe.yaml"
    if not stored.is_file():
        return f"{folder}: has no recipe.yaml, so there is no run to resume; add --overwrite"
    if _is_complete(folder / "record.json"):
        return f"{folder}: the run is complete, nothing is left to resume; add --overwrite"
    before, now = stored.read_text(errors="replace").splitlines(), recipe.splitlines()
    if before == now:
        return None
    changed = [line.strip() for line in now if line not in before]
    gone = [line.strip() for line in before if line not in now]
    return (
        f"{folder}: --resume needs the recipe that the run was started with; "
        f"then: {'; '.join(gone) or 'nothing more'}; now: {'; '.join(changed) or 'nothing more'}"
    )


def _is_complete(record: Path) -> bool:
    try:
        return record.is_file() and read_record(record).status == "completed"
    except RunError:
        return False


def _empty(folder: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in _OWN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
