import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from peftkit.data import sources
from peftkit.errors import DataError
from peftkit.tasks import metrics

REFERENCES = np.array([0, 1, 1, 0, 1, 1])
PREDICTIONS = np.array([0, 1, 0, 1, 1, 1])  # 3 true positives, 1 false positive, 1 false negative
BUILT_IN = (
    "accuracy, f1, f1_macro, mae, matthews_correlation, mse, pearsonr, precision, recall, spearmanr"
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)


def problems_of(call, *arguments):
    with pytest.raises(DataError) as caught:
        call(*arguments)
    return caught.value.problems


def test_class_metrics_equal_hand_counts():
    names = ["accuracy", "f1", "f1_macro", "precision", "recall", "matthews_correlation"]
    expected = {
        "accuracy": 4 / 6,
        "f1": 3 / 4,
        "f1_macro": (3 / 4 + 1 / 2) / 2,
        "precision": 3 / 4,
        "recall": 3 / 4,
        "matthews_correlation": (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2),
    }
    found = metrics.compute(names, PREDICTIONS, REFERENCES)
    assert list(found) == names
    assert found == pytest.approx(expected, abs=1e-12)


def test_number_metrics_equal_numpy():
    predictions, references = np.array([0.1, 2.0, 1.5, 9.0]), np.array([0.0, 1.0, 2.0, 4.0])
    found = metrics.compute(["mse", "mae", "pearsonr", "spearmanr"], predictions, references)
    gap = predictions - references
    assert found == pytest.approx(
        {
            "mse": (gap**2).mean(),
            "mae": abs(gap).mean(),
            "pearsonr": np.corrcoef(predictions, references)[0, 1],
            "spearmanr": 0.8,
        }
    )


def test_precision_and_recall_are_not_swapped():
    found = metrics.compute(["precision", "recall"], [1, 0, 0, 0], [1, 1, 1, 0])
    assert found == pytest.approx({"precision": 1.0, "recall": 1 / 3})


@pytest.mark.parametrize(
    ("predictions", "references"),
    [([0, 0, 0], [0, 0, 0]), ([0, 0, 0], [1, 0, 1]), ([1, 0, 1], [0, 0, 0]), ([0], [0])],
)
def test_constant_columns_score_zero_or_nan_without_a_warning(predictions, references):
    names = ["f1", "precision", "recall", "matthews_correlation", "pearsonr", "spearmanr"]
    found = metrics.compute(names, predictions, references)
    assert [found[name] for name in names[:4]] == [0.0] * 4
    assert math.isnan(found["pearsonr"])
    assert math.isnan(found["spearmanr"])


def test_regression_metrics_of_a_nan_prediction_are_nan():
    found = metrics.compute(["mse", "mae", "pearsonr", "spearmanr"], [0.5, math.nan], [0.0, 1.0])
    assert [math.isnan(value) for value in found.values()] == [True] * 4


def test_nearly_constant_predictions_do_not_warn():
    predictions = 1.0 + np.arange(4) * 1e-16 + np.array([0, 0, 0, 3e-16])
    assert "pearsonr" in metrics.compute(["pearsonr"], predictions, [0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("name", "predictions", "references", "problem"),
    [
        ("accuracy", [], [], "metrics: no predictions to score; the split is empty"),
        (
            "accuracy",
            [1, 0],
            [1],
            "metrics: predictions have shape (2,) and references (1,); both must be (N,) with one "
            "entry per example",
        ),
        ("accuracy", [0.5], [1], "metrics: 'accuracy' scores class ids, found the prediction 0.5"),
        (
            "f1",
            [0, 1],
            [1, 2],
            "metrics: 'f1' is that of class 1 of two, found the reference 2; "
            "use accuracy, f1_macro or matthews_correlation",
        ),
    ],
)
def test_columns_that_cannot_be_scored_are_refused(name, predictions, references, problem):
    assert problems_of(metrics.compute, [name], predictions, references) == [problem]


def test_a_name_out_of_reach_is_refused_with_the_built_in_names(no_hub):
    problem = (
        "metrics: 'acuracy' is not built in and the Hub, where `evaluate` would look, cannot be "
        f"reached; did you mean 'accuracy'? Choices: {BUILT_IN}"
    )
    assert problems_of(metrics.compute, ["acuracy"], [1], [1]) == [problem]
    assert metrics.unloadable(["accuracy", "acuracy"]) == [problem]


def test_built_in_names_never_ask_the_hub(monkeypatch):
    monkeypatch.setattr(sources, "hub_reachable", lambda: pytest.fail("asked the Hub"))
    assert metrics.unloadable(metrics.metric_names()) == []
    assert metrics.compute(["accuracy"], [1], [1]) == {"accuracy": 1.0}


def test_a_hub_that_fails_is_one_line(monkeypatch):
    import evaluate

    def fail(name, **options):
        raise FileNotFoundError("no such module\nand more")

    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(evaluate, "load", fail)
    assert metrics.unloadable(["nothing"]) == [
        f"metrics: `evaluate` cannot load 'nothing': no such module; Choices: {BUILT_IN}"
    ]


def test_a_loaded_module_scores_under_the_name_it_was_asked_by(monkeypatch):
    import evaluate

    class Loaded:
        def compute(self, *, predictions, references):
            assert (predictions, references) == ([0, 1], [1, 1])
            return {"first": 0.25, "curve": [1, 2], "second": 3}

    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(evaluate, "load", lambda name, **options: Loaded())
    found = metrics.compute(["org/mine"], [0, 1], [1, 1])
    assert found == {"org/mine": 0.25, "org/mine_second": 3.0}


def test_metrics_that_do_not_fit_the_labels_are_named():
    assert metrics.unfit(metrics.metric_names(), num_labels=2) == []
    assert metrics.unfit(["mse", "accuracy"], num_labels=1) == [
        "metrics: 'accuracy' scores classes and the problem is a regression; "
        "choose from mae, mse, pearsonr, spearmanr"
    ]
    assert metrics.unfit(["accuracy", "recall"], num_labels=3) == [
        "metrics: 'recall' is that of class 1 of two and there are 3 labels; "
        "use accuracy, f1_macro or matthews_correlation"
    ]


def test_glue_defaults_are_built_in():
    assert len(metrics.GLUE_METRICS) == 9
    used = {name for names in metrics.GLUE_METRICS.values() for name in names}
    assert used <= set(metrics.metric_names())


@pytest.mark.slow
def test_two_processes_score_at_once_and_leave_no_file(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    script = (
        "from peftkit.tasks.metrics import compute\n"
        "for _ in range(20):\n"
        "    assert compute(['accuracy'], [1, 0], [1, 1]) == {'accuracy': 0.5}\n"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))},
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-W", "error", "-c", script]
    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert list(home.rglob("*")) == []
    assert list(temporary.rglob("*")) == []


def test_scoring_leaves_numpys_random_state_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    metrics.compute(["accuracy", "f1"], [1], [1])
    assert np.random.get_state()[1].tolist() == before


def test_importing_a_task_loads_nothing_heavy():
    script = (
        "import sys, peftkit.tasks.classification\n"
        "heavy = ('torch', 'transformers', 'datasets', 'evaluate', 'sklearn', 'scipy', 'numpy')\n"
        "assert [name for name in heavy if name in sys.modules] == []\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == 0
