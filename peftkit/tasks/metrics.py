"""Metrics by name: `evaluate` modules that need no network, and the Hub's for every other name.

Called by the tasks; imports `errors` and `data.sources`. The Hub serves even `accuracy` as a
script, so the usual ones are defined here, over scikit-learn and scipy. They keep their rows in
memory and their folders in a temporary place, so processes that score at once share no file.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from peftkit.errors import DataError, suggestion

if TYPE_CHECKING:
    import evaluate
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.generic]

GLUE_METRICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cola": ("matthews_correlation",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "stsb": ("pearsonr", "spearmanr"),
        "qqp": ("accuracy", "f1"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
)
"""Metrics of each GLUE configuration, the leading one first.

Source: Wang et al. 2019, "GLUE", arXiv:1804.07461, table 1.
"""


def metric_names() -> list[str]:
    """Names of the built-in metrics, sorted."""
    return sorted(_BUILT_IN)


def unfit(names: Iterable[str], *, num_labels: int) -> list[str]:
    """One line for each built-in metric that cannot score such labels; 1 label is a regression."""
    return [line for name in names if (line := _misfit(name, num_labels))]


def unloadable(names: Iterable[str]) -> list[str]:
    """One line for each metric that is not built in and that `evaluate` cannot load now.

    For a look before training: a metric that cannot be loaded at the end costs the whole run.
    """
    problems = []
    with TemporaryDirectory(prefix="peftkit-metrics-", ignore_cleanup_errors=True) as folder:
        for name in names:
            try:
                if name not in _BUILT_IN:
                    _module(name, cache_dir=folder)
            except DataError as error:
                problems += error.problems
    return problems


def compute(
    names: Sequence[str], predictions: "npt.ArrayLike", references: "npt.ArrayLike"
) -> dict[str, float]:
    """Score predictions against references, both (N,): class ids, or numbers for a regression.

    `f1`, `precision` and `recall` are those of class 1 of two; `f1_macro` averages over the
    classes that occur. Nothing found where something is divided by it scores 0.0, and so does
    `matthews_correlation` when either side is constant. A correlation of a constant or of a single
    row is undefined: `float("nan")`, without a warning. So is a regression metric of predictions
    that are not finite. A name that is not built in is loaded by `evaluate.load`, which runs code
    from the Hub or from a local script; its further numbers are returned as `<name>_<key>`.

    Raises:
        DataError: nothing to score, columns that do not pair up, values that the metric cannot
            score, or a metric that cannot be loaded.
    """
    predicted, expected = _columns(predictions, references)
    scores: dict[str, float] = {}
    with TemporaryDirectory(prefix="peftkit-metrics-", ignore_cleanup_errors=True) as folder:
        for name in names:
            _check_values(name, predicted, expected)
            module = _module(name, cache_dir=folder)
            found = module.compute(predictions=predicted.tolist(), references=expected.tolist())
            scores |= _numbers(name, found)
    return scores


def _columns(predictions: "npt.ArrayLike", references: "npt.ArrayLike") -> "tuple[Values, Values]":
    import numpy as np

    predicted, expected = np.asarray(predictions), np.asarray(references)
    if predicted.ndim != 1 or predicted.shape != expected.shape:
        raise DataError(
            f"metrics: predictions have shape {predicted.shape} and references {expected.shape}; "
            "both must be (N,) with one entry per example"
        )
    if not predicted.size:
        raise DataError("metrics: no predictions to score; the split is empty")
    return predicted, expected


def _misfit(name: str, num_labels: int) -> str | None:
    score = _BUILT_IN.get(name)
    if score is None:
        return None
    if num_labels == 1 and score.values == "int64":
        fitting = sorted(key for key, entry in _BUILT_IN.items() if entry.values == "float64")
        return (
            f"metrics: '{name}' scores classes and the problem is a regression; "
            f"choose from {', '.join(fitting)}"
        )
    if num_labels > 2 and score.binary:
        return (
            f"metrics: '{name}' is that of class 1 of two and there are {num_labels} labels; "
            "use accuracy, f1_macro or matthews_correlation"
        )
    return None


def _unreachable(name: str) -> str | None:
    # Asked first: `evaluate.load` retries for half a minute when nothing answers.
    from peftkit.data.sources import hub_reachable

    if (Path(name).suffix == ".py" and Path(name).is_file()) or hub_reachable():
        return None
    return (
        f"metrics: '{name}' is not built in and the Hub, where `evaluate` would look, cannot be "
        f"reached; {suggestion(name, _BUILT_IN)}"
    )


def _check_values(name: str, predicted: "Values", expected: "Values") -> None:
    import numpy as np

    score = _BUILT_IN.get(name)
    if score is None or score.values == "float64":
        return
    for side, column in (("prediction", predicted), ("reference", expected)):
        fraction = column[column != np.rint(column)]
        if fraction.size:
            raise DataError(f"metrics: '{name}' scores class ids, found the {side} {fraction[0]}")
        other = column[~np.isin(column, (0, 1))]
        if score.binary and other.size:
            raise DataError(
                f"metrics: '{name}' is that of class 1 of two, found the {side} {other[0]}; "
                "use accuracy, f1_macro or matthews_correlation"
            )


def _module(name: str, *, cache_dir: str) -> "evaluate.EvaluationModule":
    if name in _BUILT_IN:
        return _built_in_module(name, cache_dir=cache_dir)
    if problem := _unreachable(name):
        raise DataError(problem)
    try:
        import evaluate

        return evaluate.load(name, keep_in_memory=True, cache_dir=cache_dir)
    except Exception as error:  # a third party's script may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"metrics: `evaluate` cannot load '{name}': {reason}; {suggestion(name, _BUILT_IN)}"
        ) from error


def _built_in_module(name: str, *, cache_dir: str) -> "evaluate.Metric":
    # Defined inside the function: the base class costs seconds to import.
    import evaluate
    import numpy as np
    from datasets import Features, Value

    score = _BUILT_IN[name]

    class BuiltIn(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> "evaluate.MetricInfo":
            columns = {key: Value(score.values) for key in ("predictions", "references")}
            return evaluate.MetricInfo(
                description=score.description, citation="", features=Features(columns)
            )

        def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
            return {name: float(score.function(np.asarray(references), np.asarray(predictions)))}

    return BuiltIn(config_name=name, keep_in_memory=True, cache_dir=cache_dir)


def _numbers(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    import numpy as np

    scalars = {key: float(value) for key, value in found.items() if np.ndim(value) == 0}
    if not scalars:
        raise DataError(f"metrics: '{name}' returned no number, found {', '.join(sorted(found))}")
    leading = name if name in scalars else next(iter(scalars))
    rest = {f"{name}_{key}": value for key, value in scalars.items() if key != leading}
    return {name: scalars[leading]} | rest


def _accuracy(expected: "Values", predicted: "Values") -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(expected, predicted))


def _f1_macro(expected: "Values", predicted: "Values") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(expected, predicted, average="macro", zero_division=0.0))


def _of_class_one(function: str, expected: "Values", predicted: "Values") -> float:
    from sklearn import metrics

    score = getattr(metrics, function)
    return float(score(expected, predicted, labels=[1], average="macro", zero_division=0.0))


def _matthews(expected: "Values", predicted: "Values") -> float:
    from sklearn.metrics import matthews_corrcoef

    if len(set(expected.tolist())) < 2 or len(set(predicted.tolist())) < 2:
        return 0.0  # scikit-learn agrees, but warns when both sides hold one and the same class
    return float(matthews_corrcoef(expected, predicted))


def _correlation(function: str, expected: "Values", predicted: "Values") -> float:
    import numpy as np
    from scipy import stats

    if not np.isfinite(predicted).all() or np.ptp(expected) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant columns: the number is still the answer
        return float(getattr(stats, function)(predicted, expected).statistic)


def _error(function: str, expected: "Values", predicted: "Values") -> float:
    import numpy as np
    from sklearn import metrics

    if not np.isfinite(predicted).all():
        return float("nan")  # scikit-learn raises
    return float(getattr(metrics, function)(expected, predicted))


@dataclass(frozen=True)
class _Score:
    function: Callable[["Values", "Values"], float]
    values: Literal["int64", "float64"]
    description: str
    binary: bool = False


def _class_one(function: str, description: str) -> _Score:
    return _Score(partial(_of_class_one, function), "int64", description, binary=True)


def _number(score: Callable[[str, "Values", "Values"], float], function: str, text: str) -> _Score:
    return _Score(partial(score, function), "float64", text)


_BUILT_IN: Mapping[str, _Score] = MappingProxyType(
    {
        "accuracy": _Score(_accuracy, "int64", "Share of rows with the right class."),
        "f1": _class_one("f1_score", "F1 of class 1."),
        "f1_macro": _Score(_f1_macro, "int64", "Mean F1 over the classes that occur."),
        "precision": _class_one("precision_score", "Precision of class 1."),
        "recall": _class_one("recall_score", "Recall of class 1."),
        "matthews_correlation": _Score(_matthews, "int64", "Matthews correlation coefficient."),
        "pearsonr": _number(_correlation, "pearsonr", "Pearson correlation."),
        "spearmanr": _number(_correlation, "spearmanr", "Spearman rank correlation."),
        "mse": _number(_error, "mean_squared_error", "Mean squared error."),
        "mae": _number(_error, "mean_absolute_error", "Mean absolute error."),
    }
)
