"""Scoring stored deltas on the validation split of their task.

Called by the verbs `evaluate` and `merge`; what loads models is imported inside the functions. The
model runs in the mixed precision that it was trained in, so that the same inputs give the same
numbers.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peftkit.errors import DataError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftkit.registry import DeltaInfo, Registry
    from peftkit.registry.loading import LoadedDelta


@dataclass(frozen=True)
class Score:
    """One metric as the run recorded it and as it is now; None is "not a finite number"."""

    metric: str
    recorded: float | None
    now: float | None

    @property
    def equal(self) -> bool:
        """To the last bit: the same inputs in the same precision leave no room for noise."""
        return self.recorded == self.now


@dataclass(frozen=True)
class ParentScore:
    """One metric of a parent's task: what its run recorded, and what the combined delta has."""

    parent: str
    metric: str
    recorded: float | None
    result: float | None


def rescore(loaded: "LoadedDelta") -> tuple[list[Score], int]:
    """Metrics on validation beside the recorded ones, and the number of examples.

    A combined delta has no recorded ones.

    Raises:
        DataError: other validation rows than the run was scored on.
    """
    from peftkit.training.evaluation import Evaluator

    info = loaded.stored.info
    data = loaded.task.load(loaded.tokenizer, seed=info.run.seed)
    # One made of several is marked if any of them saw a sample, whatever its own task is.
    if data.stand_in != info.stand_in and not info.parents:
        raise DataError(_other_data(info))
    expected = info.data.get("validation", data.validation.digest)
    if data.validation.digest != expected:
        raise DataError(
            f"{info.task['dataset']}: the run was scored on validation rows of digest {expected}, "
            f"found {data.validation.digest}; the scores cannot be compared"
        )
    accelerator = accelerator_for(info)
    model = accelerator.prepare_model(loaded.model, evaluation_mode=True)
    batch_size = info.recipe["training"]["per_device_eval_batch_size"]
    result = Evaluator(accelerator, batch_size).evaluate(model, loaded.task, data.validation)
    recorded = info.run.metrics
    names = [*recorded, *(result.metrics.keys() - recorded.keys())]
    now = {key: _finite(value) for key, value in result.metrics.items()}
    scores = [Score(key, recorded.get(key), now.get(key)) for key in names]
    return scores, len(data.validation.rows)


def parent_scores(registry: "Registry", reference: str) -> list[ParentScore]:
    """Score a combined delta on the task of each parent, beside what the parent's run recorded.

    Where a parent's head answers something else than the result's, the parent's own head is put on
    the combined body.

    Raises:
        RegistryError: the delta or a parent is not in the registry, or damaged.
        DataError: other validation rows than the parent was scored on.
    """
    from peftkit.merging.other_head import under_head
    from peftkit.merging.sources import head_of
    from peftkit.registry.base import base_of
    from peftkit.registry.loading import on_base

    result = registry.find(reference)
    folder = base_of(result)
    delta = registry.read_delta(result, base=folder)
    found = []
    for entry in result.info.parents:
        name = entry.reference.partition("@")[0]
        parent = registry.find(f"{name}@{entry.digest}")
        body, info = delta, parent.info
        if head_of(parent.info) == head_of(result.info):
            info = info.model_copy(update={"model": result.info.model, "kind": delta.kind})
        else:
            own = registry.read_delta(parent, base=folder)
            info, body = under_head(folder, (result.info, delta), (parent.info, own))
        scores, _ = rescore(on_base(folder, replace(parent, info=info), body))
        found += [ParentScore(entry.reference, s.metric, s.recorded, s.now) for s in scores]
    return found


def accelerator_for(info: "DeltaInfo") -> "Accelerator":
    """What runs the model as the delta's run did."""
    from accelerate import Accelerator

    return Accelerator(mixed_precision=info.model["mixed_precision"])


def _other_data(info: "DeltaInfo") -> str:
    trained, found = ("peftkit's sample", "the real data")
    if not info.stand_in:
        trained, found = found, trained
    return (
        f"{info.task['dataset']}: the run was scored on {trained}, found {found}; "
        "the scores cannot be compared"
    )


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None
