"""The folder of one run: claimed before anything is loaded, never written over by accident.

Called by the experiment; the comparison looks in, so accelerate is imported inside `claimed`.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peftkit import yaml_source
from peftkit.errors import RecipeError, RunError, SharedError
from peftkit.nested import differences
from peftkit.recipe import Recipe, resolved_yaml
from peftkit.reporting.gathering import LAUNCH_FILE
from peftkit.reporting.record import read_record
from peftkit.staging import STAGING_PREFIX, write_file

if TYPE_CHECKING:
    from accelerate import Accelerator

OnExists = Literal["refuse", "overwrite", "resume", "resume-weights-only"]

RECIPE_FILE = "recipe.yaml"

_OWN_FILES = (
    RECIPE_FILE,
    "record.json",
    "predictions.parquet",
    "log.jsonl",
    "checkpoints",
    "tracking",
    LAUNCH_FILE,
)


@contextmanager
def claimed(
    folder: Path, recipe: Recipe, accelerator: "Accelerator", *, on_exists: OnExists
) -> Iterator[None]:
    """Make the folder, or deal with the one that is there, and keep other runs out of it.

    Every process learns the outcome. The lock goes with the process, however that ends.

    Raises:
        SharedError: another run is at work in the folder; it exists and must not be touched, or
            cannot be made; or the recipe to resume differs from that which the run began with.
    """
    from accelerate.utils import broadcast_object_list

    problem: list[str | None] = [None]
    with ExitStack() as held:
        if accelerator.is_main_process:
            problem[0] = _claim(folder, resolved_yaml(recipe), on_exists, held)
        broadcast_object_list(problem)
        if problem[0]:
            raise SharedError(problem[0])
        yield


def _claim(folder: Path, recipe: str, on_exists: OnExists, held: ExitStack) -> str | None:
    """Carry it out; returns what stands against it. The lock is let go when `held` is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = try_lock(folder)
        if descriptor is None:
            return f"{folder}: another run is at work in this folder; wait until it has ended"
        held.callback(os.close, descriptor)
        if any(not entry.name.startswith(STAGING_PREFIX) for entry in folder.iterdir()):
            if on_exists == "refuse":
                return f"{folder}: the run's folder exists; add --overwrite or --resume"
            if on_exists == "resume":
                return _resumable(folder, recipe)
            if on_exists == "resume-weights-only":
                return _has_weights(folder)
            _empty(folder)
        elif on_exists == "resume-weights-only":
            return _has_weights(folder)
        write_file(folder / RECIPE_FILE, recipe.encode())
    except OSError as error:
        return f"{folder}: cannot be written: {error.strerror}"
    return None


def note_recipe(recipe: Recipe) -> None:
    """Keep the recipe in the run's folder, from now on the one that `--resume` needs."""
    write_file(recipe.run_folder / RECIPE_FILE, resolved_yaml(recipe).encode())


def try_lock(folder: Path) -> int | None:
    """A descriptor that keeps others out until it is closed; None if another process has one.

    Raises:
        OSError: no such folder, or it may not be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _resumable(folder: Path, recipe: str) -> str | None:
    stored = folder / RECIPE_FILE
    if not stored.is_file():
        return f"{folder}: has no recipe.yaml, so there is no run to resume; add --overwrite"
    if _is_complete(folder / "record.json"):
        return f"{folder}: the run is complete, nothing is left to resume; add --overwrite"
    try:
        changed = changes(stored, recipe)
    except RecipeError:
        return f"{stored}: is damaged, so the run cannot be resumed; add --overwrite"
    if not changed:
        (folder / LAUNCH_FILE).unlink(missing_ok=True)
        return None
    return (
        f"{folder}: --resume needs the recipe that the run was started with; {'; '.join(changed)}; "
        "--resume-weights-only begins anew with its weights"
    )


def _has_weights(folder: Path) -> str | None:
    """What stands against beginning anew with the weights of the folder's last checkpoint."""
    if _is_complete(folder / "record.json"):
        return f"{folder}: the run is complete and has no checkpoint any more; add --overwrite"
    if not has_checkpoint(folder):
        return f"{folder}: --resume-weights-only finds no checkpoint there"
    (folder / LAUNCH_FILE).unlink(missing_ok=True)
    return None


def changes(stored: Path, recipe: str) -> list[str]:
    """What a run was started with and what a resolved recipe says now, for each key that differs.

    Raises:
        RecipeError: the stored recipe is damaged.
    """
    texts = (stored.read_text(errors="replace"), recipe)
    then, now = (yaml_source.parse(text, RECIPE_FILE).value for text in texts)
    if not isinstance(then, dict):
        raise RecipeError(f"{stored}: is no recipe")
    return differences(then, now)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can be taken up at a later point than its start."""
    names = (path.name for path in (folder / "checkpoints").glob("*-*"))
    return any(name.startswith(("step-", "begin-")) for name in names)


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
