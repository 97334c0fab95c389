"""Starting Accelerate, and refusing a launch that would do something else than was asked.

Called by the experiment before anything is loaded.
"""

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from peftkit.errors import RunError
from peftkit.training.config import TrainingConfig
from peftkit.training.sharded import will_shard


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of this process; the launcher decides the hardware.

    Raises:
        RunError: the launcher started several processes that do not know of one another.
    """
    # Said outright, or the launcher's own count would divide every loss once more.
    once = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_plugin=once
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RunError(
            f"launch: {launched} processes were started, but Accelerate sees "
            f"{accelerator.num_processes}; on a CPU set ACCELERATE_USE_CPU=true and launch with "
            "--multi_gpu --num_processes N"
        )
    cores, threads = _usable_cores(), torch.get_num_threads()
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if alone and threads < cores:
        print(
            f"note: this run uses {threads} of {cores} CPU cores, as OMP_NUM_THREADS is "
            f"{os.environ.get('OMP_NUM_THREADS')} (accelerate launch makes it 1 unless it is set)",
            file=sys.stderr,
        )
    return accelerator


def place(model: nn.Module, accelerator: Accelerator) -> None:
    """Move a prepared model to this process's device, in place, unless it will be sharded there."""
    if not will_shard(accelerator):
        model.to(accelerator.device)


def _usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
