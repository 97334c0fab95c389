"""One training step and one evaluation on fake tensors, under a tape.

Called by the planner; imports torch and the tape. It does what `training.loop` does, in its order,
so that the same tensors live at the same time.

The backward pass has three parts: through the last block, through those between, and through the
first. In a deeper model each part's peak grows by the same amount with each block, while the
highest of the three may become another one.

Legend: B batch, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftkit.memory.caching_allocator import CachingAllocator
from peftkit.memory.storage_tape import Peak, StorageTape

Batch = Mapping[str, Tensor]
"""Inputs (B, T) and `labels`."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FakeJob:
    """What is to be stepped through; all tensors are fake."""

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[Any, Tensor], Tensor]
    """Of outputs and labels, summed over the batch."""
    batches: Sequence[Batch]
    """The micro-batches of one optimizer step; two show what many do."""
    eval_batch: Batch
    blocks: Sequence[nn.Module] = ()
    mixed_precision: str = "no"
    max_grad_norm: float | None = 1.0


def trace(
    job: FakeJob, *, quantisation: Sequence[Tensor] = (), on_gpu: bool = False
) -> dict[str, Peak]:
    """Peak of each phase, the parts of the backward pass apart; on a GPU as its allocator counts.

    Changes the model's gradients and the optimizer's state, which cost nothing.
    """
    _make_state(job)
    tape = StorageTape()
    _mark_blocks(job.blocks, tape)
    parameters = list(job.model.parameters())
    tape.begin("load")
    tape.name("quantisation", list(quantisation))
    tape.name("trainable_weights", [p for p in parameters if p.requires_grad])
    tape.name("base_weights", [parameters, list(job.model.buffers())])
    tape.begin("forward")
    tape.name("optimizer_state", list(job.optimizer.state.values()))
    tape.name("temporary", [dict(batch) for batch in job.batches])
    with tape:
        for batch in job.batches:
            _micro_step(job, batch, tape)
        tape.begin("optimizer_step")
        _update(job)
        tape.begin("evaluation")
        _evaluate(job)
    tape.stop()
    return tape.peaks(CachingAllocator() if on_gpu else None)


def _make_state(job: FakeJob) -> None:
    """As after the first step: the optimizer has its state, gradients are gone."""
    for parameter in job.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    job.optimizer.step()
    job.optimizer.zero_grad()


def _micro_step(job: FakeJob, batch: Batch, tape: StorageTape) -> None:
    inputs = dict(batch)
    labels = inputs.pop("labels")
    tape.begin("forward")
    with _autocast(job.mixed_precision):
        outputs = job.model(**inputs)
    loss = job.loss(outputs, labels) * 0.5
    tape.name_living("activations")
    tape.begin("backward_first")
    loss.backward()
    tape.name("gradients", [p.grad for p in job.model.parameters() if p.grad is not None])


def _mark_blocks(blocks: Sequence[nn.Module], tape: StorageTape) -> None:
    """Begin the next part when the gradient of what a block hands on is there."""
    for part, block in zip(
        ("backward_last", "backward_middle"), (blocks[:1], blocks[-2:-1]), strict=True
    ):
        for module in block:
            module.register_forward_hook(partial(_begin_at_gradient, tape, part))


def _begin_at_gradient(tape: StorageTape, part: str, module: nn.Module, _: Any, out: Any) -> None:
    tensor = out[0] if isinstance(out, tuple) else out
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: tape.begin(part))


def _update(job: FakeJob) -> None:
    trained = [p for p in job.model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, job.max_grad_norm or float("inf"))
    job.optimizer.step()
    job.optimizer.zero_grad()


def _evaluate(job: FakeJob) -> None:
    job.model.eval()
    inputs = {name: value for name, value in job.eval_batch.items() if name != "labels"}
    with torch.no_grad(), _autocast(job.mixed_precision):
        job.model(**inputs)


def _autocast(mixed_precision: str) -> AbstractContextManager[object]:
    if mixed_precision == "no":
        return nullcontext()
    return torch.autocast("cpu", AUTOCAST[mixed_precision])
