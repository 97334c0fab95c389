"""Intervals and tests for means over few seeds and many examples.

Called by the comparison; imports numpy and scipy. Holm and McNemar are held to statsmodels in the
tests.

A mean over seeds would come out differently with other seeds and with other validation examples.
Both are draws, crossed: every seed meets every example. Per run the score is

    mean of the method + seed + example + seed x example

and the variance of an arm's mean, or of the difference of two, has three parts:

- *examples*: from a paired bootstrap over the examples, the same draws for all runs of a table.
  Thousands of examples make it well known.
- *interaction*, the part of it that each seed brings anew: the variance of single runs against that
  of their mean, under the same draws. Well known too.
- *seeds*: from the scores of the S seeds, with S - 1 degrees of freedom; it holds the interaction
  as well, so it counts for at least that much, and the bootstrap's share of it is taken off once.

    V = sum over the two arms of max(seeds, interaction) + max(examples - interactions, 0)

The statistic, difference / sqrt(V), is held against t with Satterthwaite's degrees of freedom.
Three seeds resampled with replacement, the plain nested bootstrap, would show two thirds of their
variance ((S - 1) / S) and no tail beyond their range; examples alone would leave the seeds out.
Both tell equal methods apart far too often, see docs/statistics.md. Seeds of two arms are not
paired: a seed draws other numbers for another method, and where they do agree that only makes the
test careful.

Source: Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2) (crossed draws);
Satterthwaite 1946, "An approximate distribution of estimates of variance components", Biometrics
2(6); Welch 1947, Biometrika 34; Bouthillier et al. 2021, "Accounting for variance in machine
learning benchmarks", arXiv:2103.03098 (why seeds must be in).

Legend: A arms, R runs, S seeds of an arm, N examples, P pairs.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from peftkit.reporting.scores import Floats

LEVEL: Final = 0.05
POWER: Final = 0.8


class Interval(NamedTuple):
    """A 95% interval of a mean or of a difference."""

    low: float
    high: float


@dataclass(frozen=True)
class Sample:
    """Scores of one table: `scores` (R,), their covariance over examples `spread` (R, R), and
    `arm` (R,), the arm of each run as 0 … A - 1.
    """

    scores: Floats
    spread: Floats
    arm: NDArray[np.integer]


@dataclass(frozen=True)
class Components:
    """Means of the arms (A,) and the parts of their variance: `seeds` and `interaction` (A,), NaN
    for an arm with one seed, and the covariance over examples of the means, `examples` (A, A).
    """

    means: Floats
    counts: NDArray[np.integer]
    seeds: Floats
    interaction: Floats
    examples: Floats


@dataclass(frozen=True)
class Tests:
    """All pairs (P,), arm `a` against arm `b`; `difference` is a - b."""

    a: NDArray[np.integer]
    b: NDArray[np.integer]
    difference: Floats
    standard_error: Floats
    degrees_of_freedom: Floats
    p: Floats
    p_adjusted: Floats
    """Holm's, over all pairs of the table."""
    detectable: Floats
    """The smallest true difference that would be found in 4 of 5 such comparisons."""
    half_width: Floats
    """Of the 95% interval of the difference."""
    covers_seeds: NDArray[np.bool_]
    """False: an arm has one seed, and the test speaks of these trained models only."""


def components(sample: Sample) -> Components:
    """Take the variance of the arms' means apart."""
    counts = np.bincount(sample.arm)
    averaging = (sample.arm == np.arange(len(counts))[:, None]) / counts[:, None]
    means = averaging @ sample.scores
    examples = averaging @ sample.spread @ averaging.T
    single = averaging @ np.diag(sample.spread)
    off = averaging @ (sample.scores - means[sample.arm]) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        seeds = off / (counts - 1)
        interaction = (single - np.diag(examples)) / (counts - 1)
    return Components(means, counts, seeds, interaction, examples)


def seed_interval(scores: Floats) -> Interval | None:
    """95% t interval of the mean over seeds, the examples as they are; None for one seed."""
    from scipy import special

    count = len(scores)
    if count < 2:
        return None
    half = special.stdtrit(count - 1, 1 - LEVEL / 2) * np.std(scores, ddof=1) / np.sqrt(count)
    return Interval(float(np.mean(scores) - half), float(np.mean(scores) + half))


def arm_intervals(parts: Components, examples: int) -> list[Interval]:
    """95% interval of each arm's mean over other seeds and other examples.

    For an arm with one seed it covers the examples only.
    """
    from scipy import special

    seeds, freedom_parts = _seed_part(parts)
    interaction = np.nan_to_num(parts.interaction)
    rest = np.maximum(np.diag(parts.examples) - interaction, 0)
    variance = seeds + rest
    freedom = _satterthwaite(variance, freedom_parts + rest**2 / max(examples - 1, 1))
    half = special.stdtrit(freedom, 1 - LEVEL / 2) * np.sqrt(variance)
    bounds = zip(parts.means - half, parts.means + half, strict=True)
    return [Interval(float(low), float(high)) for low, high in bounds]


def pair_tests(parts: Components, examples: int) -> Tests:
    """Test every pair of arms. Needs at least two arms."""
    from scipy import special

    a, b = np.triu_indices(len(parts.means), k=1)
    difference = parts.means[a] - parts.means[b]
    variance, freedom, covers_seeds = _pair_variance(parts, a, b, examples)
    # Where no example tells two arms apart their difference is 0 as well; where all do, as with
    # one right and one wrong throughout, one example's worth of doubt is kept.
    variance = np.maximum(variance, (difference / examples) ** 2)
    error = np.sqrt(variance)
    statistic = np.divide(np.abs(difference), error, out=np.zeros_like(error), where=error > 0)
    p = 2 * special.stdtr(freedom, -statistic)
    half = _quantile(freedom, 1 - LEVEL / 2) * error
    return Tests(
        a=a,
        b=b,
        difference=difference,
        standard_error=error,
        degrees_of_freedom=freedom,
        p=p,
        p_adjusted=holm(p),
        detectable=_detectable(error, freedom),
        half_width=half,
        covers_seeds=covers_seeds,
    )


def holm(p: Floats) -> Floats:
    """Holm's step-down adjustment of `p` (P,).

    Equal to statsmodels' `multipletests(p, method="holm")`, whose import alone takes two seconds.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian
    Journal of Statistics 6(2).
    """
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def only_right(right: NDArray[np.bool_]) -> NDArray[np.integer]:
    """How many examples the row's run answers rightly and the column's does not, (R, R), from
    `right` (R, N).
    """
    # Counts far below 2^24 are exact in float32, and its product is that of a BLAS.
    return (right.astype(np.float32) @ (~right).astype(np.float32).T).astype(np.int64)


def mcnemar(only_a: int, only_b: int) -> float:
    """P value of McNemar's exact test: of the examples that one run of two answers rightly.

    About two trained models; seeds are no part of it. Equal to statsmodels' `mcnemar(exact=True)`.
    """
    from scipy import special

    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def _pair_variance(
    parts: Components, a: NDArray[np.integer], b: NDArray[np.integer], examples: int
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Variance of the differences, its degrees of freedom, and whether seeds are in it."""
    own = np.diag(parts.examples)
    over_examples = np.maximum(own[a] + own[b] - 2 * parts.examples[a, b], 0)
    covers_seeds = (parts.counts[a] > 1) & (parts.counts[b] > 1)
    seeds, freedom_parts = _seed_part(parts)
    interaction = np.nan_to_num(parts.interaction)
    seeds, freedom_parts, interaction = (
        np.where(covers_seeds, part[a] + part[b], 0) for part in (seeds, freedom_parts, interaction)
    )
    rest = np.maximum(over_examples - interaction, 0)
    variance = seeds + rest
    below = freedom_parts + rest**2 / max(examples - 1, 1)
    return variance, _satterthwaite(variance, below), covers_seeds


def _seed_part(parts: Components) -> tuple[Floats, Floats]:
    """What seeds add to the variance of each mean, and to the denominator of its freedom."""
    several = parts.counts > 1
    larger = np.where(several, np.maximum(parts.seeds, parts.interaction), 0.0)
    return larger, larger**2 / np.maximum(parts.counts - 1, 1)


def _satterthwaite(variance: Floats, below: Floats) -> Floats:
    filled = np.full_like(variance, np.inf)
    return np.asarray(np.divide(variance**2, below, out=filled, where=below > 0))


def _detectable(error: Floats, freedom: Floats) -> Floats:
    """At Holm's strictest step, which is the level over the number of pairs."""
    strictest = _quantile(freedom, 1 - LEVEL / (2 * len(error)))
    return np.asarray((strictest + _quantile(freedom, POWER)) * error)


def _quantile(freedom: Floats, level: float) -> Floats:
    """Student's t. Pairs of arms with one seed have one number of degrees of freedom, but for
    rounding: it is looked up once.
    """
    from scipy import special

    distinct, place = np.unique(freedom.round(6), return_inverse=True)
    return np.asarray(special.stdtrit(distinct, level)[place])
