"""Which examples a step that came to NaN or Inf has to name.

Called by the loop when it stops for that reason, on every process at once.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import nn

from peftkit.contracts import Row, Task
from peftkit.training.state import StepBatches

_SHOWN = 8


@torch.no_grad()
def examples_to_blame(model: nn.Module, task: Task, batches: StepBatches) -> list[int]:
    """Indices of the examples, of all processes, whose own loss is not finite; else of all.

    Args:
        model: The bare module, with the parameters that the step ran with.
        task: Gives each example's loss.
        batches: This process's share of the step.
    """
    device = next(model.parameters()).device
    step, bad = [], []
    for micro, batch in batches:  # also those that do not count: other processes may wait
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        finite = task.predictions(model(**inputs), labels)["loss"].isfinite().tolist()
        if micro.counts:
            step += micro.indices
            bad += [i for i, fine in zip(micro.indices, finite, strict=True) if not fine]
    everything, blamed = gather_object(step), gather_object(bad)
    return sorted(blamed or everything)


def worded(examples: list[int], rows: Sequence[Row]) -> str:
    """Where the examples stand in their source and what to do, to end the error's line."""
    more = ", …" if len(examples) > _SHOWN else ""
    shown = ", ".join(str(rows[i].get("source_row", i)) for i in examples[:_SHOWN])
    return f"rows {shown}{more}; lower training.learning_rate, or look at these examples"
