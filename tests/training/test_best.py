import math

import pytest

from peftkit.errors import RunError
from peftkit.training.best import BestMetric


def kept(name, values):
    """Position of the evaluation that is kept as the best."""
    metric, best, position = BestMetric(name), None, None
    for i, value in enumerate(values):
        if metric.improves(value, best):
            best, position = value, i
    return position


@pytest.mark.parametrize(
    ("name", "values", "position"),
    [
        ("accuracy", [0.1, 0.7, 0.3], 1),
        ("accuracy", [0.7, 0.7, 0.7], 0),
        ("matthews_correlation", [-0.5, -0.2, -0.9], 1),
        ("loss", [0.9, 0.2, 0.4], 1),
        ("loss", [0.2, 0.2], 0),
        ("mse", [4.0, 1.0], 1),
        ("mae", [1.0, 4.0], 0),
        ("accuracy", [math.nan, 0.2, math.nan, 0.1], 1),
        ("loss", [math.nan, 0.2, math.nan, 0.1], 3),
        ("loss", [math.inf, 3.0], 1),
        ("loss", [math.nan, math.nan], None),
        ("loss", [], None),
    ],
)
def test_the_best_evaluation_is_kept_the_first_of_equals_and_never_nan(name, values, position):
    assert kept(name, values) == position


def test_the_value_is_that_of_the_named_metric():
    assert BestMetric("f1").value({"loss": 0.5, "f1": 0.75}) == 0.75


def test_a_metric_that_was_not_measured_is_named_with_its_nearest():
    with pytest.raises(RunError) as caught:
        BestMetric("acuracy").value({"loss": 0.5, "accuracy": 0.75})
    assert caught.value.problems == [
        "training.metric_for_best_model: 'acuracy' is not measured; did you mean 'accuracy'? "
        "Choices: accuracy, loss"
    ]


def test_every_error_metric_of_a_task_is_better_when_lower():
    from peftkit.tasks.metrics import metric_names

    errors = {"mse", "mae"}
    assert errors <= set(metric_names())
    assert all(BestMetric(name).improves(0.1, 0.2) == (name in errors) for name in metric_names())
