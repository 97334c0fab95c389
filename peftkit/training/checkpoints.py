"""Checkpoints of a run: whole or absent, verified before use.

Called by the loop. One folder a checkpoint, published by one rename:

    checkpoints/step-00001200/   trained.safetensors optimizer.pt rng.pt state.json manifest.json
    checkpoints/best-00000800/   trained.safetensors manifest.json
    checkpoints/begin-00000001/  as step-…: step 0 of a training that began with earlier weights
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.serialization import config as saving

from peftkit.errors import RunError, SharedError
from peftkit.modeling.parameters import trainable_parameters
from peftkit.staging import STAGING_PREFIX, staged_folder, staging_name
from peftkit.training.hashing import ALGORITHM, HashedFolder, file_digest
from peftkit.training.sharded import set_parameter, whole_parameter

_MANIFEST = "manifest.json"
"""Written last: a folder without it is no checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a resumed run needs.

    `trained` are the parameters that train; `rng` has one entry a process; `state` is JSON.
    """

    trained: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: list[dict[str, Any]]
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run, the newest `keep` of them. Only the main process writes.

    Which one is the newest goes by the step in its name: no clock is asked.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Publish a checkpoint, then drop those that nothing needs any more.

        Raises:
            RunError: it cannot be written; the one before it is untouched.
        """
        step = checkpoint.state["step"]
        target = self.folder / (f"step-{step:08d}" if step else self._next_beginning())
        if target.exists():
            return
        older = [] if step else sorted(self.folder.glob("*-*"))
        with _published(target) as files:
            _add_trained(files, checkpoint.trained)
            for name, value in (("optimizer.pt", checkpoint.optimizer), ("rng.pt", checkpoint.rng)):
                # Handed a path, torch would not say why it cannot write. Its own checksums take a
                # third of the writing's time, and it looks at none of them when it loads.
                without_checksums = saving.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
                with files.stream(name) as stream, without_checksums:
                    torch.save(value, stream)
            (files.folder / "state.json").write_text(json.dumps(checkpoint.state))
            files.add("state.json")
        for folder in older:  # of the training before; its newest step goes last
            _remove(folder)
        self._prune()

    def newest(self, *, with_best: bool = True) -> Checkpoint | None:
        """The newest whole checkpoint; a damaged newer one is skipped with a warning.

        Args:
            with_best: Skip also one whose best checkpoint so far is damaged.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        folders = sorted(self.folder.glob("step-*"), reverse=True)
        folders = folders or sorted(self.folder.glob("begin-*"), reverse=True)
        for folder in folders:
            problem = _defect(folder) or (self._defect_of_best(folder) if with_best else None)
            if problem is None:
                return _read(folder)
            warnings.warn(f"checkpoint {folder.name} is skipped: {problem}", stacklevel=2)
        if folders:
            raise SharedError(
                f"{self.folder}: no checkpoint is whole; start again with --overwrite"
            )
        return None

    def save_best(self, step: int, trained: Mapping[str, Tensor]) -> None:
        """Keep the trained parameters of the best evaluation so far.

        Raises:
            RunError: they cannot be written.
        """
        target = self.folder / f"best-{step:08d}"
        if not target.exists():
            with _published(target) as files:
                _add_trained(files, trained)

    def load_best(self, step: int, model: nn.Module) -> None:
        """Put the parameters that `save_best` kept back into `model`, in place.

        Raises:
            RunError: the folder is damaged.
        """
        folder = self.folder / f"best-{step:08d}"
        problem = _defect(folder)
        if problem:
            raise SharedError(f"{folder}: the best checkpoint cannot be used: {problem}")
        restore_trained(model, load_file(folder / "trained.safetensors"))

    def drop_after(self, step: int) -> None:
        """Leave the folder as the run left it at `step`, where it is taken up again.

        Damaged checkpoints and half-written folders would else stand in the way of new ones, and
        a save that was killed has not dropped what nothing needs any more.
        """
        for folder in self.folder.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(folder)
        for folder in [*self.folder.glob("step-*"), *self.folder.glob("best-*")]:
            if int(folder.name.rpartition("-")[2]) > step:
                _remove(folder)
        self._prune()

    def _defect_of_best(self, folder: Path) -> str | None:
        """What is wrong with the best checkpoint that a whole one points to, or None."""
        step = _best_step(folder)
        best = self.folder / f"best-{step or 0:08d}"
        problem = None if step is None else _defect(best)
        return f"{best.name}, the best one so far: {problem}" if problem else None

    def clear(self) -> None:
        """Remove everything: the run is over and its delta is in the registry."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _next_beginning(self) -> str:
        numbers = [int(f.name.removeprefix("begin-")) for f in self.folder.glob("begin-*")]
        return f"begin-{max(numbers, default=0) + 1:08d}"

    def _prune(self) -> None:
        steps = sorted(self.folder.glob("step-*"))
        for folder in self.folder.glob("begin-*") if steps else ():
            _remove(folder)
        for folder in steps[: -self.keep]:
            _remove(folder)
        needed = {_best_step(folder) for folder in steps[-self.keep :]}
        for folder in self.folder.glob("best-*"):
            if int(folder.name.removeprefix("best-")) not in needed:
                _remove(folder)


@contextmanager
def _published(target: Path) -> Iterator[HashedFolder]:
    """An empty folder that becomes `target`, whole and with its manifest, or nothing at all.

    Raises:
        RunError: it cannot be written. A full disk is an OSError to Python, a SafetensorError to
            safetensors, and a RuntimeError to torch, which keeps the reason in its context.
    """
    try:
        with staged_folder(target) as staging, HashedFolder(staging) as files:
            yield files
            (staging / _MANIFEST).write_text(json.dumps({ALGORITHM: files.digests()}))
    except (OSError, SafetensorError, RuntimeError) as error:
        known = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(known, "strerror", None) or " ".join(str(known).split())
        older = [folder.name for folder in sorted(target.parent.glob("step-*"))]
        untouched = f"goes on from {older[-1]}" if older else "starts the run again"
        raise RunError(
            f"{target}: the checkpoint cannot be written: {reason}; once that is mended, "
            f"--resume {untouched}"
        ) from error


def _add_trained(files: HashedFolder, trained: Mapping[str, Tensor]) -> None:
    save_file(dict(trained), files.folder / "trained.safetensors")
    files.add("trained.safetensors")


def _remove(folder: Path) -> None:
    """Gone by one rename: a process killed here leaves a hidden folder, not half a checkpoint."""
    hidden = folder.with_name(staging_name())
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _best_step(folder: Path) -> int | None:
    """The step of the best evaluation before a checkpoint; a damaged one knows of none."""
    try:
        step: int | None = json.loads((folder / "state.json").read_text())["best_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step


def trained_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The parameters that train, whole, on the CPU; for every process to call.

    On a CPU they are the model's own, and change with them.

    With `keep` false this process only helps to gather them, and gets none.
    """
    trained = trainable_parameters(model)
    gathered = ((name, whole_parameter(p, keep=keep)) for name, p in trained.items())
    return {name: tensor.to("cpu") for name, tensor in gathered if tensor is not None}


def restore_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters that train, in place.

    Raises:
        RunError: the names differ: the checkpoint is of another model or method.
    """
    parameters = trainable_parameters(model)
    if parameters.keys() != tensors.keys():
        raise SharedError("the checkpoint is of another model or method: trained parameters differ")
    for name, parameter in parameters.items():
        set_parameter(parameter, tensors[name])


def _defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = json.loads((folder / _MANIFEST).read_text())[ALGORITHM]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    files = [f for f in folder.iterdir() if f.is_file() and f.name != _MANIFEST]
    found = {file.name: file_digest(file) for file in files}
    bad = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    return f"{', '.join(bad)} differ from the manifest" if bad else None


def _read(folder: Path) -> Checkpoint:
    return Checkpoint(
        trained=load_file(folder / "trained.safetensors"),
        optimizer=torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
        rng=torch.load(folder / "rng.pt", weights_only=True),
        state=json.loads((folder / "state.json").read_text()),
    )
