"""Tests that do not see what is not there, and see what is; the planted faults that they catch."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests

from peftkit.reporting.resampling import spread
from peftkit.reporting.statistics import (
    LEVEL,
    Sample,
    arm_intervals,
    components,
    holm,
    mcnemar,
    only_right,
    pair_tests,
    seed_interval,
)

EXAMPLES = 872
SEEDS = 3
MIXED = 0.3
"""Spread of a seed's effect, in logits: with it seeds and examples matter about alike."""


def answers_right(rng, arms, *, seeds=SEEDS, ease=13, seed_spread=MIXED, ahead=0.0):
    """Which examples each run answers rightly, (arms x seeds, EXAMPLES), at `ease` 13 about 92% of
    them, at 2 about 57%.

    Examples differ in difficulty, which all runs share; arms and runs differ on single examples,
    and each run has an effect of its own. Arms are equal, but for the first, which is `ahead`.
    """
    difficulty = rng.normal(ease, 9, EXAMPLES)
    own = rng.normal(0, 1.5, (arms, 1, EXAMPLES))
    of_seeds = rng.normal(0, seed_spread, (arms, seeds, 1))
    logits = difficulty + own + of_seeds + rng.normal(0, 1.0, (arms, seeds, EXAMPLES))
    logits[0] += ahead
    right = rng.random(logits.shape) < 1 / (1 + np.exp(-logits.clip(-50, 50)))
    return right.reshape(arms * seeds, EXAMPLES)


def sample_of(right, covariance, seeds):
    runs = len(right)
    return Sample(right.mean(axis=1), covariance, np.arange(runs) // seeds)


def simulated(count, arms, **settings):
    """Samples of independent comparisons; the covariances of all come from one bootstrap."""
    rng = np.random.default_rng(7)
    worlds = [answers_right(rng, arms, **settings) for _ in range(count)]
    size = max(1, 600 // len(worlds[0]))
    for start in range(0, count, size):
        block = worlds[start : start + size]
        columns = [{"label": np.ones(EXAMPLES), "prediction": run} for w in block for run in w]
        whole = spread("accuracy", columns)
        for place, right in enumerate(block):
            runs = slice(place * len(right), (place + 1) * len(right))
            yield sample_of(right, whole[runs, runs], len(right) // arms)


def adjusted(sample):
    return pair_tests(components(sample), EXAMPLES).p_adjusted


def false_alarms(count, arms, judge=adjusted, **settings):
    """Share of comparisons of equal arms in which any pair is told apart."""
    samples = simulated(count, arms, **settings)
    return np.mean([(judge(sample) < LEVEL).any() for sample in samples])


def allowed(count):
    """The level and three standard errors of a count at it."""
    return LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / count)


def without_seeds(sample):
    """Planted fault: the runs of an arm as if they were all the seeds there are."""
    parts = components(sample)
    lone = replace(parts, counts=np.ones_like(parts.counts))
    return pair_tests(lone, EXAMPLES).p_adjusted


def resampling_seeds(sample):
    """Planted fault: the plain nested bootstrap, percentiles over resampled seeds and examples."""
    rng = np.random.default_rng(0)
    a, b = sample.scores.reshape(2, SEEDS)
    noise = rng.multivariate_normal(np.zeros(2 * SEEDS), sample.spread, 2000)
    drawn = rng.integers(SEEDS, size=(2, 2000, SEEDS))
    means = [
        np.take(side, d).mean(1) + np.take_along_axis(n, d, 1).mean(1)
        for side, d, n in zip((a, b), drawn, (noise[:, :SEEDS], noise[:, SEEDS:]), strict=True)
    ]
    below = np.mean(means[0] < means[1])
    return np.array([2 * min(below, 1 - below)])


def without_pairing(sample):
    """Planted fault: as if each arm had examples of its own."""
    blocks = np.equal.outer(sample.arm, sample.arm)
    return adjusted(replace(sample, spread=sample.spread * blocks))


@pytest.mark.parametrize("seed_spread", [0.0, MIXED, 0.8])
def test_two_equal_methods_are_rarely_told_apart(seed_spread):
    assert false_alarms(200, 2, seed_spread=seed_spread) <= allowed(200)


HARDER = {"seeds": 5, "ease": 2}
"""Another setting: five seeds, and more than half of the examples in doubt."""


@pytest.mark.parametrize("seed_spread", [0.0, 0.8])
def test_two_equal_methods_are_rarely_told_apart_at_another_accuracy_and_five_seeds(seed_spread):
    assert false_alarms(200, 2, seed_spread=seed_spread, **HARDER) <= allowed(200)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{}, HARDER], ids=["three_seeds_92", "five_seeds_57"])
@pytest.mark.parametrize("seed_spread", [0.0, MIXED, 0.8])
@pytest.mark.parametrize("arms", [2, 4])
def test_equal_methods_are_rarely_told_apart_in_a_thousand_comparisons(arms, seed_spread, setting):
    assert false_alarms(1000, arms, seed_spread=seed_spread, **setting) <= allowed(1000)


@pytest.mark.parametrize("fault", [without_seeds, resampling_seeds])
def test_a_test_that_neglects_the_few_seeds_raises_false_alarms(fault):
    assert false_alarms(200, 2, fault, seed_spread=0.8) > allowed(200)


def test_a_difference_of_four_points_is_found():
    found = [adjusted(s)[0] < LEVEL for s in simulated(200, 2, ahead=2.9)]
    ahead = [s.scores[:3].mean() - s.scores[3:].mean() for s in simulated(20, 2, ahead=2.9)]
    assert np.mean(ahead) == pytest.approx(0.04, abs=0.006)
    assert np.mean(found) >= 0.95


def test_without_pairing_real_differences_are_missed():
    settings = {"seed_spread": 0.1, "ahead": 1.0}
    paired, unpaired = (
        np.mean([judge(s)[0] < LEVEL for s in simulated(200, 2, **settings)])
        for judge in (adjusted, without_pairing)
    )
    assert paired > unpaired + 0.3


def test_the_detectable_difference_is_found_four_times_in_five():
    """The planted difference is the one that the design states, within what 200 trials can tell."""
    stated = np.median(
        [pair_tests(components(s), EXAMPLES).detectable[0] for s in simulated(100, 2, ahead=1.0)]
    )
    for ahead in np.arange(0.8, 3, 0.2):
        samples = list(simulated(200, 2, ahead=ahead))
        planted = np.mean([s.scores[:3].mean() - s.scores[3:].mean() for s in samples])
        if planted >= stated:
            break
    found = np.mean([adjusted(s)[0] < LEVEL for s in samples])
    assert 0.7 <= found <= 0.95


def test_the_interval_of_a_mean_covers_it():
    """Arms have one expectation; its estimate over all simulations stands for it."""
    samples = list(simulated(200, 1))
    truth = np.mean([s.scores.mean() for s in samples])
    intervals = [arm_intervals(components(s), EXAMPLES)[0] for s in samples]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert covered >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 200)


def test_the_seed_interval_is_the_t_interval():
    scores = np.array([0.88, 0.90, 0.91])
    theirs = stats.t.interval(0.95, 2, scores.mean(), stats.sem(scores))
    assert seed_interval(scores) == pytest.approx(theirs)
    assert seed_interval(scores[:1]) is None


def test_one_seed_gives_a_test_of_the_examples_only():
    right = answers_right(np.random.default_rng(3), 2)[[0, 3]]
    columns = [{"label": np.ones(EXAMPLES), "prediction": run} for run in right]
    sample = Sample(right.mean(axis=1), spread("accuracy", columns), np.array([0, 1]))
    tests = pair_tests(components(sample), EXAMPLES)
    assert tests.covers_seeds.tolist() == [False]
    difference = right[0].astype(float) - right[1]
    error = difference.std() / np.sqrt(EXAMPLES)
    assert tests.standard_error[0] == pytest.approx(error, rel=0.05)


def test_equal_answers_have_no_difference_and_p_one():
    sample = Sample(np.full(6, 0.9), np.full((6, 6), 1e-4), np.repeat([0, 1], 3))
    tests = pair_tests(components(sample), EXAMPLES)
    assert (tests.difference[0], tests.p[0]) == (0.0, 1.0)


def test_holm_is_that_of_statsmodels():
    p = np.random.default_rng(0).random(50) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_mcnemar_is_that_of_statsmodels():
    right = np.random.default_rng(0).random((4, 120)) < [[0.9], [0.8], [0.9], [0.5]]
    only = only_right(right)
    for i in range(4):
        for j in range(4):
            both, neither = (right[i] & right[j]).sum(), (~right[i] & ~right[j]).sum()
            theirs = their_mcnemar([[both, only[i, j]], [only[j, i], neither]], exact=True)
            assert mcnemar(only[i, j], only[j, i]) == pytest.approx(theirs.pvalue)
