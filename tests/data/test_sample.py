"""The built-in sample: repeatable, balanced, free of leaks, and hard for a bag of words."""

import subprocess
import sys
import time
from collections import Counter

import pytest

from peftkit.data.sample import make_sample, sample_dataset
from peftkit.data.splits import normalised, rows_digest
from peftkit.errors import SourceError

DIGESTS = {
    "train": "sha256:39c106feb9a55b45e55fba4035a22f07652e525d6b4b00ecc7b6d076a7368387",
    "validation": "sha256:ad7eeccb7f1d3e8758276e06c5f2c88dce291bdc669463abd32e091c8e35c90f",
}


@pytest.fixture(scope="module")
def reviews():
    return make_sample("reviews")


def test_the_sample_is_the_same_everywhere(reviews):
    assert {split: rows_digest(rows) for split, rows in reviews.items()} == DIGESTS


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_sample_does_not_depend_on_string_hashing(seed):
    code = (
        "from peftkit.data.sample import make_sample; from peftkit.data.splits import rows_digest;"
        "print(rows_digest(make_sample('reviews')['train']))"
    )
    command = [sys.executable, "-c", code]
    environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == DIGESTS["train"]


def test_splits_have_their_sizes_and_balanced_labels(reviews):
    assert {split: len(rows) for split, rows in reviews.items()} == {
        "train": 4000,
        "validation": 800,
    }
    for rows in reviews.values():
        assert sum(row["label"] for row in rows) * 2 == len(rows)
        assert {tuple(row) for row in rows} == {("sentence", "label")}


def test_no_sentence_stands_twice(reviews):
    texts = [normalised(row["sentence"]) for rows in reviews.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_a_bag_of_words_gets_about_four_of_five_right(reviews):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer()
    texts = {split: [row["sentence"] for row in rows] for split, rows in reviews.items()}
    labels = {split: [row["label"] for row in rows] for split, rows in reviews.items()}
    model = LogisticRegression(max_iter=1000)
    model.fit(words.fit_transform(texts["train"]), labels["train"])
    accuracy = model.score(words.transform(texts["validation"]), labels["validation"])
    assert 0.75 <= accuracy <= 0.88


def test_validation_uses_words_that_are_rare_in_train(reviews):
    shares = {
        split: Counter(word for row in rows for word in row["sentence"].split())
        for split, rows in reviews.items()
    }
    train, validation = shares["train"], shares["validation"]
    rarer = [
        word
        for word, count in validation.items()
        if count >= 8 and train[word] / train.total() < 0.7 * count / validation.total()
    ]
    assert len(rarer) >= 10


def test_making_it_takes_under_a_second():
    start = time.process_time()
    make_sample("reviews")
    assert time.process_time() - start < 1


def test_labels_carry_their_names():
    assert sample_dataset("reviews", "validation").features["label"].names == [
        "negative",
        "positive",
    ]


def test_an_unknown_sample_is_refused():
    with pytest.raises(SourceError) as error:
        make_sample("revews")
    assert str(error.value) == (
        "sample:revews: unknown sample, did you mean 'reviews'? Choices: reviews"
    )
