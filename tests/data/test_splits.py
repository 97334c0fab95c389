"""The guards that keep splits apart, each with a planted copy that it must find."""

import datetime
import random

import numpy as np
import pytest
from disguises import disguise, rows_of, sentence

from peftkit.data.splits import normalised, remove_overlap, rows_digest
from peftkit.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Great\t\nFILM ", "great film"),
        ("Ｇｒｅａｔ film", "great film"),
        ("STRASSE", normalised("straße")),
        ("ﬁne", "fine"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\u00a0b\u2003c", "a b c"),
        ("", ""),
    ],
)
def test_copies_normalise_to_one_text(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize("text", ["J\u030c", "ΐ", "ﬀﬃ", "Straße ̈", "İI"])
def test_normalising_twice_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)


def test_every_planted_copy_is_removed_and_nothing_else():
    rng = random.Random(1)
    validation = rows_of(200, "held")
    clean = rows_of(500)
    planted = [{**row, "sentence": disguise(row["sentence"], rng)} for row in validation]
    train = clean + planted
    rng.shuffle(train)
    kept, removed = remove_overlap(train, validation, sentence)
    assert removed == 200
    assert kept == [row for row in train if row in clean]


def test_a_pair_is_a_copy_only_if_both_texts_agree_in_order():
    def pair(row):
        return row["a"], row["b"]

    train = [
        {"a": "x", "b": "y"},
        {"a": "y", "b": "x"},
        {"a": "x y", "b": ""},
        {"a": "x", "b": "z"},
    ]
    kept, removed = remove_overlap(train, [{"a": "X ", "b": "y"}], pair)
    assert (kept, removed) == (train[1:], 1)


def test_the_digest_is_pinned():
    rows = [{"sentence": "é", "label": 1}, {"label": 0, "sentence": "b"}]
    assert rows_digest(rows) == (
        "sha256:2846a4d9ec0a7fb7736729ff58bdc9f3f52baf1b7cb9a5b5f0fa909b48c5e943"
    )


def test_the_digest_sees_rows_order_and_types_but_not_column_order():
    rows = rows_of(3)
    digest = rows_digest(rows)
    assert rows_digest([dict(reversed(row.items())) for row in rows]) == digest
    assert rows_digest(rows[::-1]) != digest
    assert rows_digest(rows[:2]) != digest
    assert rows_digest([{**row, "label": str(row["label"])} for row in rows]) != digest
    assert rows_digest([{**row, "sentence": row["sentence"] + " "} for row in rows]) != digest


def test_the_digest_does_not_depend_on_who_read_the_rows():
    plain = [{"label": 1, "scores": [1.5, 2.0], "day": "2020-01-02", "raw": "bytes:ff"}]
    day = datetime.date(2020, 1, 2)
    rich = [{"label": np.int64(1), "scores": np.array([1.5, 2.0]), "day": day, "raw": b"\xff"}]
    assert rows_digest(rich) == rows_digest(plain)


def test_a_value_without_a_digest_is_refused():
    with pytest.raises(DataError) as error:
        rows_digest([{"x": object()}])
    assert str(error.value) == "rows: a value of type object has no digest; use plain types"
