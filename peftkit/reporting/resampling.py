"""How the scores of a table's runs move together when other examples are drawn.

Called by the comparison; imports the metrics. All runs of a table are scored on the same draws of
examples, so whatever makes an example hard for all of them cancels in a difference.

Legend: N examples, R runs, B resamples, F sums of a metric.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from peftkit.reporting.scores import (
    Columns,
    Floats,
    Metric,
    metric_of,
    weighted_correlation,
    weighted_ranks,
)

RESAMPLES: Final = 2000
"""Draws of the examples; a variance is then known to about 3% (sqrt(2 / B))."""
SEED: Final = 0
MAX_CELLS: Final = 8_000_000
"""Numbers in one block of weights or of metric parts: bounds memory for any size of split."""


def recomputed(name: str, columns: Columns) -> float | None:
    """The metric over all examples of one run; None: it cannot be computed from these columns."""
    scores = scored(name, [columns], np.ones((1, _count(columns)), dtype=np.int64))
    return None if scores is None else float(scores[0, 0])


def spread(name: str, runs: Sequence[Columns]) -> Floats | None:
    """Covariance (R, R) of the runs' scores over draws of the examples, all runs on the same draws.

    `runs` are the columns of each run, over the same examples in the same order. None: the metric
    cannot be computed from them. The draws are the same in every call.
    """
    blocks = [scored(name, runs, weights) for weights in draws(_count(runs[0]))]
    scores = [block for block in blocks if block is not None]
    if not scores:
        return None
    return np.atleast_2d(np.cov(np.concatenate(scores), rowvar=False))


def draws(count: int) -> Iterator[NDArray[np.int64]]:
    """Blocks (b, N) of how often each of `count` examples is drawn, `RESAMPLES` rows in all."""
    rng = np.random.default_rng(SEED)
    size = max(1, min(RESAMPLES, MAX_CELLS // count))
    for start in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)


def scored(name: str, runs: Sequence[Columns], weights: NDArray[np.int64]) -> Floats | None:
    """Scores (b, R) of the runs on resamples in which example n stands `weights[:, n]` times."""
    if name == "spearmanr" and all({"label", "prediction"} <= run.keys() for run in runs):
        return np.stack([_spearman(columns, weights) for columns in runs], axis=1)
    metric = metric_of(name, runs[0], _classes(runs))
    if metric is None:
        return None
    return np.concatenate([_of_block(metric, block, weights) for block in _blocks(runs)], axis=1)


def _count(columns: Columns) -> int:
    return len(columns["label"]) if "label" in columns else len(next(iter(columns.values())))


def _blocks(runs: Sequence[Columns]) -> Iterator[Sequence[Columns]]:
    size = max(1, MAX_CELLS // (10 * _count(runs[0])))
    return (runs[start : start + size] for start in range(0, len(runs), size))


def _of_block(metric: Metric, runs: Sequence[Columns], weights: NDArray[np.int64]) -> Floats:
    parts = np.concatenate([metric.parts(columns) for columns in runs], axis=1)
    # Counts are whole numbers far below 2^24, so their sums in float32 are exact.
    sums = weights.astype(parts.dtype) @ parts
    return metric.score(sums.reshape(len(weights), len(runs), -1), weights.shape[1])


def _classes(runs: Sequence[Columns]) -> int:
    sides = [columns[key] for columns in runs for key in ("label", "prediction") if key in columns]
    whole = [side for side in sides if side.dtype.kind in "iub" and side.size]
    return int(max((side.max() for side in whole), default=0)) + 1


def _spearman(columns: Columns, weights: NDArray[np.int64]) -> Floats:
    x, y = (columns[key].astype(float) for key in ("prediction", "label"))
    ranks = [weighted_ranks(values, weights) for values in (x, y)]
    return weighted_correlation(ranks[0], ranks[1], weights)
