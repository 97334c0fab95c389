"""What an arm cost: memory, seconds, sizes, as one figure over its seeds.

Called by the comparison; imports the arms. Peaks are the highest over the seeds, times and
throughputs the mean. None: no run of the arm has the figure.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

from peftkit.reporting.arms import Arm
from peftkit.reporting.record import Phase, RunRecord

PHASES: Final[tuple[Phase, ...]] = ("load", "train_step", "eval")
KINDS: Final = ("allocated_bytes", "reserved_bytes", "resident_bytes")


@dataclass(frozen=True)
class Figures:
    """Sizes in bytes, times in seconds."""

    memory: dict[str, dict[str, int | None]]
    """Phase → kind → the highest peak."""
    predicted: dict[str, int | None]
    """Phase → the most that the planner expected of `allocated_bytes`."""
    prediction_errors: dict[str, float | None]
    """Phase → predicted over measured peak less 1, of the run in which it is farthest from 0."""
    train_seconds: float | None
    train_cpu_seconds: float | None
    eval_seconds: float | None
    examples_per_second: float | None
    tokens_per_second: float | None
    trainable_parameters: int | None
    total_parameters: int | None
    delta_bytes: int | None
    runs_beside_another: int
    """Runs of which `shared_machine` says that they were: their wall seconds are too long."""
    statuses: dict[str, int]
    cost: float | None
    """Of one run, training and evaluation; None also without a price."""

    @property
    def peak_bytes(self) -> int | None:
        """Highest measured peak of live tensors in a training step."""
        return self.memory["train_step"]["allocated_bytes"]

    @property
    def needed_bytes(self) -> int | None:
        """Highest measured peak of live tensors in any phase: what a budget must hold."""
        return _largest([peaks["allocated_bytes"] for peaks in self.memory.values()])

    @property
    def resident_bytes(self) -> int | None:
        """Highest measured peak of the whole process in any phase."""
        return _largest([peaks["resident_bytes"] for peaks in self.memory.values()])

    @property
    def prediction_error(self) -> float | None:
        """That of a training step."""
        return self.prediction_errors["train_step"]

    def as_json(self) -> dict[str, Any]:
        """All fields and those that are computed."""
        computed = ("peak_bytes", "needed_bytes", "resident_bytes", "prediction_error")
        return vars(self) | {name: getattr(self, name) for name in computed}


def figures_of(
    arm: Arm, price_per_hour: float | None, beside_another: AbstractSet[int] = frozenset()
) -> Figures:
    """Of the completed runs; of all, as far as they got, where none is completed.

    `beside_another` is what `shared_machine` found.
    """
    records = [run.record for run in arm.completed or arm.runs if run.record]
    train, evaluation = (
        _mean(records, lambda r: r.seconds.train),
        _mean(records, lambda r: r.seconds.eval),
    )
    return Figures(
        memory={phase: {kind: _peak(records, phase, kind) for kind in KINDS} for phase in PHASES},
        predicted={phase: _predicted(records, phase) for phase in PHASES},
        prediction_errors={phase: _worst_error(records, phase) for phase in PHASES},
        train_seconds=train,
        train_cpu_seconds=_mean(records, lambda r: r.seconds.train_cpu),
        eval_seconds=evaluation,
        examples_per_second=_mean(records, lambda r: r.examples_per_second),
        tokens_per_second=_mean(records, lambda r: r.tokens_per_second),
        trainable_parameters=_largest([r.trainable_parameters for r in records]),
        total_parameters=_largest([r.total_parameters for r in records]),
        delta_bytes=_largest([r.delta_bytes for r in records]),
        runs_beside_another=sum(id(record) in beside_another for record in records),
        statuses=dict(Counter(run.status for run in arm.runs)),
        cost=_cost(train, evaluation, price_per_hour),
    )


def shared_machine(runs: Sequence[RunRecord]) -> set[int]:
    """`id` of every record during whose time another run was at work on the same device.

    Seen from the records at hand only: other programs leave none.
    """
    by_device: dict[str, list[RunRecord]] = {}
    for record in sorted(runs, key=lambda r: r.started):
        by_device.setdefault(record.device, []).append(record)
    found: set[int] = set()
    for ordered in by_device.values():
        latest = ordered[0]
        for record in ordered[1:]:
            if record.started < latest.finished:
                found |= {id(latest), id(record)}
            latest = max(latest, record, key=lambda r: r.finished)
    return found


def _peak(records: Sequence[RunRecord], phase: Phase, kind: str) -> int | None:
    peaks = [r.memory[phase] for r in records if phase in r.memory]
    return _largest([getattr(peak, kind) for peak in peaks])


def _predicted(records: Sequence[RunRecord], phase: Phase) -> int | None:
    return _largest([(r.predicted_allocated_bytes or {}).get(phase) for r in records])


def _worst_error(records: Sequence[RunRecord], phase: Phase) -> float | None:
    errors = []
    for record in records:
        predicted = (record.predicted_allocated_bytes or {}).get(phase)
        measured = record.memory[phase].allocated_bytes if phase in record.memory else None
        if predicted and measured:
            errors.append(predicted / measured - 1)
    return max(errors, key=abs, default=None)


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _mean(records: Sequence[RunRecord], value: Callable[[RunRecord], float | None]) -> float | None:
    found = [v for record in records if (v := value(record)) is not None]
    return sum(found) / len(found) if found else None


def _cost(train: float | None, evaluation: float | None, price: float | None) -> float | None:
    if price is None or train is None:
        return None
    return (train + (evaluation or 0.0)) / 3600 * price
