"""Every arm of a table tested against every other, on the answers of their runs.

Called by the comparison; imports the resampling and the statistics.
"""

from dataclasses import dataclass

import numpy as np

from peftkit.reporting.answers import Answers, example_count, recorded_score
from peftkit.reporting.arms import ArmTable
from peftkit.reporting.pairs import McNemars, Pairs
from peftkit.reporting.resampling import spread
from peftkit.reporting.scores import correct
from peftkit.reporting.statistics import (
    Interval,
    Sample,
    arm_intervals,
    components,
    only_right,
    pair_tests,
)


@dataclass(frozen=True)
class Tested:
    """What came out of the tests of one table."""

    intervals: dict[str, Interval]
    """Label → interval, of the arms that stand in a test."""
    seeds: dict[str, tuple[int, ...]]
    """Label → its tested seeds, of the same arms."""
    pairs: Pairs
    examples: int


def tested(table: ArmTable, answers: Answers) -> Tested:
    """Test every pair of arms of which at least one run has usable answers."""
    arms = [arm for arm in table.arms if any(id(run) in answers for run in arm.completed)]
    runs = [(number, run) for number, arm in enumerate(arms) for run in arm.completed]
    runs = [(number, run) for number, run in runs if id(run) in answers]
    columns = [answers[id(run)] for _, run in runs]
    covariance = spread(table.metric, columns) if columns else None
    if covariance is None:
        return Tested({}, {}, Pairs([], None, None), 0)
    examples = example_count(columns[0])
    scores = np.array([recorded_score(run, table.metric) for _, run in runs], dtype=float)
    parts = components(Sample(scores, covariance, np.array([n for n, _ in runs])))
    places: list[dict[int, int]] = [{} for _ in arms]
    for place, (number, run) in enumerate(runs):
        places[number][run.seed] = place
    each = None
    if table.metric == "accuracy":
        each = McNemars(places, only_right(np.stack([correct(c) for c in columns])))
    tests = pair_tests(parts, examples) if len(arms) > 1 else None
    labels = [arm.label for arm in arms]
    intervals = dict(zip(labels, arm_intervals(parts, examples), strict=True))
    seeds = {label: tuple(own) for label, own in zip(labels, places, strict=True)}
    return Tested(intervals, seeds, Pairs(labels, tests, each), examples)
