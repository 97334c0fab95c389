"""`run`, then `evaluate` and `predict`, on a tiny base and a tiny data set of real files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import peftkit
from peftkit.cli import main, scoring
from peftkit.cli.scoring import Score

ROOT = Path(peftkit.__file__).parent.parent
WORDS = ["good", "bad", "film", "plot", "very", "not", "a", "the"]
RECIPE = """\
name: toy
base: {{name: "{root}/base"}}
task:
  type: classification
  dataset: "{root}/data"
  text_columns: [sentence]
  labels: [negative, positive]
  max_length: 16
  holdout_fraction: 0
method: {{type: full}}
training: {{learning_rate: 1e-2, max_steps: 2, per_device_train_batch_size: 4}}
"""


def write_base(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "cls_token": "[CLS]",
    }
    vocabulary = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)


def write_data(folder):
    folder.mkdir()
    texts = [f"{a} {b} {c}" for a in WORDS[:4] for b in WORDS[2:6] for c in WORDS]
    rows = [{"sentence": text, "label": int("good" in text)} for text in texts]
    for split, part in (("train", rows[:40]), ("validation", rows[40:60])):
        lines = [json.dumps(row) for row in part]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which `peftkit run` has left the delta `toy`, in a process of its own."""
    root = tmp_path_factory.mktemp("scoring")
    write_base(root / "base")
    write_data(root / "data")
    (root / "toy.yaml").write_text(RECIPE.format(root=root))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(root / "hf"))
        assert main(["run", "toy.yaml"]) == 0
    return root


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(place)
    monkeypatch.delenv("PEFTKIT_REGISTRY", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_evaluate_gives_the_very_score_of_the_run(place, capsys):
    assert main(["evaluate", "toy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    record = json.loads((place / "runs" / "toy-seed0" / "record.json").read_text())
    assert found["metrics"] == found["recorded"] == record["metrics"]["validation"]
    assert found["metrics"].keys() == {"loss", "accuracy"}
    assert (found["equal"], found["examples"], found["stand_in"]) == (True, 20, False)


def test_evaluate_says_in_a_table_whether_scores_are_equal(capsys):
    assert main(["evaluate", "toy@v1"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["metric", "recorded", "now", "equal"]
    assert [line.split()[-1] for line in lines] == ["yes", "yes"]


def test_evaluate_fails_when_a_score_differs(monkeypatch, capsys):
    scores = [Score("accuracy", 0.5, 0.5), Score("f1", 0.5, 0.5000001)]
    monkeypatch.setattr(scoring, "rescore", lambda loaded: (scores, 20))
    assert main(["evaluate", "toy"]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[-1] for line in out.splitlines()] == ["equal", "yes", "no"]
    assert err == "toy: other scores than the run's: the data, libraries or hardware differ\n"


def test_evaluate_refuses_other_data_than_the_runs(monkeypatch, capsys):
    from peftkit.tasks.classification import Classification

    load = Classification.load

    def sample(self, tokenizer, *, seed):
        return replace(load(self, tokenizer, seed=seed), stand_in=True)

    monkeypatch.setattr(Classification, "load", sample)
    assert main(["evaluate", "toy"]) == 1
    said = capsys.readouterr().err
    assert said.endswith(
        "/data: the run was scored on the real data, found peftkit's sample; "
        "the scores cannot be compared\n"
    )


def test_evaluate_refuses_other_rows_than_the_runs(place, capsys):
    path = place / "data" / "validation.jsonl"
    before = path.read_text()
    path.write_text(before.replace("good", "very"))
    try:
        assert main(["evaluate", "toy"]) == 1
    finally:
        path.write_text(before)
    said = capsys.readouterr().err
    assert "/data: the run was scored on validation rows of digest sha256:" in said
    assert said.endswith("; the scores cannot be compared\n")


def test_predict_answers_with_a_label_and_its_probability(capsys):
    assert main(["predict", "toy", "good film", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["scores"].keys() == {"negative", "positive"}
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-6)
    assert answer["score"] == max(answer["scores"].values())
    assert main(["predict", "toy", "good film"]) == 0
    assert capsys.readouterr().out.split() == [answer["label"], f"{answer['score']:.4f}"]


def test_predict_wants_as_many_texts_as_the_task_reads(capsys):
    assert main(["predict", "toy", "one", "two"]) == 2
    said = capsys.readouterr().err
    assert said == "predict: expected as many texts as it reads, 1 (sentence); 2 found\n"


def test_predict_refuses_a_task_that_answers_no_texts(monkeypatch, capsys):
    from peftkit.tasks.classification import Classification

    monkeypatch.delattr(Classification, "encode")
    assert main(["predict", "toy", "one"]) == 2
    assert capsys.readouterr().err == "predict: task 'classification' answers no texts\n"


@pytest.mark.parametrize("verb", [["evaluate", "nope"], ["predict", "nope", "a text"]])
def test_an_unknown_delta_is_one_line(verb, capsys):
    assert main(verb) == 1
    assert capsys.readouterr() == ("", "registry: no delta 'nope'; Choices: toy\n")


def test_a_score_that_is_no_number_equals_itself():
    assert Score("f1", None, None).equal
    assert not Score("f1", None, 0.1).equal
