"""The guards that keep splits apart, each with a planted copy that it must find."""

import datetime
import random

import numpy as np
import pytest

from peftkit.data.splits import hold_out, normalised, remove_overlap, rows_digest
from peftkit.errors import DataError


def sentence(row):
    return row["sentence"]


def rows_of(count, prefix="row"):
    return [{"sentence": f"{prefix} number {i}", "label": i % 2} for i in range(count)]


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


def disguise(text, rng):
    wide = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in "aeiou"})
    forms = [
        str.upper,
        str.title,
        lambda t: f"  {t}\n",
        lambda t: t.replace(" ", "\u00a0 \t"),
        lambda t: t.translate(wide),
    ]
    return rng.choice(forms)(text)


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


def test_hold_out_parts_are_disjoint_complete_and_of_the_asked_size():
    train, held = hold_out(rows_of(1000), 0.1, 7)
    assert len(held) == 100
    assert sorted(train + held) == list(range(1000))
    assert train == sorted(train)
    assert held == sorted(held)


def test_hold_out_repeats_by_seed_and_is_no_slice():
    rows = rows_of(300)
    assert hold_out(rows, 0.2, 1) == hold_out(rows, 0.2, 1)
    assert hold_out(rows, 0.2, 1) != hold_out(rows, 0.2, 2)
    assert hold_out(rows, 0.2, 1)[1] != list(range(60))


@pytest.mark.parametrize("seed", range(10))
def test_hold_out_never_splits_copies(seed):
    rng = random.Random(seed)
    rows = rows_of(60) * 3
    rows = [{**row, "sentence": disguise(row["sentence"], rng)} for row in rows]
    train, held = hold_out(rows, 0.25, seed, key=sentence)
    assert len(held) == 45
    sides = [{normalised(rows[i]["sentence"]) for i in side} for side in (train, held)]
    assert not sides[0] & sides[1]


def test_hold_out_takes_all_texts_of_a_row_without_a_key():
    rows = [{"a": "x", "b": "y", "label": 0}, {"b": "Y", "a": "X ", "label": 1}] * 5
    rows += [{"a": f"other {i}", "b": "y", "label": 0} for i in range(10)]
    for seed in range(10):
        _, held = hold_out(rows, 0.5, seed)
        assert len([i for i in held if i < 10]) in (0, 10)


def test_no_fraction_holds_nothing_out():
    assert hold_out(rows_of(4), 0.0, 1) == ([0, 1, 2, 3], [])


def test_a_small_fraction_still_holds_one_row_out():
    assert len(hold_out(rows_of(10), 0.001, 1)[1]) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(DataError) as error:
        hold_out(rows_of(4), fraction, 1)
    expected = f"holdout fraction: {fraction} is not in the range 0 <= fraction < 1"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("rows", "texts"),
    [(rows_of(1), 1), (rows_of(1) * 6, 1), ([], 0)],
    ids=["one", "copies", "none"],
)
def test_a_part_without_rows_is_refused(rows, texts):
    with pytest.raises(DataError) as error:
        hold_out(rows, 0.5, 1)
    assert str(error.value) == (
        f"holdout fraction: 0.5 of {len(rows)} rows ({texts} different texts) leaves one side "
        "empty; use another fraction or more rows"
    )


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
