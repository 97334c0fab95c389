"""The task contract, which every built-in task must keep, and classification's own behaviour."""

import importlib
import json
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peftkit.contracts import LabelKind
from peftkit.errors import DataError
from peftkit.plugins import BUILTIN
from peftkit.tasks.classification import Classification, ClassificationConfig

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "good", "bad", "film"]


def make_tokenizer(*, special=True, pad="[PAD]", side="right", limit=128):
    """One id a word; with `special`, [CLS] … [SEP] and segment ids, as BERT has them."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inputs = ["input_ids", *(["token_type_ids"] if special else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token="[SEP]",
        padding_side=side,
        model_max_length=limit,
        model_input_names=inputs,
    )


def ids(words):
    return [4 + WORDS.index(word) for word in words.split()]


def write(folder, **splits):
    for name, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def reviews(count, *, start=0):
    letters = "abcdefgh"
    texts = [f"{letters[i % 8]} {letters[i // 8 % 8]} film" for i in range(start, start + count)]
    return [{"sentence": text, "label": i % 2} for i, text in enumerate(texts)]


def make(dataset, **changes):
    fields = {
        "type": "classification",
        "dataset": dataset,
        "text_columns": ["sentence"],
        "holdout_fraction": 0.0,
    }
    return Classification(ClassificationConfig(**fields | changes))


def tiny_model(kind, options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        **{key: value for key, value in options.items() if key != "auto_class"},
    )
    return getattr(transformers, options["auto_class"]).from_config(config).eval()


def problems_of(task, tokenizer=None):
    with pytest.raises(DataError) as caught:
        task.load(tokenizer or make_tokenizer(), seed=0)
    return caught.value.problems


@pytest.fixture
def data(tmp_path):
    return write(tmp_path, train=reviews(20), validation=reviews(6, start=40))


# The contract: a task of another type adds its section here.
SECTIONS = {
    "classification": {
        "type": "classification",
        "text_columns": ["sentence"],
        "holdout_fraction": 0.2,
    },
    "sft": {
        "type": "sft",
        "prompt": "good {sentence}",
        "completion": "{label} {sentence}",
        "holdout_fraction": 0.2,
        "max_length": 64,
    },
}
KINDS = {"classification": "bert", "sft": "llama"}
"""Of the model that a task is for."""


@pytest.mark.parametrize("name", BUILTIN["tasks"])
def test_every_task_keeps_the_contract(name, data):
    module, _, attribute = BUILTIN["tasks"][name].partition(":")
    task_class = getattr(importlib.import_module(module), attribute)
    task = task_class(task_class.Config(dataset=data, **SECTIONS[name]))
    found = task.load(make_tokenizer(), seed=1)
    again = task_class(task.config).load(make_tokenizer(), seed=1)
    assert found == again
    assert found.train.digest.startswith("sha256:")
    assert found.holdout.digest not in (found.train.digest, found.validation.digest)
    assert found.origin == "path"
    assert not found.stand_in

    batch = task.collate(found.validation.rows[:4])
    shape = (4, max(found.validation.lengths[:4]))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == shape
    options = task.model_options(found)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    outputs = tiny_model(KINDS[name], options)(**inputs)
    loss = task.loss(outputs, batch["labels"])
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert task.loss_items(batch["labels"]) > 0
    columns = {k: v.detach() for k, v in task.predictions(outputs, batch["labels"]).items()}
    assert "loss" in columns
    assert task.label_kind in get_args(LabelKind)
    assert (batch["labels"].shape == shape) is (task.label_kind == "tokens")
    assert {len(column) for column in columns.values()} == {4}
    assert torch.allclose(columns["loss"].sum(), loss)
    scores = task.metrics({key: value.numpy() for key, value in columns.items()})
    assert list(scores) == task.metric_names
    assert all(isinstance(value, float) for value in scores.values())


def test_rows_hold_ids_segments_and_label_without_padding(data):
    found = make(data).load(make_tokenizer(), seed=0)
    assert found.holdout is None
    assert found.train.rows[1] == {
        "input_ids": [2, *ids("b a film"), 3],
        "token_type_ids": [0] * 5,
        "label": 1,
        "source_row": 1,
    }
    assert found.label_names == ["LABEL_0", "LABEL_1"]
    assert found.validation.lengths == [5] * 6


def test_new_texts_are_encoded_as_in_training_and_collate_in_a_fresh_task(data):
    found = make(data).load(make_tokenizer(), seed=0)
    fresh = make(data)
    rows = fresh.encode(make_tokenizer(), [[row["sentence"]] for row in reviews(20)])
    trained = [{key: row[key] for key in rows[0]} for row in found.train.rows]
    assert rows == trained
    assert "labels" not in fresh.collate(rows)
    assert fresh.encode(make_tokenizer(), []) == []


def test_encode_refuses_another_number_of_texts(data):
    with pytest.raises(DataError) as caught:
        make(data).encode(make_tokenizer(), ["a", ["a", "b"], ["a"], [None]])
    assert caught.value.problems == [
        "text 0: expected a list of 1 strings (sentence), found 'a'",
        "text 1: expected a list of 1 strings (sentence), found ['a', 'b']",
        "text 3: expected a list of 1 strings (sentence), found [None]",
    ]


def test_a_pair_is_one_row_with_segments_and_is_cut_to_max_length(tmp_path):
    rows = [{"one": "a b c d", "two": f"{x} b c d", "label": i} for i, x in enumerate("ab")]
    rows.append({"one": "a", "two": "b", "label": 0})
    dataset = write(tmp_path, train=rows, validation=[{"one": "g", "two": "h", "label": 1}])
    task = make(dataset, text_columns=["one", "two"], max_length=7)
    found = task.load(make_tokenizer(), seed=0)
    assert found.train.rows[2]["input_ids"] == [2, *ids("a"), 3, *ids("b"), 3]
    assert found.train.rows[2]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert found.train.lengths == [7, 7, 5]
    assert found.cleaning["truncated"] == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_on_the_side_of_the_tokeniser(data, side):
    task = make(data)
    batch = task.collate(task.encode(make_tokenizer(side=side), [["a b"], ["c"]]))
    pad = [[0, 2, *ids("c"), 3]] if side == "left" else [[2, *ids("c"), 3, 0]]
    assert batch["input_ids"].tolist() == [[2, *ids("a b"), 3], *pad]
    assert batch["attention_mask"].tolist()[1] == [int(token != 0) for token in pad[0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_decoder_without_pad_token_pads_with_eos_and_batches_change_nothing(data):
    tokenizer, task = make_tokenizer(special=False, pad=None), make(data)
    options = task.model_options(task.load(tokenizer, seed=0))
    assert options["pad_token_id"] == tokenizer.eos_token_id == 3
    model = tiny_model("llama", options)
    rows = task.encode(tokenizer, [["a b c d e"], ["good film"], [""]])
    together = model(**task.collate(rows)).logits
    alone = torch.cat([model(**task.collate([row])).logits for row in rows])
    assert (together - alone).abs().max() <= 1e-6


def test_an_empty_text_of_a_decoder_still_has_a_token(data):
    task = make(data)
    assert task.encode(make_tokenizer(special=False), [[""]]) == [{"input_ids": [0]}]


def test_class_loss_is_a_sum_in_float32_with_label_smoothing(data):
    logits = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.bfloat16)
    labels = torch.tensor([0, 0])
    log_probabilities = logits.float().log_softmax(-1)
    plain = -log_probabilities[:, 0].sum()
    smooth = 0.8 * plain + 0.2 * -log_probabilities.mean(-1).sum()
    task, outputs = make(data), SimpleNamespace(logits=logits)
    assert torch.allclose(task.loss(outputs, labels), plain)
    assert torch.allclose(task.loss(outputs, labels, label_smoothing=0.2), smooth)
    assert task.loss_items(labels) == 2
    assert task.predictions(outputs, labels)["prediction"].tolist() == [0, 1]


def test_a_regression_predicts_one_number(tmp_path):
    rows = [{"sentence": text, "label": value} for text, value in [("a", 0.5), ("b", 2), ("c", 3)]]
    dataset = write(tmp_path, train=rows, validation=[{"sentence": "d", "label": 1.5}])
    task = make(dataset, problem="regression")
    found = task.load(make_tokenizer(), seed=0)
    assert found.label_names is None
    assert task.metric_names == ["pearsonr", "spearmanr"]
    options = task.model_options(found)
    assert (options["num_labels"], options["problem_type"]) == (1, "regression")
    batch = task.collate(found.train.rows)
    assert batch["labels"].dtype == torch.float32
    outputs = SimpleNamespace(logits=torch.tensor([[1.0], [2.0], [5.0]]))
    assert task.loss(outputs, batch["labels"]).item() == pytest.approx(0.25 + 0 + 4)
    columns = task.predictions(outputs, batch["labels"])
    assert columns["prediction"].tolist() == [1.0, 2.0, 5.0]
    assert columns["logits"].shape == (3, 1)
    with pytest.raises(DataError) as caught:
        task.loss(outputs, batch["labels"], label_smoothing=0.1)
    assert caught.value.problems == [
        "label_smoothing: a regression has no labels to smooth; set it to 0"
    ]


def test_metrics_are_those_of_glue_unless_named(data):
    columns = {"prediction": np.array([0, 1, 1]), "label": np.array([0, 1, 0])}
    glue = make("nyu-mll/glue", dataset_config="mrpc")
    assert list(glue.metrics(columns)) == ["accuracy", "f1"]
    named = make("nyu-mll/glue", dataset_config="mrpc", metrics=["f1_macro"])
    assert named.metric_names == ["f1_macro"]
    assert make(data).metric_names == ["accuracy"]


def test_model_options_name_the_labels(tmp_path):
    rows = [{"sentence": "a", "label": "no"}, {"sentence": "b", "label": "yes"}]
    dataset = write(tmp_path, train=rows, validation=[{"sentence": "c", "label": "yes"}])
    task = make(dataset, labels=["yes", "no"])
    found = task.load(make_tokenizer(), seed=0)
    assert [row["label"] for row in found.train.rows] == [1, 0]
    assert task.model_options(found) == {
        "auto_class": "AutoModelForSequenceClassification",
        "pad_token_id": 0,
        "num_labels": 2,
        "id2label": {0: "yes", 1: "no"},
        "label2id": {"yes": 0, "no": 1},
        "problem_type": "single_label_classification",
    }


def test_problems_of_rows_lengths_and_metrics_come_all_at_once(tmp_path):
    rows = [{"sentence": "a", "label": i} for i in range(3)]
    dataset = write(tmp_path, train=rows, validation=[{"sentence": "b", "label": 7}])
    task = make(dataset, metrics=["f1"], max_length=129)
    assert problems_of(task) == [
        "validation: column 'label': 7 in 1 row, first in row 0, is not a label; "
        "labels are 0, 1, 2",
        "max_length: 129 is over the tokeniser's limit; at most 128",
        "metrics: 'f1' is that of class 1 of two and there are 3 labels; "
        "use accuracy, f1_macro or matthews_correlation",
    ]


def test_a_length_without_room_for_text_and_a_tokeniser_without_padding_are_refused(data):
    tokenizer = make_tokenizer(pad=None)
    tokenizer.eos_token = None
    assert problems_of(make(data, max_length=2), tokenizer) == [
        "max_length: 2 leaves no room for text; the tokeniser adds 2 special tokens to each "
        "example",
        "tokeniser: it has no pad token, and no eos token to pad with instead",
    ]


def test_a_split_of_which_every_text_is_cut_is_refused(data):
    assert problems_of(make(data, max_length=4)) == [
        f"{name}: each of the {count} examples is longer than max_length 4; "
        "raise it or shorten the texts"
        for name, count in (("train", 20), ("validation", 6))
    ]


def test_a_sample_says_that_it_stands_in():
    task = make("no/such-data", offline="sample:reviews", max_train_examples=30)
    found = task.load(make_tokenizer(), seed=0)
    assert (found.origin, found.stand_in, len(found.train.rows)) == ("sample", True, 30)
