"""What the loop is given, what it remembers, and what one step gives back.

Values only; `loop` works on them and `checkpoints` stores `TrainState`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftkit.contracts import ParameterGroup, Split, Task
from peftkit.data.batching import MicroBatch
from peftkit.training.config import TrainingConfig
from peftkit.training.trackers import Trackers

StepBatches = list[tuple[MicroBatch, dict[str, Tensor]]]
"""One process's share of a step: each micro-batch with its collated tensors."""


@dataclass(frozen=True)
class Job:
    """What to train and where to keep it. `model` is prepared by the method."""

    model: nn.Module
    groups: Sequence[ParameterGroup]
    task: Task
    train: Split
    holdout: Split | None
    config: TrainingConfig
    seed: int
    folder: Path
    """The run's folder: `log.jsonl` and `checkpoints/` go here."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """By name, what must not have changed when the run is resumed: digests, precision."""
    trackers: Trackers = field(default_factory=Trackers)


@dataclass
class TrainState:
    """Where training is; everything of it is in a checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    micro_batch_size: int | None = None
    """Examples in a forward pass of one process, where `auto_batch_size` found them."""
    best_step: int | None = None
    best_value: float | None = None
    stale_evaluations: int = 0
    examples: int = 0
    tokens: int = 0
    """Without padding, over all processes."""
    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    """Processor time of this process in the steps of `train_seconds`, all threads together."""
    metered_seconds: float = 0.0
    """Steps under the memory probe; not in `train_seconds`, nor their examples and tokens."""
    eval_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Of each step since the last evaluation."""
    history: list[dict[str, Any]] = field(default_factory=list)
    resumed_after: int | None = None
    """Step after which this process took the run up; None if it started it."""
    weights_from_step: int | None = None
    """Step of an earlier training in this folder, whose weights this one began with."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss over its items, gradient norm before clipping, counts."""

    loss: float
    grad_norm: float
    examples: int
    tokens: int
