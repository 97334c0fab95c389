"""What differs between the runs of a table besides what is compared: the fairness notes.

Called by the comparison; imports the arms. The method's section and the learning rate are meant to
differ. Every other key of the recipe, and everything around the run, is a condition.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, Final

from peftkit.reporting.arms import Arm, flat, section
from peftkit.reporting.figure_text import listed
from peftkit.reporting.gathering import Run
from peftkit.reporting.record import RunRecord

MEANT_TO_DIFFER: Final = ("method.", "training.learning_rate", "name", "seed", "output_dir")
"""Keys of the recipe that begin so are what is compared; so does `learning_rates_tried`, whose
count is a condition of its own."""

NO_CONDITIONS: Final = ("training.report_to", "training.auto_batch_size")
"""They change no result: of the batch, what was really used is shown."""

SIZES: Final = ("per_device_train_batch_size", "gradient_accumulation_steps")

WORDS: Final = {
    "training.num_train_epochs": "epochs",
    "training.max_steps": "maximum of optimizer steps",
    "training.per_device_train_batch_size": "examples in a forward pass of training",
    "training.per_device_eval_batch_size": "examples in a forward pass of evaluation",
    "training.gradient_accumulation_steps": "accumulation steps",
    "training.gradient_checkpointing": "activation checkpointing",
    "training.mixed_precision": "precision asked for",
    "training.eval_steps": "steps between evaluations",
    "training.metric_for_best_model": "metric that picks the checkpoint",
    "training.lr_scheduler_type": "learning rate schedule",
    "training.warmup_steps": "warm-up",
    "training.optimizer": "optimizer",
    "training.weight_decay": "weight decay",
    "task.holdout_fraction": "share of train that is held out",
    "task.max_train_examples": "maximum of training examples",
    "task.max_length": "maximum length in tokens",
    "task.metrics": "metrics",
    "base.name": "base model",
}
DIGEST_DIGITS: Final = 8
SHARED_MACHINE: Final = "another run at the same time"
"""Said even if it holds for all runs alike: their seconds are then those of no run on its own."""

Values = dict[str, dict[str, list[int]]]
"""Label → value in words → seeds of its runs with it."""


@dataclass(frozen=True)
class Difference:
    """One condition that is not the same for all runs."""

    letter: str
    condition: str
    values: dict[str, list[str]]
    """Value in words → labels of the arms with it, the most common value first. Where the runs of
    an arm have several, its value names them all, with their seeds."""
    marked: list[str]
    """Labels of the arms that do not have the most common value, or more than one; all, if none is
    most common. Of a machine that was shared, those that shared it."""


def differences(arms: Sequence[Arm], shared_machine: set[int]) -> list[Difference]:
    """Conditions that differ between `arms`, or between the seeds of one of them.

    `shared_machine` holds `id(run.record)` of runs beside which another ran on the same machine.
    """
    found = [
        (condition, values)
        for condition, values in _conditions(arms, shared_machine)
        if _is_worth_a_line(condition, values)
    ]
    return [
        _difference(footnote(number), condition, values)
        for number, (condition, values) in enumerate(found)
    ]


def footnote(number: int) -> str:
    """A … z, aa … zz."""
    rounds, place = divmod(number, 26)
    return (ascii_lowercase[rounds - 1] if rounds else "") + ascii_lowercase[place]


def effective_batch(run: Run) -> int | None:
    """Examples in one optimizer step, over all accumulation steps and processes."""
    training = section(run.recipe, "training")
    sizes: list[Any] = [training.get(key) for key in SIZES]
    if run.record is None or not all(isinstance(size, int) for size in sizes):
        return None
    return int(sizes[0] * sizes[1] * run.record.processes)


def is_sample(record: RunRecord) -> bool | None:
    """Whether any input was a stand-in; None: it ended before its data was read."""
    return record.stand_in or (None if record.origins.data is None else False)


def _is_worth_a_line(condition: str, values: Values) -> bool:
    distinct = {value for own in values.values() for value in own}
    return len(distinct) > 1 or (condition == SHARED_MACHINE and "yes" in distinct)


def _difference(letter: str, condition: str, values: Values) -> Difference:
    by_value: dict[str, list[str]] = defaultdict(list)
    for label, own in values.items():
        by_value[_by_seed(own)].append(label)
    ranked = sorted(by_value, key=lambda value: -len(by_value[value]))
    sizes = [len(by_value[value]) for value in ranked]
    common = set(by_value[ranked[0]]) if sizes[1:] and sizes[0] > sizes[1] else set()
    marked = [label for label, own in values.items() if label not in common or len(own) > 1]
    if condition == SHARED_MACHINE:
        marked = [label for label, own in values.items() if "yes" in own]
    return Difference(letter, condition, {value: by_value[value] for value in ranked}, marked)


def _by_seed(own: dict[str, list[int]]) -> str:
    """`bf16`, or `bf16 (seed 0), no (seeds 1 and 2)`."""
    if len(own) == 1:
        return next(iter(own))
    return ", ".join(
        f"{value} ({'seed' if len(seeds) == 1 else 'seeds'} {listed([str(s) for s in seeds])})"
        for value, seeds in own.items()
    )


def _conditions(arms: Sequence[Arm], shared_machine: set[int]) -> Iterator[tuple[str, Values]]:
    """Arms that cannot tell are left out."""
    yield "seeds", {arm.label: {", ".join(str(run.seed) for run in arm.runs): []} for arm in arms}
    yield "training data", _training_data(arms)
    for condition, value in _of_a_run(shared_machine).items():
        yield condition, _by_label(arms, value, knows=_has(value))
    recorded = [run.record for arm in arms for run in arm.runs if run.record]
    for library in sorted({name for record in recorded for name in record.libraries}):
        yield f"version of {library}", _by_label(arms, _version(library), knows=_has_record)
    for size in SIZES:
        words = WORDS[f"training.{size}"]
        yield words, _by_label(arms, _used(size), knows=_has_recipe)
    for key in _recipe_keys(arms):
        yield WORDS.get(key, key), _by_label(arms, _key(key), knows=_has_recipe)


def _by_label(
    arms: Sequence[Arm], value: Callable[[Run], Any], *, knows: Callable[[Run], bool]
) -> Values:
    """The distinct values of an arm's runs; runs that do not know theirs are left out."""
    found: Values = {}
    for arm in arms:
        for run in filter(knows, arm.runs):
            own = found.setdefault(arm.label, {})
            own.setdefault(_worded(value(run)), []).append(run.seed)
    return found


def _has(value: Callable[[Run], Any]) -> Callable[[Run], bool]:
    return lambda run: value(run) is not None


def _has_record(run: Run) -> bool:
    return run.record is not None


def _has_recipe(run: Run) -> bool:
    return run.recipe is not None


def _of_a_run(shared_machine: set[int]) -> dict[str, Callable[[Run], Any]]:
    """None: the run did not get as far, or left no record."""

    def of(read: Callable[[RunRecord], Any]) -> Callable[[Run], Any]:
        return lambda run: read(run.record) if run.record else None

    return {
        "sample data": of(is_sample),
        "effective batch": effective_batch,
        "precision": of(lambda record: record.mixed_precision),
        "number of learning rates tried": of(lambda record: len(record.learning_rates_tried)),
        "base weights": of(lambda record: _short(record.digests.base)),
        "device": of(lambda record: record.device),
        "processes": of(lambda record: record.processes),
        "distribution": of(lambda record: record.distributed_type),
        "resumed": of(lambda record: record.resumed_after_step is not None),
        "begun with weights of a training before": of(
            lambda record: record.weights_from_step is not None
        ),
        SHARED_MACHINE: of(lambda record: id(record) in shared_machine),
        "commit": of(_commit),
    }


def _version(library: str) -> Callable[[Run], Any]:
    return lambda run: run.record.libraries.get(library, "absent") if run.record else None


def _key(key: str) -> Callable[[Run], Any]:
    def value(run: Run) -> Any:
        found: Any = run.recipe
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    return value


def _used(size: str) -> Callable[[Run], Any]:
    """One of `SIZES` as the run used it, or as its recipe asks if it left no word of that."""

    def value(run: Run) -> Any:
        used = run.record.train_batch if run.record else None
        return getattr(used, size) if used else _key(f"training.{size}")(run)

    return value


def _recipe_keys(arms: Sequence[Arm]) -> list[str]:
    """Keys of any arm that are not meant to differ and that not all arms hold alike."""
    recipes = [flat(arm.recipe) for arm in arms if arm.recipe is not None]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    others = (*MEANT_TO_DIFFER, *NO_CONDITIONS, *(f"training.{size}" for size in SIZES))
    kept = [key for key in keys if not key.startswith(others)]
    return [key for key in kept if len({repr(recipe.get(key)) for recipe in recipes}) > 1]


def _training_data(arms: Sequence[Arm]) -> Values:
    """Seed by seed, where a seed had several: what is held out of train hangs on the seed."""
    digests: dict[int, set[str]] = defaultdict(set)
    own: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for arm in arms:
        for run in arm.runs:
            digest = run.record.digests.data_train if run.record else None
            if digest is not None:
                digests[run.seed].add(digest)
                own[arm.label].append((run.seed, digest))
    contested = {seed for seed, found in digests.items() if len(found) > 1}
    told = {
        label: [f"{_short(digest)} for seed {s}" for s, digest in found if s in contested]
        for label, found in own.items()
    }
    return {label: {", ".join(parts): []} for label, parts in told.items() if parts}


def _commit(record: RunRecord) -> str:
    if record.git_commit is None:
        return "unknown"
    changed = " with changes" if record.git_dirty else ""
    return record.git_commit[:DIGEST_DIGITS] + changed


def _short(digest: str | None) -> str | None:
    return digest and digest.removeprefix("sha256:")[:DIGEST_DIGITS]


def _worded(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_worded(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
