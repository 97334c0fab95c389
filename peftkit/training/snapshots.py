"""The whole state of a run in training: taken at a step, and put back when the run is resumed.

Called by the loop; `checkpoints` keeps what is taken here.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from peftkit.errors import ResumeError, RunError, SharedError
from peftkit.nested import differences
from peftkit.training import rng
from peftkit.training.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    restore_trained,
    trained_tensors,
)
from peftkit.training.state import TrainState
from peftkit.training.updates import Updates

if TYPE_CHECKING:
    from peftkit.memory.meter import MemoryMeter


@dataclass(frozen=True)
class Snapshots:
    """What a resumable checkpoint is made of. `model` is the bare module."""

    accelerator: Accelerator
    model: nn.Module
    updates: Updates
    meter: "MemoryMeter"
    folder: CheckpointFolder
    conditions: Mapping[str, Any]
    """By name, what must be equal when the run is resumed."""

    def take(self, state: TrainState) -> None:
        """Write a checkpoint from the main process; every process gives its RNG state."""
        states = rng.gather(self.accelerator)
        main = self.accelerator.is_main_process
        trained = trained_tensors(self.model, keep=main)
        optimizer = self.updates.optimizer_state(keep=main)
        if main:
            scaler = self.accelerator.scaler
            facts = {
                **asdict(state),
                "conditions": self._conditions(),
                "scaler": scaler.state_dict() if scaler else None,
                "meter": self.meter.state_dict(),
            }
            checkpoint = Checkpoint(trained, optimizer, states, facts)
        by_main(self.accelerator, lambda: self.folder.save(checkpoint))

    def begin_with_weights(self) -> None:
        """Begin anew with the trained parameters of the newest whole checkpoint, and them alone.

        They become the checkpoint of step 0, in the place of all others, from which `put_back`
        takes the run up. Optimizer, schedule, random numbers and measurements are new.

        Raises:
            RunError: no checkpoint is whole, or it is of another model or method.
        """
        found = self._newest(with_best=False)
        if found is None:
            raise ResumeError(f"{self.folder.folder}: --resume-weights-only finds no checkpoint")
        restore_trained(self.model, found.trained)
        self._drop_after(found.state["step"])
        step = found.state["step"] or found.state["weights_from_step"]
        if self.accelerator.is_main_process:
            print(f"beginning anew with the weights of step {step}", file=sys.stderr, flush=True)
        self.take(TrainState(weights_from_step=step))

    def put_back(self) -> TrainState:
        """Go on after the newest whole checkpoint; from the start if there is none.

        Raises:
            RunError: the checkpoint was made under other conditions, or none is whole.
        """
        found = self._newest(with_best=True)
        if found is None:
            self._drop_after(0)
            return TrainState(resumed_after=0)
        facts = dict(found.state)
        self._refuse_other_conditions(facts.pop("conditions", {}))
        self._drop_after(facts["step"])
        restore_trained(self.model, found.trained)
        self.updates.restore_optimizer(found.optimizer)
        if scaler := facts.pop("scaler"):
            self.accelerator.scaler.load_state_dict(scaler)
        self.meter.add_earlier(facts.pop("meter"))
        rng.restore(found.rng[self.accelerator.process_index])
        return TrainState(**{**facts, "resumed_after": facts["step"] or None})

    def _newest(self, *, with_best: bool) -> Checkpoint | None:
        """The checkpoint to go on from; each process reads it, and one of them warns.

        Raises:
            ResumeError: no checkpoint is whole, or not every process finds the same.
        """
        found, problem = None, None
        with warnings.catch_warnings():
            if not self.accelerator.is_main_process:
                warnings.simplefilter("ignore")
            try:
                found = self.folder.newest(with_best=with_best)
            except RunError as error:
                problem = str(error)
        own = problem or (f"step {found.state['step']}" if found else "none")
        everyone = gather_object([own])
        if len(set(everyone)) > 1:
            listed = "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(everyone))
            raise ResumeError(
                f"{self.folder.folder}: the processes do not find the same checkpoint: {listed}; "
                "it must be one folder that all of them see"
            )
        if problem:
            raise ResumeError(problem)
        return found

    def _drop_after(self, step: int) -> None:
        self.accelerator.wait_for_everyone()  # nobody is still reading
        if self.accelerator.is_main_process:
            self.folder.drop_after(step)

    def _conditions(self) -> dict[str, Any]:
        return {**self.conditions, "processes": self.accelerator.num_processes}

    def _refuse_other_conditions(self, then: Mapping[str, Any]) -> None:
        now = self._conditions()
        problems = [f"--resume: {line}" for line in differences(then, now)]
        if problems:
            advice = "--resume-weights-only begins anew with its weights, --overwrite without them"
            raise ResumeError([*problems, f"{self.folder.folder}: {advice}"])


def by_main(accelerator: Accelerator, write: Callable[[], None]) -> None:
    """Let the main process write; every process learns how it went.

    Raises:
        SharedError: what `write` raised as a RunError or OSError.
    """
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            write()
        except (RunError, OSError) as error:
            problem[0] = str(error)
    broadcast_object_list(problem)
    if problem[0]:
        raise SharedError(problem[0])
