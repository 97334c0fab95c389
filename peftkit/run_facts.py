"""What is known of a run in progress, and the record and manifest that are made of it.

Filled by the experiment as it goes. A run may end at any point, so every fact may be missing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from peftkit.contracts import Delta, LoadOptions, TaskData
from peftkit.data.sources import Located
from peftkit.errors import Interrupted, NonFiniteError, PeerError, PeftkitError, RunError
from peftkit.memory.meter import MemoryMeter
from peftkit.modeling.config import described
from peftkit.modeling.identity import base_digest, tokenizer_digest
from peftkit.modeling.loading import ModelSpec
from peftkit.recipe import Recipe
from peftkit.registry import DeltaInfo, RunSummary, StoredDelta
from peftkit.reporting.environment import device_description, git_state, library_versions
from peftkit.reporting.record import (
    Digests,
    MemoryPeaks,
    Origins,
    RunRecord,
    Seconds,
    Status,
    TrainBatch,
)
from peftkit.training.batch_size import accumulation_steps, is_out_of_memory
from peftkit.training.evaluation import Evaluation
from peftkit.training.state import TrainState
from peftkit.training.trackers import Trackers

MAX_REASON_CHARACTERS = 160


@dataclass
class RunFacts:
    """Facts of one run, in the order in which they become known."""

    recipe: Recipe
    accelerator: Accelerator
    meter: MemoryMeter
    trackers: Trackers = field(default_factory=Trackers)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, int] | None = None
    """Peak of live tensors in bytes by phase of the record, as the planner expects it."""
    base: Located | None = None
    base_digest: str | None = None
    base_config: dict[str, Any] | None = None
    tokenizer_digest: str | None = None
    data: TaskData | None = None
    spec: ModelSpec | None = None
    parameters: tuple[int, int] | None = None
    """Trainable and total."""
    training: TrainState = field(default_factory=TrainState)
    validation: Evaluation | None = None
    predictions: str | None = None
    """File of the per-example predictions, once it is written."""
    stored: StoredDelta | None = None

    def note_base(self, base: Located) -> None:
        """Remember the base and take its digests."""
        self.base = base
        self.base_digest = base_digest(base.path)
        self.base_config = described(base.path)
        self.tokenizer_digest = tokenizer_digest(base.path)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Book the enclosed wall time under `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started

    def conditions(self) -> dict[str, Any]:
        """What must be as it was for the run to be resumed."""
        assert self.data
        parts = (self.data.train, self.data.holdout, self.data.validation)
        return {
            "recipe": self.recipe.resolved(),
            "base": self.base_digest,
            "base config": self.base_config,
            "tokenizer": self.tokenizer_digest,
            **{f"{part.name} data": part.digest for part in parts if part},
            "mixed precision": self.accelerator.mixed_precision,
        }

    @property
    def train_batch(self) -> TrainBatch:
        """The batch that training uses, as asked or as `auto_batch_size` found it."""
        asked, found = self.recipe.training, self.training.micro_batch_size
        size = found or asked.per_device_train_batch_size
        return TrainBatch(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation_steps(asked, size),
            found=found is not None,
        )

    def delta_info(self, delta: Delta, spec: ModelSpec, options: LoadOptions) -> DeltaInfo:
        """What the stored delta says of itself; needs everything but `stored`."""
        assert self.data
        assert self.validation
        assert self.base_digest
        assert self.tokenizer_digest
        recipe = self.recipe
        resolved = recipe.resolved()
        return DeltaInfo(
            kind=delta.kind,
            base_name=recipe.base.name,
            base_revision=recipe.base.revision,
            base_digest=self.base_digest,
            base_config=self.base_config,
            quantisation=options.quantisation,
            tokenizer_digest=self.tokenizer_digest,
            task=resolved["task"],
            method=resolved["method"],
            labels=self.data.label_names,
            data={s.name: s.digest for s in (self.data.train, self.data.validation)},
            model={
                **asdict(spec),
                "config": dict(spec.config),
                "frozen": options.frozen,
                "keeps_float32": options.keeps_float32,
            },
            recipe=resolved,
            recipe_digest=recipe.digest(),
            run=RunSummary(
                record=str(recipe.run_folder / "record.json"),
                seed=recipe.seed,
                status="completed",
                metrics={k: v if v == v else None for k, v in self.validation.metrics.items()},
            ),
            stand_in=self.data.stand_in,
        )

    def record(self, status: Status, error: BaseException | None = None) -> RunRecord:
        """The run record as far as the run got."""
        recipe, training, data = self.recipe, self.training, self.data
        commit, dirty = git_state(Path.cwd())
        trainable, total = self.parameters or (None, None)
        timed = training.train_seconds or None
        return RunRecord(
            name=recipe.name,
            status=status,
            error=None if error is None else worded(error),
            recipe=recipe.resolved(),
            recipe_digest=recipe.digest(),
            seed=recipe.seed,
            metrics=self._metrics(),
            history=training.history,
            memory={
                name: MemoryPeaks(**asdict(peaks)) for name, peaks in self.meter.result().items()
            },
            predicted_allocated_bytes=self.predicted,
            seconds=self._seconds(),
            examples_per_second=training.examples / timed if timed else None,
            tokens_per_second=training.tokens / timed if timed else None,
            optimizer_steps=training.step,
            resumed_after_step=training.resumed_after,
            train_batch=self.train_batch if training.step or training.micro_batch_size else None,
            weights_from_step=training.weights_from_step,
            trainable_parameters=trainable,
            total_parameters=total,
            delta_bytes=self._delta_bytes(),
            delta=f"{self.stored.name}@{self.stored.version}" if self.stored else None,
            digests=Digests(
                base=self.base_digest,
                data_train=data.train.digest if data else None,
                data_validation=data.validation.digest if data else None,
                recipe=recipe.digest(),
            ),
            learning_rates_tried=recipe.training.learning_rates_tried,
            libraries=library_versions(),
            device=device_description(self.accelerator.device),
            processes=self.accelerator.num_processes,
            mixed_precision=self.accelerator.mixed_precision,
            distributed_type=self.accelerator.distributed_type.value,
            git_commit=commit,
            git_dirty=dirty,
            predictions=self.predictions,
            stand_in=bool(data and data.stand_in),
            origins=Origins(
                base=self.base.origin if self.base else None, data=data.origin if data else None
            ),
            started=self.started,
            finished=datetime.now(UTC),
        )

    def _metrics(self) -> dict[str, dict[str, float]]:
        """Held-out scores of the checkpoint that was kept, and validation scores."""
        kept = [r for r in self.training.history if r["step"] == self.training.best_step]
        metrics = {"holdout": kept[0]["holdout"]} if kept else {}
        if self.validation:
            metrics["validation"] = self.validation.metrics
        return metrics

    def _seconds(self) -> Seconds:
        training = self.training
        evaluated = training.eval_seconds + (self.validation.seconds if self.validation else 0.0)
        return Seconds(
            load=self.seconds.get("load"),
            tokenise=self.seconds.get("tokenise"),
            train=training.train_seconds if training.step else None,
            train_cpu=training.train_cpu_seconds if training.step else None,
            eval=evaluated or None,
            metered=self.meter.overhead_seconds or training.metered_seconds or None,
        )

    def _delta_bytes(self) -> int | None:
        return sum(f.size for f in self.stored.files.values()) if self.stored else None


def status_of(error: BaseException) -> Status:
    """The record's word for how a run ended."""
    if isinstance(error, Interrupted | PeerError):
        return cast(Status, error.status)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, NonFiniteError):
        return "non_finite"
    return "out_of_memory" if is_out_of_memory(error) else "failed"


def lost_process(error: BaseException) -> RunError | None:
    """What to say if another process of the run is gone; torch has no error class for gloo's."""
    text = str(error)
    by_gloo = isinstance(error, RuntimeError) and "gloo" in text
    if isinstance(error, torch.distributed.DistError) or by_gloo:
        return RunError(
            "another process of this run ended or cannot be reached any more; the reason is with "
            "that process or its launcher, and --resume goes on after the last checkpoint "
            f"({' '.join(text.split())[:MAX_REASON_CHARACTERS]})"
        )
    return None


def worded(error: BaseException) -> str:
    """The error in one line a problem: expected ones as they are, others with their type."""
    if isinstance(error, PeftkitError | Interrupted):
        return str(error)
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
