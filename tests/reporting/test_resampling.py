"""Scores from sums, against the metrics that scored the runs."""

import numpy as np
import pytest

from peftkit.reporting.resampling import draws, recomputed, scored, spread
from peftkit.tasks.metrics import compute

RNG = np.random.default_rng(0)
TWO = {"label": RNG.integers(2, size=200), "prediction": RNG.integers(2, size=200)}
FOUR = {"label": RNG.integers(4, size=200), "prediction": RNG.integers(4, size=200)}
NUMBERS = {"label": RNG.integers(6, size=200) / 2, "prediction": RNG.normal(size=200).round(1)}
CASES = [
    *((name, TWO) for name in ("accuracy", "f1", "f1_macro", "precision", "recall")),
    ("matthews_correlation", TWO),
    *((name, FOUR) for name in ("accuracy", "f1_macro", "matthews_correlation")),
    *((name, NUMBERS) for name in ("pearsonr", "spearmanr", "mse", "mae")),
]


def repeated(columns, weights):
    return {name: np.repeat(column, weights) for name, column in columns.items()}


@pytest.mark.parametrize(("name", "columns"), CASES)
def test_a_metric_from_sums_is_that_of_the_run(name, columns):
    theirs = compute([name], columns["prediction"], columns["label"])[name]
    assert recomputed(name, columns) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(("name", "columns"), CASES)
def test_a_resample_scores_as_its_rows_do(name, columns):
    """The spread of two runs against scores of the repeated rows themselves."""
    other = columns | {"prediction": np.roll(columns["prediction"], 1)}
    weights = np.concatenate(list(draws(200)))[:10]
    by_rows = np.array(
        [
            [
                compute([name], c["prediction"], c["label"])[name]
                for c in (repeated(columns, w), repeated(other, w))
            ]
            for w in weights
        ]
    )
    assert scored(name, [columns, other], weights) == pytest.approx(by_rows, abs=1e-6)


def test_the_spread_of_an_accuracy_is_that_of_a_mean():
    right = RNG.random((2, 500)) < 0.8
    columns = [{"label": np.ones(500), "prediction": r} for r in right]
    assert spread("accuracy", columns) == pytest.approx(np.cov(right, bias=True) / 500, abs=3e-5)


def test_the_draws_are_the_same_each_time():
    assert all((a == b).all() for a, b in zip(draws(50), draws(50), strict=True))
    assert np.concatenate(list(draws(50))).sum(axis=1).tolist() == [50] * 2000


def test_a_column_of_that_name_is_averaged():
    assert recomputed("exact_match", {"exact_match": np.array([1, 0, 1, 1])}) == 0.75


def test_an_unknown_metric_cannot_be_recomputed():
    assert recomputed("bleu", TWO) is None
    assert spread("bleu", [TWO, TWO]) is None


def test_constant_answers_score_as_the_metrics_say():
    constant = {"label": TWO["label"], "prediction": np.zeros(200, dtype=int)}
    assert recomputed("matthews_correlation", constant) == 0.0
    assert recomputed("f1", constant) == 0.0
    assert np.isnan(recomputed("pearsonr", constant))
