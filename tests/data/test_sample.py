"""The built-in sample: repeatable, balanced, free of leaks, and hard for a bag of words."""

import re
import subprocess
import sys
import time

import pytest

from peftkit.data import sample
from peftkit.data.sample import make_sample, sample_dataset
from peftkit.data.splits import normalised, rows_digest
from peftkit.errors import SourceError

DIGESTS = {
    "train": "sha256:017412a5a1339625174190dd9f79819c391ff623e785481787fea1190cea0bed",
    "validation": "sha256:1dbfcdebad988707eb1b7a67798feb94e06408faa4f593cd845e80fedbbce771",
}


@pytest.fixture(scope="module")
def reviews():
    return make_sample("reviews")


@pytest.fixture(scope="module")
def truth():
    """The same sentences with no label flipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "_FLIPPED_SHARE", 0.0)
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


def test_a_bag_of_words_gets_about_three_of_four_right(reviews):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer()
    texts = {split: [row["sentence"] for row in rows] for split, rows in reviews.items()}
    labels = {split: [row["label"] for row in rows] for split, rows in reviews.items()}
    model = LogisticRegression(max_iter=1000)
    model.fit(words.fit_transform(texts["train"]), labels["train"])
    accuracy = model.score(words.transform(texts["validation"]), labels["validation"])
    assert 0.68 <= accuracy <= 0.8


def test_validation_uses_words_that_train_never_holds(reviews):
    words = {
        split: [set(re.findall(r"[\w-]+", row["sentence"].lower())) for row in rows]
        for split, rows in reviews.items()
    }
    known = set().union(*words["train"])
    new = [found - known for found in words["validation"]]
    assert len(set().union(*new)) >= 100
    assert 0.35 <= sum(map(bool, new)) / len(new) <= 0.65


def test_four_percent_of_the_labels_are_flipped_as_many_of_each(reviews, truth):
    for split, flips in (("train", 160), ("validation", 32)):
        pairs = list(zip(reviews[split], truth[split], strict=True))
        assert all(given["sentence"] == true["sentence"] for given, true in pairs)
        flipped = [true["label"] for given, true in pairs if given["label"] != true["label"]]
        assert (len(flipped), sum(flipped)) == (flips, flips // 2)


@pytest.mark.parametrize(
    ("pattern", "reverses"),
    [
        (r"^The NOUN was WORD\.$", False),
        (r"^The NOUN was (?:not|never|hardly) WORD\.$", True),
        (r"^The NOUN was nothing if not WORD\.$", False),
        (r"^The NOUN was neither WORD nor \w+\.$", True),
        (r"^The NOUN was not only WORD but also \w+\.$", False),
        (r"the NOUN was less WORD than I had", True),
        (r"the NOUN was just as WORD as I had", False),
        (r"expected the NOUN to be WORD, which it was not", True),
        (r"expected the NOUN to be WORD, which it was\.", False),
        (r"called the NOUN WORD, and I disagree", True),
        (r"called the NOUN WORD, and I agree", False),
        (r"unlike me, [a-z ]+ thought that the NOUN was WORD", True),
        (r"the NOUN used to be WORD, but that has changed", True),
        (r"the NOUN used to be WORD, and that has not changed", False),
        (r"^(?:I doubt|It is not true) that the NOUN (?:was|felt|turned out to be) WORD\.$", True),
        (r"^Although the NOUN (?:was|felt \w+|turned out to be) WORD, ", True),
        (r"^The NOUN (?:was|felt \w+|turned out to be) WORD, but the ", True),
        (r", but the NOUN (?:was|felt \w+|turned out to be) WORD\.$", False),
    ],
)
def test_labels_follow_the_composition(truth, pattern, reverses):
    choices = {1: sample._ANY_GOOD, 0: sample._ANY_BAD}
    found = set()
    for polarity, words in choices.items():
        word = f"(?:{words.replace('||', '|')})"
        known = re.compile(pattern.replace("WORD", word).replace("NOUN", r"\w+(?: \w+)?"), re.I)
        found |= {
            polarity != row["label"] for row in truth["train"] if known.search(row["sentence"])
        }
    assert found == {reverses}


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
