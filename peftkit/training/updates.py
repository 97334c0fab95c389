"""Gradients and the update of a step, by Accelerate, or by DeepSpeed where it is launched.

Called by the loop, which owns the order of things: micro-batches, the loss, then the update.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from peftkit.modeling.parameters import trainable_parameters
from peftkit.training import zero
from peftkit.training.config import TrainingConfig
from peftkit.training.sharded import (
    reduce_in_float32,
    scalar,
    shard_by_blocks,
    shared_out_state,
    whole,
)


class Updates(Protocol):
    """A model and its optimizer, prepared for the hardware of the launch."""

    model: nn.Module
    optimizer: Optimizer

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch; gradients are exchanged at the last."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` divided by the number of processes."""

    def apply(self, loss: float) -> tuple[float, bool]:
        """Clip the gradients, update the parameters, and forget the gradients.

        Returns:
            Norm of all gradients before they were clipped, and whether the step is sound: if not,
            as `loss` or a gradient is NaN or Inf, the parameters are as they were.
        """

    def optimizer_state(self, *, keep: bool) -> dict[str, Any]:
        """`state_dict` of the optimizer with whole tensors; for every process to call.

        With `keep` false this process only helps to gather them.
        """

    def restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Take in what `optimizer_state` gave, on every process."""


def prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: TrainingConfig
) -> Updates:
    """Prepare `model`, in place, and `optimizer`, which is over its parameters."""
    bound = config.max_grad_norm
    if zero.is_asked(accelerator):
        size = config.per_device_train_batch_size
        return zero.ZeroUpdates(accelerator, model, optimizer, batch_size=size, bound=bound)
    return AcceleratedUpdates(accelerator, model, optimizer, bound)


class AcceleratedUpdates:
    """One process, DDP or FSDP2. `bound` is the largest norm that gradients keep; None: any."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        bound: float | None,
    ) -> None:
        shard_by_blocks(accelerator, model)
        reduce_in_float32(accelerator)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._accelerator, self._bound = accelerator, bound

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Without exchange of gradients, except at the last."""
        return nullcontext() if last else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients; a loss scale is applied."""
        # Accelerate divides by its own accumulation count, which stays 1 here.
        self._accelerator.backward(loss)

    def apply(self, loss: float) -> tuple[float, bool]:
        """Update, unless the step is not sound; an infinite gradient may be the loss scale's."""
        norm = self._clipped_norm()
        sound = math.isfinite(loss) and (math.isfinite(norm) or self._may_rescale())
        if sound:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return norm, sound

    def optimizer_state(self, *, keep: bool) -> dict[str, Any]:
        """Gathered from all shards."""
        state: dict[str, Any] = whole(self.optimizer.state_dict(), keep=keep)
        return state

    def restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Each process keeps its shard."""
        self.optimizer.load_state_dict(shared_out_state(self.optimizer, state))

    def _clipped_norm(self) -> float:
        parameters = trainable_parameters(self.model).values()
        self._accelerator.unscale_gradients(self.optimizer)
        return scalar(torch.nn.utils.clip_grad_norm_(parameters, self._bound or math.inf))

    def _may_rescale(self) -> bool:
        """Whether a gradient may be infinite because of the loss scale, which then falls."""
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1.0
