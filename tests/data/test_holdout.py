"""The held-out part: disjoint, seeded, and nothing of it left in train."""

import random

import pytest
from disguises import disguise, rows_of, sentence

from peftkit.data.holdout import hold_out
from peftkit.data.splits import normalised
from peftkit.errors import DataError


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


def phrases_of(sentences, rng):
    """Each sentence and some of its runs of words, shuffled, as SST-2 has them."""
    texts = []
    for words in sentences:
        texts.append(" ".join(words))
        for _ in range(8):
            start = rng.randrange(len(words))
            texts.append(" ".join(words[start : start + rng.randint(1, 6)]))
    rng.shuffle(texts)
    return [{"sentence": text} for text in texts]


def lies_within(part, whole):
    return f" {part} " in f" {whole} "


@pytest.mark.parametrize("seed", range(10))
def test_no_held_out_text_lies_within_a_training_text(seed):
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(40)]
    sentences = [rng.choices(vocabulary, k=rng.randint(2, 12)) for _ in range(60)]
    rows = phrases_of(sentences, rng)
    train, held = hold_out(rows, 0.2, seed, key=sentence)
    assert sorted(train + held) == list(range(len(rows)))
    assert 0.15 * len(rows) < len(held) <= 0.2 * len(rows)
    training = {rows[i]["sentence"] for i in train}
    for index in held:
        assert not any(lies_within(rows[index]["sentence"], text) for text in training)


def test_a_text_within_several_others_is_held_with_the_last_of_them():
    rows = [{"sentence": t} for t in ("a good film", "good", "good book", "x", "y", "z")]
    for seed in range(20):
        _, held = hold_out(rows, 0.5, seed, key=sentence)
        assert (1 in held) == (0 in held and 2 in held)


def test_words_are_compared_and_not_letters():
    rows = [{"sentence": t} for t in ("art", "a part of it", "art house", "of")]
    together = [{2, 0}, {1, 3}]
    for seed in range(20):
        _, held = hold_out(rows, 0.5, seed, key=sentence)
        assert set(held) in together


def test_pairs_are_compared_as_wholes():
    rows = [{"a": "a film", "b": "b"}, {"a": "film", "b": "b"}] * 2
    sides = {tuple(hold_out(rows, 0.5, seed)[1]) for seed in range(20)}
    assert sides == {(0, 2), (1, 3)}
