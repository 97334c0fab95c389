"""The training loop on Accelerate, from the first step to the best checkpoint.

Called by the experiment with a prepared model. Knows neither methods nor tasks by name: what
trains comes as parameter groups, what a batch means is the task's.

Legend: B batch, T tokens. A *step* is an optimizer step; a *micro-batch* is one forward and
backward pass of one process. The loss of a step is the mean over all its items (examples, or
unmasked tokens) on all processes, however they are shared out.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peftkit.contracts import Metrics, Split
from peftkit.data.batching import MicroBatch, longest_step, plan_epoch, share_step
from peftkit.errors import Interrupted, NonFiniteError
from peftkit.modeling.parameters import train_mode, trainable_parameters
from peftkit.training.batch_size import fitting_batch_size
from peftkit.training.best import BestMetric
from peftkit.training.checkpoints import CheckpointFolder, trained_tensors
from peftkit.training.evaluation import Evaluator
from peftkit.training.non_finite import examples_to_blame, worded
from peftkit.training.optimizers import build_optimizer, learning_rate_factor, set_learning_rates
from peftkit.training.progress import Progress
from peftkit.training.signals import StopRequest, mind_the_parent_only
from peftkit.training.snapshots import Snapshots, by_main
from peftkit.training.state import Job, StepBatches, StepResult, TrainState
from peftkit.training.updates import prepared

if TYPE_CHECKING:
    from peftkit.memory.meter import MemoryMeter


class Trainer:
    """Trains one job; `fit` is the story, the rest are its steps."""

    def __init__(self, job: Job, accelerator: Accelerator, meter: "MemoryMeter") -> None:
        self.job, self.config, self.meter = job, job.config, meter
        self.accelerator = accelerator
        optimizer = build_optimizer(job.config, job.groups)
        self.updates = prepared(accelerator, job.model, optimizer, job.config)
        self.model, self.optimizer = self.updates.model, self.updates.optimizer
        self.state = TrainState()
        self._metering_done = False
        limit = job.config.save_total_limit
        self.checkpoints = CheckpointFolder(job.folder / "checkpoints", keep=limit)
        bare, kept = self._bare_model(), self.checkpoints
        self.snapshots = Snapshots(accelerator, bare, self.updates, meter, kept, job.conditions)
        self.evaluator = Evaluator(accelerator, job.config.per_device_eval_batch_size, meter)
        leading = job.config.metric_for_best_model or job.task.metric_names[0]
        self.best = BestMetric(leading, greater_is_better=job.config.greater_is_better)
        size = job.config.per_device_train_batch_size * job.config.gradient_accumulation_steps
        self.batch_size = size * accelerator.num_processes
        self.steps_per_epoch = math.ceil(len(job.train.rows) / self.batch_size)
        planned = math.ceil(job.config.num_train_epochs * self.steps_per_epoch)
        self.total_steps = min(planned, job.config.max_steps or planned)

    def fit(self, stop: StopRequest, *, resume: bool = False) -> TrainState:
        """Train to the end, or to early stopping, and put the best checkpoint into the model.

        Raises:
            NonFiniteError: NaN or Inf in a loss or gradient; parameters are as before that step.
            Interrupted: a signal came; a checkpoint of the last finished step is written.
        """
        if resume:
            self.state = self.snapshots.put_back()
        if self.config.auto_batch_size and self.state.micro_batch_size is None:
            found = fitting_batch_size(self.job, self.accelerator, self.optimizer)
            self.state.micro_batch_size = found
        visible = self.accelerator.is_main_process
        log = self.job.folder / "log.jsonl"
        after = self.state.resumed_after
        progress = Progress(
            log,
            self.job.trackers,
            total_steps=self.total_steps,
            resumed_after=after,
            visible=visible,
        )
        try:
            with stop.deferred():
                while self.state.step < self.total_steps and not self._out_of_patience():
                    self._epoch(progress, stop)
            stop.check()
        finally:
            progress.close()
        if self.state.best_step not in (None, self.state.step):
            self.checkpoints.load_best(self.state.best_step, self._bare_model())
        return self.state

    def _epoch(self, progress: Progress, stop: StopRequest) -> None:
        """The rest of the current epoch, with the evaluations and checkpoints that fall in it."""
        state, lengths = self.state, self.job.train.lengths
        steps = plan_epoch(lengths, self.batch_size, seed=self.job.seed, epoch=state.epoch)
        steps = steps[: state.step_in_epoch + self.total_steps - state.step]
        metered = self._metered(steps, state.step_in_epoch)
        train_mode(self.model)
        for number, batches in self._batches(steps, start=state.step_in_epoch):
            result = self._timed_step(batches, metered=number in metered)
            state.step += 1
            state.step_in_epoch = number + 1
            progress.step()
            ended = state.step_in_epoch == self.steps_per_epoch or state.step == self.total_steps
            if state.step % self.config.logging_steps == 0 or ended:
                progress.report(self._row(result))
            if self._due(self.config.eval_steps, ended=ended) and self.job.holdout is not None:
                progress.report({"step": state.step, **self._evaluate(self.job.holdout)})
            if self._due(self.config.save_steps, ended=ended):
                self.snapshots.take(self.state)
            self._stop_if_asked(stop)
            if self._out_of_patience():
                return
        state.epoch, state.step_in_epoch = state.epoch + 1, 0

    def _metered(self, steps: Sequence[Sequence[int]], start: int) -> set[int]:
        """Steps under the memory probe: the first two and the largest of the first epoch here."""
        if self._metering_done or start == len(steps):
            return set()
        self._metering_done = True
        return {start, start + 1, start + longest_step(steps[start:], self.job.train.lengths)}

    def _batches(
        self, steps: Sequence[Sequence[int]], *, start: int
    ) -> Iterator[tuple[int, StepBatches]]:
        """Number and collated micro-batches of each step from `start` on."""
        size = self.state.micro_batch_size or self.config.per_device_train_batch_size
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        shares = [share_step(step, size, rank=rank, processes=processes) for step in steps[start:]]
        loader: DataLoader[Any] = DataLoader(
            self.job.train.rows,  # type: ignore[arg-type]
            batch_sampler=[micro.indices for share in shares for micro in share],
            collate_fn=self.job.task.collate,
            num_workers=self.config.dataloader_num_workers,
            worker_init_fn=mind_the_parent_only,
            generator=torch.Generator(),  # else each epoch draws a seed from the global RNG
        )
        collated = iter(loader)
        for number, share in enumerate(shares, start):
            yield number, [(micro, next(collated)) for micro in share]

    def _timed_step(self, batches: StepBatches, *, metered: bool) -> StepResult:
        """One step under the memory meter, its time booked as training or as metering."""
        started, busy = time.perf_counter(), time.process_time()
        probe = self.meter.probe([self._bare_model(), self.optimizer]) if metered else nullcontext()
        with self.meter.phase("train_step"), probe:
            result = self._step(batches)
        seconds = time.perf_counter() - started
        self.state.losses.append(result.loss)
        if metered:
            self.state.metered_seconds += seconds
        else:
            self.state.train_seconds += seconds
            self.state.train_cpu_seconds += time.process_time() - busy
            self.state.examples += result.examples
            self.state.tokens += result.tokens
        return result

    def _step(self, batches: StepBatches) -> StepResult:
        """Forward and backward over the micro-batches, then one update."""
        device = self.accelerator.device
        set_learning_rates(self.optimizer, self._factor())
        items = sum(self.job.task.loss_items(b["labels"]) for m, b in batches if m.counts)
        counts = torch.tensor([items, *_sizes(batches)], dtype=torch.int64, device=device)
        total, examples, tokens = self.accelerator.reduce(counts, "sum").tolist()
        loss_sum = torch.zeros((), device=device)
        for position, (micro, batch) in enumerate(batches):
            last = position == len(batches) - 1
            with self.updates.micro_batch(last=last):
                loss_sum += self._backward(micro, batch, total=total, last=last)
        loss = float(self.accelerator.reduce(loss_sum, "sum")) / total
        norm, sound = self.updates.apply(loss)
        if not sound:
            raise self._non_finite(batches, loss, norm)
        return StepResult(loss, norm, examples, tokens)

    def _backward(
        self, micro: MicroBatch, batch: dict[str, Tensor], *, total: float, last: bool
    ) -> Tensor:
        """Gradients of one micro-batch; returns its detached loss sum, 0 if it does not count."""
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        outputs = self.model(**inputs)
        smoothing = self.config.label_smoothing
        loss_sum = self.job.task.loss(outputs, labels, label_smoothing=smoothing)
        loss_sum = loss_sum * float(micro.counts)
        # Gradients are averaged over processes; the sum is wanted.
        loss = loss_sum * (self.accelerator.num_processes / total)
        if last and self.config.l1:
            loss = loss + self.config.l1 * self._l1_norm()
        self.updates.backward(loss)
        return loss_sum.detach()

    def _l1_norm(self) -> Tensor:
        matrices = (p for p in trainable_parameters(self.model).values() if p.ndim >= 2)
        return torch.stack([p.abs().sum() for p in matrices]).sum()

    def _evaluate(self, holdout: Split) -> Metrics:
        """Score the held-out part and note whether it is the best so far."""
        result = self.evaluator.evaluate(self.model, self.job.task, holdout)
        train_mode(self.model)
        state = self.state
        state.eval_seconds += result.seconds
        mean_loss = sum(state.losses) / len(state.losses)
        state.history.append({"step": state.step, "loss": mean_loss, "holdout": result.metrics})
        state.losses = []
        value = self.best.value(result.metrics)
        if self.best.improves(value, state.best_value):
            state.best_step, state.best_value, state.stale_evaluations = state.step, value, 0
            trained = trained_tensors(self._bare_model(), keep=self.accelerator.is_main_process)
            by_main(self.accelerator, lambda: self.checkpoints.save_best(state.step, trained))
        else:
            state.stale_evaluations += 1
        return {f"holdout_{name}": value for name, value in result.metrics.items()}

    def _stop_if_asked(self, stop: StopRequest) -> None:
        """Save and stop if any process was asked to: all leave at the same step."""
        asked = torch.tensor(stop.number or 0, device=self.accelerator.device)
        number = int(self.accelerator.gather(asked).max())
        if number:
            self.snapshots.take(self.state)
            raise Interrupted(number, saved_step=self.state.step)

    def _due(self, every: int | None, *, ended: bool) -> bool:
        """Every so many steps, or at the end of each epoch; and after the last step."""
        if self.state.step == self.total_steps:
            return True
        return ended if every is None else self.state.step % every == 0

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.stale_evaluations >= patience

    def _factor(self) -> float:
        return learning_rate_factor(self.config, self.state.step, self.total_steps)

    def _bare_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def _row(self, result: StepResult) -> dict[str, Any]:
        return {
            "step": self.state.step,
            "total_steps": self.total_steps,
            "epoch": round(self.state.step / self.steps_per_epoch, 3),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def _non_finite(self, batches: StepBatches, loss: float, norm: float) -> NonFiniteError:
        own = examples_to_blame(self._bare_model(), self.job.task, batches)
        found = f"step {self.state.step + 1}: loss {loss}, gradient norm {norm}"
        return NonFiniteError(f"{found}; train {worded(own, self.job.train.rows)}")


def _sizes(batches: StepBatches) -> tuple[int, int]:
    """Examples and non-padding tokens of the micro-batches that count."""
    counted = [batch for micro, batch in batches if micro.counts]
    examples = sum(len(batch["labels"]) for batch in counted)
    return examples, sum(int(batch["attention_mask"].sum()) for batch in counted)
