"""Checkpoints of a run: whole or absent, verified before use.

Called by the loop. One folder a checkpoint, published by one rename:

    checkpoints/step-00001200/   trained.safetensors optimizer.pt rng.pt state.json manifest.json
    checkpoints/best-00000800/   trained.safetensors manifest.json
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkit.errors import RunError
from peftkit.modeling.parameters import trainable_parameters
from peftkit.staging import (
    STAGING_PREFIX,
    fsync_path,
    sha256_file,
    sha256_files,
    staged_folder,
)
from peftkit.training.sharded import shared_out, whole

_MANIFEST = "manifest.json"
_KEPT = 2
"""Resumable checkpoints to keep: the newest, and one to fall back on."""


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
    """The checkpoints of one run. Only the main process writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> None:
        """Publish a checkpoint, then drop those that nothing needs any more."""
        target = self.folder / f"step-{checkpoint.state['step']:08d}"
        if target.exists():
            return
        with staged_folder(target) as staging:
            save_file(checkpoint.trained, staging / "trained.safetensors")
            torch.save(checkpoint.optimizer, staging / "optimizer.pt")
            torch.save(checkpoint.rng, staging / "rng.pt")
            (staging / "state.json").write_text(json.dumps(checkpoint.state))
            _write_manifest(staging)
        self._prune()

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; a damaged newer one is skipped with a warning.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        folders = sorted(self.folder.glob("step-*"), reverse=True)
        for folder in folders:
            problem = _defect(folder)
            if problem is None:
                return _read(folder)
            warnings.warn(f"checkpoint {folder.name} is skipped: {problem}", stacklevel=2)
        if folders:
            raise RunError(f"{self.folder}: no checkpoint is whole; start again with --overwrite")
        return None

    def save_best(self, step: int, trained: Mapping[str, Tensor]) -> None:
        """Keep the trained parameters of the best evaluation so far."""
        target = self.folder / f"best-{step:08d}"
        if not target.exists():
            with staged_folder(target) as staging:
                save_file(dict(trained), staging / "trained.safetensors")
                _write_manifest(staging)

    def load_best(self, step: int, model: nn.Module) -> None:
        """Put the parameters that `save_best` kept back into `model`, in place.

        Raises:
            RunError: the folder is damaged.
        """
        folder = self.folder / f"best-{step:08d}"
        problem = _defect(folder)
        if problem:
            raise RunError(f"{folder}: the best checkpoint cannot be used: {problem}")
        restore_trained(model, load_file(folder / "trained.safetensors"))

    def drop_after(self, step: int) -> None:
        """Forget what a run left that got beyond `step`, where it is taken up again.

        Damaged checkpoints and half-written folders would else stand in the way of new ones.
        """
        for folder in self.folder.glob("*-*"):
            number = folder.name.rpartition("-")[2]
            if folder.name.startswith(STAGING_PREFIX) or int(number) > step:
                shutil.rmtree(folder)

    def clear(self) -> None:
        """Remove everything: the run is over and its delta is in the registry."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prune(self) -> None:
        steps = sorted(self.folder.glob("step-*"))
        for folder in steps[:-_KEPT]:
            shutil.rmtree(folder)
        needed = {json.loads((f / "state.json").read_text())["best_step"] for f in steps[-_KEPT:]}
        for folder in self.folder.glob("best-*"):
            if int(folder.name.removeprefix("best-")) not in needed:
                shutil.rmtree(folder)


def trained_copy(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, whole, copied to the CPU; for every process to call."""
    trained = trainable_parameters(model)
    return {n: whole(p.detach()).to("cpu", copy=True) for n, p in trained.items()}


def restore_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters that train, in place.

    Raises:
        RunError: the names differ: the checkpoint is of another model or method.
    """
    parameters = trainable_parameters(model)
    if parameters.keys() != tensors.keys():
        raise RunError("the checkpoint is of another model or method: trained parameters differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shared_out(tensors[name], parameter))


def _write_manifest(folder: Path) -> None:
    files = sorted(folder.iterdir())
    # Hashing lets go of the interpreter, and forcing to disk waits: side by side they take little
    # more than a copy of the same bytes.
    with ThreadPoolExecutor(max_workers=2 * len(files)) as pool:
        synced = [pool.submit(fsync_path, file) for file in files]
        digests = dict(zip((f.name for f in files), pool.map(sha256_file, files), strict=True))
        for file in synced:
            file.result()
    (folder / _MANIFEST).write_text(json.dumps({"files": digests}))


def _defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = json.loads((folder / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    found = sha256_files(folder)
    found.pop(_MANIFEST)
    bad = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    return f"{', '.join(bad)} differ from the manifest" if bad else None


def _read(folder: Path) -> Checkpoint:
    return Checkpoint(
        trained=load_file(folder / "trained.safetensors"),
        optimizer=torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
        rng=torch.load(folder / "rng.pt", weights_only=True),
        state=json.loads((folder / "state.json").read_text()),
    )
