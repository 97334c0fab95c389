"""A language model that is taught to answer: its run, its record, and what its delta does then."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tiny_runs import WORDS
from transformers import AutoTokenizer

from peftkit import cli, experiment
from peftkit.errors import DataError, SourceError
from peftkit.experiment import run_experiment
from peftkit.planning.predict import predict
from peftkit.planning.setting import of_recipe
from peftkit.recipe import from_resolved
from peftkit.reporting.predictions import read_predictions
from peftkit.reporting.resampling import recomputed

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

METHODS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora"},
    "qlora": {"type": "qlora"},
}
EACH_METHOD = pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "lora")],
)


@pytest.fixture
def data(tmp_path):
    """Three to nine words, and the last two once more."""
    folder = tmp_path / "data"
    folder.mkdir()
    draw = random.Random(0)
    for split, count in {"train": 48, "validation": 17}.items():
        words = [draw.choices(WORDS, k=draw.randint(3, 9)) for _ in range(count)]
        rows = [{"said": " ".join(w), "again": " ".join(w[-2:])} for w in words]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def recipe(language_model, data, workplace):
    def recipe(method, **training):
        settings = {"learning_rate": 1e-2, "num_train_epochs": 3, "per_device_train_batch_size": 8}
        return from_resolved(
            {
                "name": "tiny",
                "base": {"name": str(language_model)},
                "task": {
                    "type": "sft",
                    "dataset": str(data),
                    "prompt": "the {said} was",
                    "completion": " {again}",
                    "max_length": 32,
                },
                "method": METHODS[method],
                "training": settings | training,
            }
        )

    return recipe


@EACH_METHOD
def test_a_run_learns_and_its_delta_scores_the_same_merges_and_answers(recipe, method, capsys):
    record = run_experiment(recipe(method))
    first, *_, last = record.history
    assert last["holdout"]["perplexity"] < first["holdout"]["perplexity"]
    scores = record.metrics["validation"]
    assert scores.keys() == {"loss", "perplexity", "token_accuracy"}
    for phase, predicted in record.predicted_allocated_bytes.items():
        if phase != "load":
            assert predicted == pytest.approx(record.memory[phase].allocated_bytes, rel=0.05)

    capsys.readouterr()
    assert cli.main(["evaluate", "tiny", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["equal"], again["metrics"]) == (True, scores)
    assert cli.main(["predict", "tiny", "a film is good and", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["text"], str)
    assert cli.main(["merge", "tiny", "-o", "merged"]) == 0
    assert "verified" in capsys.readouterr().out
    assert Path("merged/config.json").exists()


def test_scores_are_recomputed_from_the_predictions_of_examples(recipe):
    record = run_experiment(recipe("lora", max_steps=1))
    columns = read_predictions(Path("runs/tiny-seed0/predictions.parquet"))
    assert columns["loss_items"].min() != columns["loss"].max()
    for name, value in record.metrics["validation"].items():
        assert recomputed(name, columns) == pytest.approx(value, rel=1e-6)


def test_the_plan_counts_logits_of_every_token(recipe):
    small, large = (
        predict(of_recipe(recipe("lora"), length=n)).phases["forward"].total_bytes for n in (8, 16)
    )
    vocabulary = 22
    assert large - small > 8 * 8 * vocabulary * 4


def test_two_sft_runs_are_compared_by_perplexity_of_which_less_is_better(recipe, capsys):
    run_experiment(recipe("lora"))
    worse = recipe("lora", learning_rate=1e-6).model_copy(update={"name": "worse"})
    run_experiment(worse)
    capsys.readouterr()
    assert cli.main(["report", "runs", "--out", "page", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["metric"] == "perplexity"
    assert table["best_group"] == ["tiny"]


def test_an_encoder_is_no_language_model(recipe, tiny_base, language_model, tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_base, encoder)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(encoder)
    wrong = recipe("lora").resolved() | {"base": {"name": str(encoder)}}
    with pytest.raises(SourceError, match="'bert' reads in both directions"):
        run_experiment(from_resolved(wrong))


def test_examples_longer_than_the_models_positions_are_one_line(recipe, monkeypatch):
    monkeypatch.setattr(experiment, "position_limit", lambda model: 5)
    with pytest.raises(DataError, match=r"the longest example has \d+ tokens, .* positions for 5"):
        run_experiment(recipe("lora"))
