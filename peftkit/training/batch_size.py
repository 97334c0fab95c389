"""The largest micro-batch that fits in memory, found before the first step: `auto_batch_size`.

Called by the loop. Each size is tried on the bare model, where no process waits for another, with
as many of the longest examples as it says; a try leaves no trace. Then all processes agree.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch.optim import Optimizer

from peftkit.modeling.parameters import train_mode
from peftkit.training import rng
from peftkit.training.config import TrainingConfig
from peftkit.training.optimizers import set_learning_rates
from peftkit.training.state import Job


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left; torch has no error class on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def fitting_batch_size(job: Job, accelerator: Accelerator, optimizer: Any) -> int:
    """Examples in a forward pass of one process: as asked, or halved until it fits on all.

    A size that cannot be halved evenly is returned as it is: training then says that memory is out.

    Args:
        job: What will be trained; its model, optimizer and random numbers are as before afterwards.
        accelerator: Of this process.
        optimizer: As Accelerate prepared it.
    """
    size = job.config.per_device_train_batch_size
    while size % 2 == 0 and not _fits_everywhere(job, accelerator, optimizer, size):
        size //= 2
        if accelerator.is_main_process:
            print(
                f"training.auto_batch_size: {2 * size} examples at a time do not fit in memory; "
                f"{size} from here on, with gradient_accumulation_steps "
                f"{accumulation_steps(job.config, size)}",
                file=sys.stderr,
                flush=True,
            )
    return size


def accumulation_steps(config: TrainingConfig, size: int) -> int:
    """Micro-batches of `size` in a step of one process, so that the effective batch is as asked."""
    return config.gradient_accumulation_steps * (config.per_device_train_batch_size // size)


def _fits_everywhere(job: Job, accelerator: Accelerator, optimizer: Any, size: int) -> bool:
    failed = False
    try:
        with rng.untouched(), _undone(job, optimizer.optimizer):
            _fill_memory(job, accelerator, optimizer.optimizer, size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    # Not in the `except`: until that is left, the traceback holds the tensors of the pass.
    clear_device_cache(garbage_collection=True)
    failures = torch.tensor(float(failed), device=accelerator.device)
    return not accelerator.reduce(failures, "sum")


def _fill_memory(job: Job, accelerator: Accelerator, optimizer: Optimizer, size: int) -> None:
    """The most that a step holds: gradients and the optimizer's state beside a pass's activations.

    The update is none, as the rates and the gradients are 0.
    """
    lengths = job.train.lengths
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-size:]
    rows = [job.train.rows[i] for i in longest]
    train_mode(job.model)
    _pass(job, accelerator, rows)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
    set_learning_rates(optimizer, 0.0)
    optimizer.step()
    if accumulation_steps(job.config, size) == 1:
        optimizer.zero_grad()
    _pass(job, accelerator, rows)


def _pass(job: Job, accelerator: Accelerator, rows: list[Any]) -> None:
    inputs = {k: v.to(accelerator.device) for k, v in job.task.collate(rows).items()}
    labels = inputs.pop("labels")
    # Not the prepared model: DDP would exchange buffers, and then gradients, with the others.
    outputs = job.model(**inputs)
    smoothing = job.config.label_smoothing
    accelerator.backward(job.task.loss(outputs, labels, label_smoothing=smoothing))


@contextmanager
def _undone(job: Job, optimizer: Optimizer) -> Iterator[None]:
    """Afterwards buffers and optimizer are as before, and there are no gradients."""
    state = deepcopy(optimizer.state_dict())
    buffers = [(buffer, buffer.clone()) for buffer in job.model.buffers()]
    try:
        yield
    finally:
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        for buffer, value in buffers:
            buffer.copy_(value)
