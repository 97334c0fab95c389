"""The comparison of many runs: rows, tests, conditions and what they come to, without torch.

`compare` reads, `write_comparison` writes `comparison.{json,csv,md,html}`. Called by the command
line's `report` and `compare`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.reporting.answers import Answers, answers_of, recorded_score
from peftkit.reporting.arms import Arm, ArmTable, section, tables_of
from peftkit.reporting.conditions import Difference, differences
from peftkit.reporting.figures import Figures, figures_of, shared_machine
from peftkit.reporting.gathering import Problem, gather
from peftkit.reporting.groups import MAX_ARMS, letters
from peftkit.reporting.pairs import Pairs
from peftkit.reporting.results import Row, Table
from peftkit.reporting.scores import LOWER_IS_BETTER
from peftkit.reporting.statistics import seed_interval
from peftkit.reporting.testing import Tested, tested


@dataclass(frozen=True)
class Comparison:
    """All tables, and one line for each thing that could not be read or was left out."""

    tables: tuple[Table, ...]
    problems: tuple[Problem, ...]
    price_per_hour: float | None

    @property
    def is_complete(self) -> bool:
        """Whether everything below the folders could be read."""
        return not any(problem.is_unreadable for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON types; what is not known is null."""
        from peftkit.reporting.documents import as_json

        return as_json(self)


def compare(folders: Sequence[Path], *, price_per_hour: float | None = None) -> Comparison:
    """Read every run at or below `folders` and compare what was scored on the same data.

    What cannot be read is a line in `problems`; nothing is raised for it. `price_per_hour` is that
    of the machine, in any currency.
    """
    gathered = gather(folders)
    problems = gathered.problems
    shared = shared_machine([run.record for run in gathered.runs if run.record])
    tables = [
        _table(table, answers_of(table, problems), shared, price_per_hour)
        for table in tables_of(gathered.runs, problems)
    ]
    ordered = sorted(tables, key=lambda table: (table.digest is None, table.title, table.metric))
    return Comparison(tuple(ordered), tuple(problems), price_per_hour)


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write `comparison.{json,csv,md,html}` into the folder `out`; returns their paths.

    Raises:
        RunError: a file cannot be written.
    """
    from peftkit.reporting.documents import write_documents

    return write_documents(comparison, out)


def _table(
    table: ArmTable, answers: Answers, shared: set[int], price_per_hour: float | None
) -> Table:
    found = tested(table, answers)
    conditions = differences(table.arms, shared)
    rows = _rows(table, found, conditions, lambda arm: figures_of(arm, price_per_hour, shared))
    records = [run.record for arm in table.arms for run in arm.runs if run.record]
    return Table(
        title=_title(table),
        metric=table.metric,
        higher_is_better=table.metric not in LOWER_IS_BETTER,
        digest=table.digest,
        examples=found.examples,
        is_sample=any(record.stand_in for record in records),
        rows=tuple(rows),
        pairs=found.pairs,
        conditions=tuple(conditions),
    )


def _rows(
    table: ArmTable,
    found: Tested,
    conditions: list[Difference],
    figures: Callable[[Arm], Figures],
) -> list[Row]:
    scores = {arm.label: _scores(arm, table.metric) for arm in table.arms}
    sign = 1 if table.metric in LOWER_IS_BETTER else -1
    ordered = sorted(
        table.arms,
        key=lambda arm: (not scores[arm.label], sign * _mean(scores[arm.label]), arm.label),
    )
    judged = [arm.label for arm in ordered if arm.label in found.intervals]
    marks, best_group = _letters(found.pairs, judged), _best_group(found.pairs, judged, sign)
    return [
        Row(
            arm=arm,
            figures=figures(arm),
            score=_mean(own) if (own := scores[arm.label]) else None,
            scores=own,
            tested_seeds=found.seeds.get(arm.label, ()),
            seed_interval=seed_interval(np.array(list(own.values()))),
            interval=found.intervals.get(arm.label),
            letters=marks.get(arm.label, ""),
            in_best_group=arm.label in best_group,
            notes=tuple(c.letter for c in conditions if arm.label in c.marked),
        )
        for arm in ordered
    ]


def _letters(pairs: Pairs, judged: list[str]) -> dict[str, str]:
    if len(judged) > MAX_ARMS:
        return {}
    place = {label: number for number, label in enumerate(pairs.labels)}
    marks = letters([place[label] for label in judged], pairs.separated())
    return {label: marks[number] for label, number in place.items()}


def _best_group(pairs: Pairs, judged: list[str], sign: int) -> set[str]:
    """The arm with the best score, and all that no test puts behind it; `sign` is -1 where more is
    better.
    """
    if not judged:
        return set()
    of_best = [p for p in pairs.of(judged[0]) if p.is_separated]
    behind = {p.b if p.a == judged[0] else p.a for p in of_best if sign * p.lead(judged[0]) < 0}
    return {label for label in judged if label not in behind}


def _scores(arm: Arm, metric: str) -> dict[int, float]:
    found = {run.seed: recorded_score(run, metric) for run in arm.completed}
    return {seed: score for seed, score in found.items() if score is not None}


def _mean(scores: dict[int, float]) -> float:
    return sum(scores.values()) / len(scores) if scores else math.nan


def _title(table: ArmTable) -> str:
    """The data set in the words of the recipes."""
    for arm in table.arms:
        task = section(arm.recipe, "task")
        if task.get("dataset"):
            parts = [task["dataset"], task.get("dataset_config"), task.get("validation_split")]
            return " ".join(str(part) for part in parts if part)
    return "data unknown" if table.digest is None else f"data {table.digest[7:15]}"
