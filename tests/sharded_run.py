"""A run whose parameters are shared out over processes of a CPU, which a launch cannot do there.

    torchrun --nproc-per-node 2 sharded_run.py RECIPE.yaml [--resume | --stop-after=STEP]

Accelerate makes plain data parallelism of FSDP2 on a CPU; told otherwise once it has started, it
shards there, too, by the same code as on GPUs.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from peftkit import experiment
from peftkit.recipe import load_recipe
from peftkit.training.loop import Trainer
from peftkit.training.start import start_accelerator


def start_sharding(*arguments: Any, **words: Any) -> Accelerator:
    """What the launch of accelerate_configs/fsdp2.yaml gives on GPUs."""
    accelerator = start_accelerator(*arguments, **words)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    return accelerator


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
    experiment.start_accelerator = start_sharding
    if sys.argv[-1].startswith("--stop-after="):
        die_in_step(int(sys.argv[-1].partition("=")[2]))
    on_exists = "resume" if "--resume" in sys.argv else "refuse"
    experiment.run_experiment(load_recipe(Path(sys.argv[1])), on_exists=on_exists)
