"""The tests between the arms of a table, made into objects only where someone reads them.

Made by the testing, read by the wording, the tables and the documents; imports the statistics. A
thousand arms are half a million pairs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftkit.reporting.statistics import LEVEL, Interval, Tests, mcnemar


@dataclass(frozen=True)
class McNemar:
    """Two runs of one seed: examples that only the one and only the other answers rightly."""

    seed: int
    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Pair:
    """Two arms, by label; `difference` is the score of `a` less that of `b`, over tested seeds."""

    a: str
    b: str
    difference: float
    interval: Interval
    standard_error: float
    degrees_of_freedom: float
    p: float
    p_adjusted: float
    detectable: float
    covers_seeds: bool
    mcnemar: tuple[McNemar, ...]
    """One for each seed that both have; empty for other metrics than accuracy."""

    def lead(self, label: str) -> float:
        """The score of `label`, one of the two, less that of the other."""
        return self.difference if label == self.a else -self.difference

    @property
    def is_separated(self) -> bool:
        """Whether the data tell the two apart, at 5% over all pairs of the table."""
        return self.p_adjusted < LEVEL


@dataclass(frozen=True)
class McNemars:
    """What the tests between single runs need: for each arm its seeds and the places of their
    runs in `only` (R, R), which is that of `statistics.only_right`.
    """

    places: list[dict[int, int]]
    only: NDArray[np.integer]

    def between(self, a: int, b: int) -> tuple[McNemar, ...]:
        """Of two arms, by seed."""
        shared = sorted(self.places[a].keys() & self.places[b].keys())
        return tuple(
            self._test(seed, self.places[a][seed], self.places[b][seed]) for seed in shared
        )

    def _test(self, seed: int, i: int, j: int) -> McNemar:
        only_a, only_b = int(self.only[i, j]), int(self.only[j, i])
        return McNemar(seed, only_a, only_b, mcnemar(only_a, only_b))


@dataclass(frozen=True)
class Pairs:
    """Every pair of `labels`; `tests` is None where there are fewer than two."""

    labels: list[str]
    tests: Tests | None
    mcnemars: McNemars | None

    def __len__(self) -> int:
        return 0 if self.tests is None else len(self.tests.a)

    def __iter__(self) -> Iterator[Pair]:
        return (self._at(place) for place in range(len(self)))

    def of(self, label: str) -> list[Pair]:
        """The tests of one arm against each other one."""
        if self.tests is None or label not in self.labels:
            return []
        arm = self.labels.index(label)
        return self._all(np.flatnonzero((self.tests.a == arm) | (self.tests.b == arm)))

    def between(self, one: str, other: str) -> Pair | None:
        """The test of two arms; None: not tested."""
        if self.tests is None or not {one, other} <= set(self.labels):
            return None
        a, b = sorted((self.labels.index(one), self.labels.index(other)))
        return self._at(int(np.flatnonzero((self.tests.a == a) & (self.tests.b == b))[0]))

    def clearest(self, most: int) -> list[Pair]:
        """At most so many, by adjusted and then by plain p."""
        if self.tests is None:
            return []
        return self._all(np.lexsort((self.tests.p, self.tests.p_adjusted))[:most])

    def separated(self) -> list[tuple[int, int]]:
        """Places in `labels` of the arms that are told apart."""
        if self.tests is None:
            return []
        apart = self.tests.p_adjusted < LEVEL
        return list(zip(self.tests.a[apart].tolist(), self.tests.b[apart].tolist(), strict=True))

    @property
    def cover_seeds(self) -> bool:
        """Whether any pair does: else all speak of these trained models only."""
        return self.tests is not None and bool(self.tests.covers_seeds.any())

    def detectable(self) -> Interval | None:
        """The smallest and the largest of the differences that could have been seen.

        Of the pairs that cover seeds, if there are any: the others neglect what seeds change, and
        what they could have seen is smaller for it.
        """
        if self.tests is None:
            return None
        sizes = self.tests.detectable
        sizes = sizes[self.tests.covers_seeds] if self.cover_seeds else sizes
        return Interval(float(sizes.min()), float(sizes.max()))

    def _all(self, places: Iterable[int]) -> list[Pair]:
        return [self._at(int(place)) for place in places]

    def _at(self, place: int) -> Pair:
        tests = self.tests
        assert tests is not None
        a, b = int(tests.a[place]), int(tests.b[place])
        difference, half = float(tests.difference[place]), float(tests.half_width[place])
        return Pair(
            a=self.labels[a],
            b=self.labels[b],
            difference=difference,
            interval=Interval(difference - half, difference + half),
            standard_error=float(tests.standard_error[place]),
            degrees_of_freedom=float(tests.degrees_of_freedom[place]),
            p=float(tests.p[place]),
            p_adjusted=float(tests.p_adjusted[place]),
            detectable=float(tests.detectable[place]),
            covers_seeds=bool(tests.covers_seeds[place]),
            mcnemar=self.mcnemars.between(a, b) if self.mcnemars else (),
        )
