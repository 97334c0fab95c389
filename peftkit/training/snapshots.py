"""The whole state of a run in training: taken at a step, and put back when the run is resumed.

Called by the loop; `checkpoints` keeps what is taken here.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from peftkit.errors import SharedError
from peftkit.training import rng
from peftkit.training.checkpoints import Checkpoint, CheckpointFolder, restore_trained, trained_copy
from peftkit.training.sharded import shared_out_state, whole
from peftkit.training.state import TrainState

if TYPE_CHECKING:
    from peftkit.memory.meter import MemoryMeter


@dataclass(frozen=True)
class Snapshots:
    """What a resumable checkpoint is made of. `model` is the bare module."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    meter: "MemoryMeter"
    folder: CheckpointFolder
    conditions: Mapping[str, Any]
    """By name, what must be equal when the run is resumed."""

    def take(self, state: TrainState) -> None:
        """Write a checkpoint from the main process; every process gives its RNG state."""
        states = rng.gather(self.accelerator)
        trained, optimizer = trained_copy(self.model), whole(self.optimizer.state_dict())
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            facts = {
                **asdict(state),
                "conditions": self._conditions(),
                "scaler": scaler.state_dict() if scaler else None,
                "meter": self.meter.state_dict(),
            }
            self.folder.save(Checkpoint(trained, optimizer, states, facts))
        self.accelerator.wait_for_everyone()

    def put_back(self) -> TrainState:
        """Go on after the newest whole checkpoint; from the start if there is none.

        Raises:
            RunError: the checkpoint was made under other conditions, or none is whole.
        """
        found = self._newest()
        if found is None:
            return TrainState(resumed_after=0)
        facts = dict(found.state)
        self._refuse_other_conditions(facts.pop("conditions", {}))
        restore_trained(self.model, found.trained)
        self.optimizer.load_state_dict(shared_out_state(self.optimizer, found.optimizer))
        if scaler := facts.pop("scaler"):
            self.accelerator.scaler.load_state_dict(scaler)
        self.meter.add_earlier(facts.pop("meter"))
        rng.restore(found.rng[self.accelerator.process_index])
        return TrainState(**{**facts, "resumed_after": facts["step"]})

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from; what lies beyond it is removed."""
        main = self.accelerator.is_main_process
        with warnings.catch_warnings():
            if not main:
                warnings.simplefilter("ignore")
            found = self.folder.newest()
        self.accelerator.wait_for_everyone()  # nobody is still reading
        if main:
            self.folder.drop_after(found.state["step"] if found else 0)
        return found

    def _conditions(self) -> dict[str, Any]:
        return {**self.conditions, "processes": self.accelerator.num_processes}

    def _refuse_other_conditions(self, then: Mapping[str, Any]) -> None:
        now = self._conditions()
        problems = [
            f"--resume: the run was started with {name} {then.get(name)}, now it is "
            f"{now.get(name)}; --overwrite starts it anew"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if problems:
            raise SharedError(problems)
