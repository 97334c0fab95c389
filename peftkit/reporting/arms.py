"""Runs put into arms, which differ in more than the seed, and arms into tables of one split.

Called by the comparison; imports what was gathered.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftkit.reporting.gathering import Problem, Run

NOT_PART_OF_AN_ARM = ("seed", "output_dir")
MAX_KEYS_IN_LABEL = 3

TableKey = tuple[str | None, str]
"""Digest of the validation data, None where no run reached it, and the leading metric."""


@dataclass(frozen=True)
class Arm:
    """Runs of one resolved recipe, at most one a seed; a row of the table."""

    label: str
    """Its name, and where another arm has the same name, what else differs."""
    name: str
    recipe: dict[str, Any] | None
    runs: tuple[Run, ...]
    """By seed."""
    superseded: tuple[Run, ...] = ()
    """Other runs of a seed that is there: older ones, and those that did not complete."""

    @property
    def completed(self) -> list[Run]:
        """Runs whose scores count."""
        return [run for run in self.runs if run.is_completed]


@dataclass(frozen=True)
class ArmTable:
    """Arms that were scored on the same examples by the same leading metric."""

    digest: str | None
    metric: str
    arms: tuple[Arm, ...]


def tables_of(runs: Sequence[Run], problems: list[Problem]) -> list[ArmTable]:
    """Every run in exactly one table, or named in `problems` as replaced by a newer one.

    A run that failed before it reached the data goes where the others of its arm are, else where
    the same task is, else where its name is, else into a table of its own.
    """
    placed: dict[TableKey, list[Run]] = defaultdict(list)
    lost = []
    for run in runs:
        key = _own_key(run)
        if key[0] is None:
            lost.append(run)
        else:
            placed[key].append(run)
    homes = _Homes(placed if lost else {})
    for run in lost:
        placed[homes.of(run)].append(run)
    return [
        ArmTable(digest, metric, _arms(members, problems))
        for (digest, metric), members in placed.items()
    ]


def section(recipe: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """One section of a resolved recipe; empty if a record holds something else in its place."""
    found = (recipe or {}).get(name)
    return found if isinstance(found, dict) else {}


def leading_metric(run: Run) -> str:
    """The first metric of its recipe's task, or what its record has first, or the loss."""
    named = section(run.recipe, "task").get("metrics")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    scores = run.record.metrics.get("validation", {}) if run.record else {}
    return next((name for name in scores if name != "loss"), "loss")


def flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Dotted key → value."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{inner}": v for inner, v in flat(value).items()}
        else:
            found[key] = value
    return found


class _Homes:
    """Where runs of an arm, a task or a name already are."""

    def __init__(self, placed: dict[TableKey, list[Run]]) -> None:
        self.homes: dict[str, TableKey] = {}
        for key, runs in placed.items():
            for name in (name for run in runs for name in _addresses(run)):
                self.homes.setdefault(name, key)

    def of(self, run: Run) -> TableKey:
        found = [self.homes[name] for name in _addresses(run) if name in self.homes]
        if found:
            return found[0]
        tables = set(self.homes.values())
        alone = run.recipe is None and len(tables) == 1
        return next(iter(tables)) if alone else _own_key(run)


def _addresses(run: Run) -> list[str]:
    if run.recipe is None:
        return [f"name {run.name}"]
    task = _canonical(run.recipe.get("task"))
    return [f"arm {_identity(run)}", f"task {task}", f"name {run.name}"]


def _own_key(run: Run) -> TableKey:
    digest = run.record.digests.data_validation if run.record else None
    return digest, leading_metric(run)


def _identity(run: Run) -> str:
    recipe = run.recipe or {}
    return _canonical([run.name, {k: recipe[k] for k in recipe if k not in NOT_PART_OF_AN_ARM}])


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _arms(runs: Sequence[Run], problems: list[Problem]) -> tuple[Arm, ...]:
    grouped: dict[str, list[Run]] = defaultdict(list)
    names: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        if run.recipe is not None:
            identity = _identity(run)
            grouped[identity].append(run)
            names[run.name].add(identity)
    for run in runs:
        if run.recipe is None:  # joins the one arm of its name
            same = names[run.name]
            grouped[next(iter(same)) if len(same) == 1 else _identity(run)].append(run)
    return _labelled([_arm(members, problems) for members in grouped.values()])


def _arm(runs: list[Run], problems: list[Problem]) -> Arm:
    kept: dict[int, Run] = {}
    superseded = []
    # What a later attempt did not reach takes nothing from a run that was completed.
    for run in sorted(runs, key=lambda run: (run.is_completed, _finished(run))):
        if run.seed in kept:
            superseded.append(kept[run.seed])
        kept[run.seed] = run
    problems += [
        Problem(str(run.folder), _replaced(run, kept[run.seed]), is_unreadable=False)
        for run in superseded
    ]
    recipe = next((run.recipe for run in runs if run.recipe is not None), None)
    ordered = tuple(kept[seed] for seed in sorted(kept))
    return Arm(runs[0].name, runs[0].name, recipe, ordered, tuple(superseded))


def _replaced(run: Run, by: Run) -> str:
    """Why a run of a seed does not count."""
    again = f"seed {run.seed} of {run.name} was run again"
    if by.is_completed and not run.is_completed and _finished(run) > _finished(by):
        status = run.status.replace("_", " ")
        return f"{again} and ended {status}; the completed run {by.folder} counts"
    return f"{again}; {by.folder} is newer"


def _finished(run: Run) -> datetime:
    """When a run ended; one without a record by the time of its last file."""
    if run.record:
        return run.record.finished
    return datetime.fromtimestamp(_modified(run.folder), UTC)


def _modified(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)


def _labelled(arms: list[Arm]) -> tuple[Arm, ...]:
    twins: dict[str, list[dict[str, Any]]] = defaultdict(list)
    names = Counter(arm.name for arm in arms)
    for arm in (arm for arm in arms if names[arm.name] > 1):
        twins[arm.name].append(flat(arm.recipe or {}))
    labelled = []
    for arm in arms:
        own = f"{arm.name} ({_apart(flat(arm.recipe or {}), twins[arm.name])})"
        labelled.append(replace(arm, label=own) if names[arm.name] > 1 else arm)
    return _numbered(labelled)


def _numbered(arms: list[Arm]) -> tuple[Arm, ...]:
    """Labels that are still the same get a number: rows are known by them."""
    seen: Counter[str] = Counter()
    found = []
    for arm in arms:
        seen[arm.label] += 1
        again = seen[arm.label]
        found.append(replace(arm, label=f"{arm.label} #{again}") if again > 1 else arm)
    return tuple(found)


def _apart(own: dict[str, Any], twins: Sequence[dict[str, Any]]) -> str:
    """The keys in which arms of one name differ, with the values of this one."""
    keys = sorted({key for twin in twins for key in twin if key not in NOT_PART_OF_AN_ARM})
    differing = [key for key in keys if len({_canonical(twin.get(key)) for twin in twins}) > 1]
    shown = [
        f"{key.rpartition('.')[2]}={_canonical(own.get(key))}"
        for key in differing[:MAX_KEYS_IN_LABEL]
    ]
    more = len(differing) - MAX_KEYS_IN_LABEL
    return ", ".join([*shown, f"{more} more keys"] if more > 0 else shown) or "no recipe"
