"""Starting Accelerate, and refusing a launch that would do something else than was asked.

Called by the experiment before anything is loaded.
"""

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from peftkit.errors import RunError
from peftkit.training.config import TrainingConfig


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
    idle = _idle_cores(accelerator)
    if idle and accelerator.is_main_process:
        print(
            f"note: {idle} CPU cores stay idle, as OMP_NUM_THREADS is "
            f"{os.environ.get('OMP_NUM_THREADS')} (accelerate launch sets it to 1 unless you set "
            "it)",
            file=sys.stderr,
        )
    return accelerator


def _idle_cores(accelerator: Accelerator) -> int:
    """Cores that this process may use and will not, if it trains on the CPU alone."""
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, (cores or 1) - torch.get_num_threads())
