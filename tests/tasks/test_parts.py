import pytest
from transformers import PythonBackend

from peftkit.data.splits import rows_digest
from peftkit.errors import DataError
from peftkit.tasks.encoding import tokenise
from peftkit.tasks.parts import separate, tokenise_parts


def rows(*texts):
    return [{"texts": [text], "label": i % 2, "source_row": i} for i, text in enumerate(texts)]


def cut(train, validation, *, max_train=None, holdout_fraction=0.0, seed=0):
    return separate(
        train,
        validation,
        max_train=max_train,
        holdout_fraction=holdout_fraction,
        seed=seed,
    )


def texts(part):
    return [row["texts"][0] for row in part]


def test_training_rows_equal_to_a_validation_row_are_removed_and_counted():
    parts, counts = cut(rows("A  film", "b", "ｃ", "d"), rows("a film", "C", "", "x"))
    assert texts(parts["train"]) == ["b", "d"]
    assert texts(parts["validation"]) == ["a film", "C", "", "x"]
    assert "holdout" not in parts
    assert counts == {"removed_from_train": 2, "left_out_of_train": 0, "empty_texts": 1}


def test_no_text_is_in_two_parts():
    train = rows(*(f"text {i % 50}" for i in range(200)))
    parts, _ = cut(train, rows("text 3", "TEXT 4"), holdout_fraction=0.2, seed=5)
    seen = [set(map(str.lower, texts(part))) for part in parts.values()]
    assert len(parts) == 3
    assert sum(map(len, seen)) == len(set.union(*seen)) == 50


def test_the_subset_is_seeded_drawn_after_cleaning_and_keeps_its_order():
    train = rows(*(f"text {i:03}" for i in range(100)))
    validation = rows(*(f"text {i:03}" for i in range(90)))
    parts, counts = cut(train, validation, max_train=4, seed=1)
    chosen = texts(parts["train"])
    assert len(chosen) == 4
    assert chosen == sorted(chosen)
    assert min(chosen) >= "text 090"
    assert counts["left_out_of_train"] == 6
    assert chosen == texts(cut(train, validation, max_train=4, seed=1)[0]["train"])
    assert any(texts(cut(train, [], max_train=4, seed=s)[0]["train"]) != chosen for s in (2, 3))


def test_tokenised_rows_know_their_place_in_the_source_and_digests_do_not():
    parts, _ = cut(rows("a", "b", "c", "d"), rows("b"), max_train=2, seed=1)
    ready, _ = tokenise_parts(SlowTokenizer(pad_token="~"), parts, max_length=8)
    places = [row["source_row"] for row in ready["train"].rows]
    assert [["a", "b", "c", "d"][place] for place in places] == texts(parts["train"])
    bare = [{"texts": row["texts"], "label": row["label"]} for row in parts["train"]]
    assert ready["train"].digest == rows_digest(bare)


def test_a_train_split_that_is_the_validation_split_is_refused():
    with pytest.raises(DataError) as caught:
        cut(rows("a", "b"), rows("b", "A"))
    assert caught.value.problems == [
        "each of the 2 training rows is a validation row too; nothing is left to train on, "
        "check the splits"
    ]


class SlowTokenizer(PythonBackend):
    """Letters to ids, in Python: it does not say what it cut."""

    vocab_size = 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)


def test_a_slow_tokeniser_counts_what_it_cut():
    tokenizer = SlowTokenizer(pad_token="a", model_max_length=9)
    found, cut_rows = tokenise(tokenizer, [["bcd"], ["bcde"], ["b"]], max_length=3)
    assert [len(row["input_ids"]) for row in found] == [3, 3, 1]
    assert cut_rows == 1
