"""The per-example answers of a table's runs, read and checked against what the records say.

Called by the comparison; imports the metrics. Only answers that give the recorded score again are
used: a file of another run, or a metric that cannot be recomputed, must not decide a test.
"""

import math

import numpy as np

from peftkit.errors import RunError
from peftkit.reporting.arms import ArmTable
from peftkit.reporting.gathering import Problem, Run
from peftkit.reporting.predictions import read_predictions
from peftkit.reporting.resampling import recomputed
from peftkit.reporting.scores import Columns

TOLERANCE = 1e-4
"""Scores are ratios of counts; a loss is summed in float32."""

MAX_SCORE = 1e100
"""The variance of larger ones is no number."""

Answers = dict[int, Columns]
"""`id(run)` → its columns, each (N,)."""


def recorded_score(run: Run, metric: str) -> float | None:
    """The validation score that the record holds; None: none, or not finite, or beyond use."""
    scores = run.record.metrics.get("validation", {}) if run.record else {}
    score = scores.get(metric, math.nan)
    return score if abs(score) < MAX_SCORE else None


def answers_of(table: ArmTable, problems: list[Problem]) -> Answers:
    """Columns of every completed run whose file can be read and agrees; a line for each other."""
    agreeing: list[tuple[Run, Columns]] = []
    for run in (run for arm in table.arms for run in arm.completed):
        columns = _read(run, problems)
        if columns is None:
            continue
        if reason := _disagreement(run, table.metric, columns):
            problems.append(_left_out(run, reason))
        else:
            agreeing.append((run, columns))
    if not agreeing:
        return {}
    usual = _usual([columns for _, columns in agreeing])
    problems += [
        _left_out(run, "its labels are not those of the other runs on this data")
        for run, columns in agreeing
        if not _same_examples(columns, usual)
    ]
    return {id(run): columns for run, columns in agreeing if _same_examples(columns, usual)}


def example_count(columns: Columns) -> int:
    """Rows of one run's columns."""
    return len(next(iter(columns.values())))


def _read(run: Run, problems: list[Problem]) -> Columns | None:
    assert run.record
    if run.record.predictions is None:
        problems.append(_left_out(run, "has no predictions"))
        return None
    try:
        return read_predictions(run.folder / run.record.predictions)
    except RunError as error:
        where, _, text = error.problems[0].partition(": ")
        problems.append(Problem(where, f"{text}; its run is in no test, its score is shown"))
        return None


def _left_out(run: Run, reason: str) -> Problem:
    return Problem(str(run.folder), f"{reason}; it is in no test", is_unreadable=False)


def _usual(found: list[Columns]) -> Columns:
    """Columns on the examples that most runs have; of as many, those that come first."""
    kinds: list[Columns] = []
    counts: list[int] = []
    for columns in found:
        alike = (place for place, kind in enumerate(kinds) if _same_examples(columns, kind))
        place = next(alike, len(kinds))
        if place == len(kinds):
            kinds.append(columns)
            counts.append(0)
        counts[place] += 1
    return kinds[counts.index(max(counts))]


def _disagreement(run: Run, metric: str, columns: Columns) -> str | None:
    """Why these answers are not those that were scored; None: they are."""
    recorded = recorded_score(run, metric)
    if recorded is None:
        return f"its {metric} on validation is missing or not finite"
    found = recomputed(metric, columns)
    if found is None:
        return f"{metric} cannot be recomputed from its predictions"
    if not abs(found - recorded) <= TOLERANCE * max(1.0, abs(recorded)):
        return f"its predictions give {metric} {found:.4f}, its record says {recorded:.4f}"
    return None


def _same_examples(columns: Columns, first: Columns) -> bool:
    if "label" in columns and "label" in first:
        return bool(np.array_equal(columns["label"], first["label"]))
    return example_count(columns) == example_count(first)
