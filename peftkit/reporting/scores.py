"""Metrics from sums over examples, so that thousands of resamples are one matrix product.

Called by the resampling; imports numpy only. Agrees with `peftkit.tasks.metrics`, which scored the
run; whoever adds a metric there that should be tested between methods adds its sums here.

Legend: N examples, R runs, B resamples, F sums of a metric, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Columns = dict[str, NDArray[np.generic]]

LOWER_IS_BETTER: Final = frozenset({"loss", "mse", "mae", "perplexity"})
"""Leading metrics of which less is better."""
MAX_CLASSES: Final = 10_000
"""Each is a column of sums; a larger number is a damaged file rather than a task."""
CORRELATIONS: Final = frozenset({"pearsonr", "spearmanr"})


@dataclass(frozen=True)
class Metric:
    """A metric as a function of sums over examples.

    `parts` makes (N, F) numbers of one run's columns; `score` makes (…) of their sums (…, F) and of
    how many examples were summed.
    """

    parts: Callable[[Columns], Floats]
    score: Callable[[Floats, int], Floats]


def metric_of(name: str, columns: Columns, classes: int) -> Metric | None:
    """The metric of that name for runs with such columns; None: it cannot be recomputed.

    `spearmanr` has no entry: its ranks change with the resample, see `weighted_ranks`. A name that
    is a column is the mean of the column, which is how an exact match or a loss is scored.
    """
    if name in _TOKEN_METRICS and {"loss", "loss_items", "correct"} <= columns.keys():
        return _TOKEN_METRICS[name]
    is_of_both = {"label", "prediction"} <= columns.keys()
    if name in ("f1_macro", "matthews_correlation") and is_of_both and classes <= MAX_CLASSES:
        parts = _confusion_parts(classes)
        return Metric(parts, _f1_macro if name == "f1_macro" else _matthews)
    if name in _METRICS and is_of_both:
        return _METRICS[name]
    if name in columns and columns[name].ndim == 1 and columns[name].dtype.kind in "fiub":
        return Metric(lambda columns: columns[name].astype(float)[:, None], _mean)
    return None


def correct(columns: Columns) -> NDArray[np.bool_]:
    """Which examples were answered rightly, (N,)."""
    return np.asarray(columns["prediction"] == columns["label"], dtype=bool)


def weighted_ranks(values: Floats, weights: NDArray[np.integer]) -> Floats:
    """Midranks (B, N) of `values` (N,), each example standing `weights` (B, N) times in the sample.

    Ties share the mean of the ranks that they take up, as in scipy's rankdata.
    """
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) > 0])
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)
    ends = np.cumsum(sizes, axis=1)
    ranks = ends - (sizes - 1) / 2
    return np.asarray(ranks[:, group])


def weighted_correlation(x: Floats, y: Floats, weights: NDArray[np.integer]) -> Floats:
    """Pearson correlation (B,) of `x` and `y`, each (N,) or (B, N), under `weights` (B, N)."""
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    products = [(weights * product).sum(axis=1) for product in (x * y, x * x, y * y)]
    return _ratio(products[0], np.sqrt(products[1] * products[2]), empty=np.nan)


def _ratio(above: Floats, below: Floats, *, empty: float = 0.0) -> Floats:
    filled = np.full(np.shape(below), empty)
    return np.asarray(np.divide(above, below, out=filled, where=np.asarray(below) > 0))


def _mean(sums: Floats, count: int) -> Floats:
    return np.asarray(sums[..., 0] / count)


def _class_one_parts(columns: Columns) -> Floats:
    said, true = columns["prediction"] == 1, columns["label"] == 1
    return np.stack([said & true, said, true], axis=1).astype(np.float32)


def _f1(sums: Floats, count: int) -> Floats:
    hits, said, true = np.moveaxis(sums, -1, 0)
    return _ratio(2 * hits, said + true)


def _confusion_parts(classes: int) -> Callable[[Columns], Floats]:
    """Hits, predictions and labels of each class: (N, 3K)."""

    def parts(columns: Columns) -> Floats:
        names = np.arange(classes)
        said = columns["prediction"][:, None] == names
        true = columns["label"][:, None] == names
        return np.concatenate([said & true, said, true], axis=1).astype(np.float32)

    return parts


def _by_class(sums: Floats) -> list[Floats]:
    """Hits, predictions and labels, each (…, K); float64, for products of counts follow."""
    return list(np.split(np.asarray(sums, dtype=float), 3, axis=-1))


def _f1_macro(sums: Floats, count: int) -> Floats:
    hits, said, true = _by_class(sums)
    occurs = said + true > 0
    return np.asarray(_ratio(2 * hits, said + true).sum(axis=-1) / occurs.sum(axis=-1))


def _matthews(sums: Floats, count: int) -> Floats:
    """The K-class coefficient.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation
    coefficient", Computational Biology and Chemistry 28.
    """
    hits, said, true = _by_class(sums)
    total = float(count)
    covariance = hits.sum(axis=-1) * total - (said * true).sum(axis=-1)
    spread_said = total**2 - (said**2).sum(axis=-1)
    spread_true = total**2 - (true**2).sum(axis=-1)
    return _ratio(covariance, np.sqrt(spread_said * spread_true))


def _pair_parts(columns: Columns) -> Floats:
    # Centred first: sums of squares of large numbers would lose the digits that matter.
    x = columns["prediction"].astype(float) - columns["prediction"].astype(float).mean()
    y = columns["label"].astype(float) - columns["label"].astype(float).mean()
    return np.stack([x, y, x * y, x * x, y * y], axis=1)


def _pearson(sums: Floats, count: int) -> Floats:
    x, y, xy, xx, yy = np.moveaxis(sums, -1, 0) / count
    spread = np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0)
    return _ratio(xy - x * y, np.sqrt(spread), empty=np.nan)


def _error_parts(power: int) -> Callable[[Columns], Floats]:
    def parts(columns: Columns) -> Floats:
        off = columns["prediction"].astype(float) - columns["label"].astype(float)
        return np.asarray(np.abs(off) ** power)[:, None]

    return parts


def _token_parts(column: str) -> Callable[[Columns], Floats]:
    return lambda columns: np.stack([columns[column], columns["loss_items"]], axis=1).astype(float)


def _per_token(sums: Floats, _: int) -> Floats:
    return _ratio(sums[..., 0], sums[..., 1], empty=np.nan)


_TOKEN_METRICS: Final = {
    "loss": Metric(_token_parts("loss"), _per_token),
    "perplexity": Metric(
        _token_parts("loss"), lambda sums, n: np.exp(np.minimum(_per_token(sums, n), 700))
    ),
    "token_accuracy": Metric(_token_parts("correct"), _per_token),
}
"""Of examples that count by their tokens: sums over examples, over the sum of their tokens."""

_METRICS: Final = {
    "accuracy": Metric(lambda columns: correct(columns).astype(np.float32)[:, None], _mean),
    "f1": Metric(_class_one_parts, _f1),
    "precision": Metric(_class_one_parts, lambda sums, _: _ratio(sums[..., 0], sums[..., 1])),
    "recall": Metric(_class_one_parts, lambda sums, _: _ratio(sums[..., 0], sums[..., 2])),
    "pearsonr": Metric(_pair_parts, _pearson),
    "mse": Metric(_error_parts(2), _mean),
    "mae": Metric(_error_parts(1), _mean),
}
