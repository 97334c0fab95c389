"""Every arm of a table tested against every other, on the answers of their runs.

Called by the comparison; imports the resampling and the statistics.
"""

from dataclasses import dataclass

import numpy as np

from peftkit.reporting.answers import Answers, example_count, recorded_score
from peftkit.reporting.arms import Arm, ArmTable
from peftkit.reporting.resampling import spread
from peftkit.reporting.results import McNemar, Pair
from peftkit.reporting.scores import Columns, correct
from peftkit.reporting.statistics import (
    Interval,
    Sample,
    Tests,
    arm_intervals,
    components,
    mcnemar,
    pair_tests,
)


@dataclass(frozen=True)
class Tested:
    """Arms that stand in a test, and what came out; `arms` in the order of the arrays."""

    arms: list[Arm]
    intervals: list[Interval]
    tests: Tests | None
    mcnemar: dict[tuple[int, int], tuple[McNemar, ...]]
    examples: int


def tested(table: ArmTable, answers: Answers) -> Tested:
    """Test every pair of arms of which at least one run has usable answers."""
    arms = [arm for arm in table.arms if any(id(run) in answers for run in arm.completed)]
    runs = [(number, run) for number, arm in enumerate(arms) for run in arm.completed]
    runs = [(number, run) for number, run in runs if id(run) in answers]
    columns = [answers[id(run)] for _, run in runs]
    covariance = spread(table.metric, columns) if columns else None
    if covariance is None:
        return Tested([], [], None, {}, 0)
    examples = example_count(columns[0])
    scores = np.array([recorded_score(run, table.metric) for _, run in runs], dtype=float)
    parts = components(Sample(scores, covariance, np.array([n for n, _ in runs]), examples))
    tests = pair_tests(parts, examples) if len(arms) > 1 else None
    seeds = [(number, run.seed) for number, run in runs]
    per_run = _mcnemars(seeds, columns) if tests and table.metric == "accuracy" else {}
    return Tested(arms, arm_intervals(parts, examples), tests, per_run, examples)


def _mcnemars(
    runs: list[tuple[int, int]], columns: list[Columns]
) -> dict[tuple[int, int], tuple[McNemar, ...]]:
    """Pair of arms → a test for each seed that both have; `runs` are (arm, seed)."""
    only, p = mcnemar(np.stack([correct(c) for c in columns]))
    found: dict[tuple[int, int], tuple[McNemar, ...]] = {}
    by_seed: dict[int, list[int]] = {}
    for number, (_, seed) in enumerate(runs):
        by_seed.setdefault(seed, []).append(number)
    for seed, numbers in sorted(by_seed.items()):
        for place, i in enumerate(numbers):
            for j in numbers[place + 1 :]:
                test = McNemar(seed, int(only[i, j]), int(only[j, i]), float(p[i, j]))
                arms = (runs[i][0], runs[j][0])
                found[arms] = (*found.get(arms, ()), test)
    return found


def pairs_of(found: Tested) -> tuple[Pair, ...]:
    """The tests by label, in the order of the arms."""
    tests = found.tests
    if tests is None:
        return ()
    names = [arm.label for arm in found.arms]
    fields = (tests.a, tests.b, tests.difference, tests.low, tests.high, tests.standard_error)
    rest = (tests.degrees_of_freedom, tests.p, tests.p_adjusted, tests.detectable)
    lists = [array.tolist() for array in (*fields, *rest, tests.covers_seeds)]
    return tuple(
        Pair(
            names[a],
            names[b],
            difference,
            Interval(low, high),
            *numbers,
            mcnemar=found.mcnemar.get((a, b), ()),
        )
        for a, b, difference, low, high, *numbers in zip(*lists, strict=True)
    )
