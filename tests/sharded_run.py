"""A run whose parameters are shared out over processes of a CPU, which Accelerate cannot do there.

    torchrun --nproc-per-node 2 sharded_run.py RECIPE.yaml [--resume | --stop-after=STEP]

Only `Accelerator.prepare` and `no_sync` are replaced, by what they do for FSDP2 on a GPU.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peftkit.experiment import run_experiment
from peftkit.modeling.parameters import transformer_blocks
from peftkit.recipe import load_recipe
from peftkit.training.loop import Trainer

MESH: list[Any] = []


def prepare(self: Accelerator, model: Any, optimizer: Any) -> Any:
    """Shard each block and the rest, and let the optimizer have the parts."""
    MESH.append(init_device_mesh("cpu", (self.num_processes,)))
    before = dict(model.named_parameters())
    bare = model.base_model.model if hasattr(model, "peft_config") else model
    for block in transformer_blocks(bare):
        fully_shard(block, mesh=MESH[0])
    fully_shard(model, mesh=MESH[0])
    after = dict(model.named_parameters())
    parts = {parameter: after[name] for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [parts[parameter] for parameter in group["params"]]
    return model, self.prepare_optimizer(optimizer)


@contextmanager
def no_sync(self: Accelerator, model: Any) -> Iterator[None]:
    """Keep gradients to this process."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def die_in_step(number: int) -> None:
    """End this process at once in the step after `number`, as a lost machine does."""
    step = Trainer._step

    def dying(self: Trainer, batches: Any) -> Any:
        if self.state.step == number:
            os._exit(9)
        return step(self, batches)

    Trainer._step = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.prepare, Accelerator.no_sync = prepare, no_sync  # type: ignore[method-assign,assignment]
    Accelerator.distributed_type = DistributedType.FSDP  # type: ignore[assignment,misc]
    if sys.argv[-1].startswith("--stop-after="):
        die_in_step(int(sys.argv[-1].partition("=")[2]))
    on_exists = "resume" if "--resume" in sys.argv else "refuse"
    run_experiment(load_recipe(Path(sys.argv[1]), ()), on_exists=on_exists)  # type: ignore[arg-type]
