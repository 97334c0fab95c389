"""What a comparison holds: tables of rows, and the tests between them.

Made by the comparison, read by the wording, the tables, the documents and the page.
"""

from dataclasses import dataclass

from peftkit.reporting.arms import Arm
from peftkit.reporting.conditions import Difference
from peftkit.reporting.figures import Figures
from peftkit.reporting.pairs import Pairs
from peftkit.reporting.statistics import Interval


@dataclass(frozen=True)
class Row:
    """One arm with its figures. `score` is the mean over completed seeds, None without one."""

    arm: Arm
    figures: Figures
    score: float | None
    scores: dict[int, float]
    """Seed → score of that run, tested or not."""
    tested_seeds: tuple[int, ...]
    """Those whose predictions can be used: `interval` and the tests are over them."""
    seed_interval: Interval | None
    """Over other seeds, on these examples; None: fewer than two seeds."""
    interval: Interval | None
    """Over other examples, and over other seeds where there are two or more; None: untested."""
    letters: str
    """Arms that share a letter are not separated; empty: untested, or too many arms."""
    in_best_group: bool
    """Whether no test separates it from the arm with the best score."""
    notes: tuple[str, ...]
    """Letters of the conditions in which it differs."""

    @property
    def label(self) -> str:
        """What it is called in its table."""
        return self.arm.label

    @property
    def is_partly_tested(self) -> bool:
        """Whether its tests are over fewer seeds than its score."""
        return 0 < len(self.tested_seeds) < len(self.scores)

    @property
    def is_of_one_seed(self) -> bool:
        """Whether its interval and its tests cover the draw of examples only."""
        return len(self.tested_seeds) == 1


@dataclass(frozen=True)
class Table:
    """Arms that were scored on the same examples, the best first, the untested and failed last."""

    title: str
    metric: str
    higher_is_better: bool
    digest: str | None
    """Of the validation data; None: no run got that far."""
    examples: int
    """That the tests stand on; 0: none."""
    is_sample: bool
    rows: tuple[Row, ...]
    pairs: Pairs
    conditions: tuple[Difference, ...]
