"""Scoring a split: every example once, whatever the batch size and the number of processes.

Called by the loop (held-out part), the experiment (validation) and the `evaluate` verb.

Legend: N examples of the split, B batch.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from peftkit.contracts import Metrics, Split, Task
from peftkit.data.batching import evaluation_batches
from peftkit.training import rng
from peftkit.training.sharded import free_gathered, is_sharded

if TYPE_CHECKING:
    from peftkit.memory.meter import MemoryMeter


@dataclass(frozen=True)
class Evaluation:
    """Metrics (with `loss`, the mean over items), per-example columns (N, …), and seconds.

    The seconds leave out the batch under the memory probe.
    """

    metrics: Metrics
    columns: dict[str, np.ndarray]
    seconds: float


@dataclass(frozen=True)
class Evaluator:
    """How to evaluate: on which processes, in which batches, under which meter."""

    accelerator: Accelerator
    batch_size: int
    meter: "MemoryMeter | None" = None

    @rng.untouched()
    def evaluate(self, model: nn.Module, task: Task, split: Split) -> Evaluation:
        """Score `split`; leaves the model in eval mode, and the random numbers as they were.

        Returns:
            On every process, the whole split's result, in the order of the split.
        """
        started, metered = time.perf_counter(), self._metered_seconds()
        with self.meter.phase("eval") if self.meter else nullcontext():
            parts = self._forward(model, task, split)
        columns = _in_order(gather_object(parts), len(split.rows))
        metrics = {"loss": _mean_loss(columns), **task.metrics(columns)}
        seconds = time.perf_counter() - started - (self._metered_seconds() - metered)
        return Evaluation(metrics, columns, seconds)

    def _metered_seconds(self) -> float:
        return self.meter.overhead_seconds if self.meter else 0.0

    def _forward(self, model: nn.Module, task: Task, split: Split) -> list[dict[str, np.ndarray]]:
        """Columns of this process's batches, each with the `index` of its rows."""
        # The bare module: DDP would wait for ranks that have fewer batches.
        module = self.accelerator.unwrap_model(model)
        module.eval()
        batches = evaluation_batches(split.lengths, self.batch_size)
        own = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        most = -(-len(batches) // self.accelerator.num_processes)
        # A sharded model's forward needs all processes: who has no batch left repeats one.
        repeated = batches[:1] * (most - len(own)) if is_sharded(module) else []
        parts = []
        for position, indices in enumerate([*own, *repeated]):
            probe = self.meter.probe([module]) if self.meter and position == 0 else nullcontext()
            with probe:
                columns = self._batch(module, task, [split.rows[i] for i in indices])
            if position < len(own):
                parts.append({**columns, "index": np.asarray(indices)})
        free_gathered(module)
        return parts

    @torch.no_grad()
    def _batch(self, module: nn.Module, task: Task, rows: list[Any]) -> dict[str, np.ndarray]:
        batch = {k: v.to(self.accelerator.device) for k, v in task.collate(rows).items()}
        labels = batch.pop("labels")
        columns = task.predictions(module(**batch), labels)
        return {name: column.cpu().numpy() for name, column in columns.items()}


def _mean_loss(columns: dict[str, np.ndarray]) -> float:
    """Over what the loss sums over: examples, or the `loss_items` that each has."""
    if "loss_items" not in columns:
        return float(columns["loss"].mean())
    return float(columns["loss"].sum(dtype=np.float64) / columns["loss_items"].sum())


def _in_order(parts: list[dict[str, np.ndarray]], expected: int) -> dict[str, np.ndarray]:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    index = columns.pop("index")
    assert sorted(index.tolist()) == list(range(expected)), "an example was lost or counted twice"
    order = np.argsort(index)
    return {name: column[order] for name, column in columns.items()}
