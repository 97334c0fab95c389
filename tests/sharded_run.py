"""Runs whose parameters are shared out over processes of a CPU, which a launch cannot do there.

    torchrun --nproc-per-node 2 sharded_run.py fsdp2|zero2|zero3 RECIPE.yaml [...]
        [--resume | --stop-after=STEP]

`python sharded_run.py alone RECIPE.yaml [...]` is one process that holds everything.

Accelerate makes plain data parallelism of FSDP2 and of DeepSpeed on a CPU; told otherwise once it
has started, it shares out there, too, by the same code as on GPUs.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from peftkit import experiment
from peftkit.errors import PeftkitError
from peftkit.recipe import load_recipe
from peftkit.training import zero
from peftkit.training.loop import Trainer
from peftkit.training.start import start_accelerator

STAGES = {"zero2": 2, "zero3": 3}


def start_sharding(*arguments: Any, **words: Any) -> Accelerator:
    """What the launch of a file of accelerate_configs/ gives on GPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before
    accelerator = start_accelerator(*arguments, **words)
    if sys.argv[1] == "fsdp2":
        become(accelerator, DistributedType.FSDP)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
        if accelerator.mixed_precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    elif sys.argv[1] in STAGES:
        make_deepspeed(accelerator, STAGES[sys.argv[1]])
    return accelerator


def become(accelerator: Accelerator, kind: DistributedType) -> None:
    accelerator.state.distributed_type = PartialState().distributed_type = kind


def make_deepspeed(accelerator: Accelerator, stage: int) -> None:
    import deepspeed
    from deepspeed import comm

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here
    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    plugin = DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=False)
    plugin.set_mixed_precision(accelerator.mixed_precision)
    plugin.select(_from_accelerator_state=True)
    # Tiny parameters would not be shared out, and be held whole.
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    become(accelerator, DistributedType.DEEPSPEED)
    accelerator.state.deepspeed_plugins = plugin
    accelerator.state._mixed_precision = "no"
    accelerator.deepspeed_engine_wrapped = None
    zero.load_whole()


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
    experiment.foresee = lambda *_: None  # two seconds a run, and has tests of its own
    if sys.argv[-1].startswith("--stop-after="):
        die_in_step(int(sys.argv[-1].partition("=")[2]))
    on_exists = "resume" if "--resume" in sys.argv else "refuse"
    for path in sys.argv[2:]:
        if path.startswith("--"):
            continue
        try:
            experiment.run_experiment(load_recipe(Path(path)), on_exists=on_exists)
        except PeftkitError as error:  # its record says so
            print(error)
