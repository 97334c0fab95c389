import math

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from peftkit.tasks.columns import Columns, parse


def split(labels, texts=None, names=None):
    texts = texts or [f"text {i}" for i in range(len(labels))]
    kind = Features({"text": Value("string"), "label": ClassLabel(names=names)}) if names else None
    return Dataset.from_dict({"text": texts, "label": labels}, features=kind)


def read(train, validation, *, labels=None, regression=False, texts=("text",)):
    columns = Columns(texts, "label", labels, regression)
    return parse({"train": train, "validation": validation}, columns)


def ids(parsed, name="train"):
    assert parsed.problems == []
    return [row["label"] for row in parsed.rows[name]]


def test_a_class_label_gives_names_in_its_own_order():
    parsed = read(split([1, 0], names=["zebra", "ant"]), split([0], names=["zebra", "ant"]))
    assert ids(parsed) == [1, 0]
    assert parsed.label_names == ["zebra", "ant"]


def test_integers_without_names_become_classes_in_ascending_order():
    parsed = read(split([3, 1, 3]), split([1]))
    assert ids(parsed) == [1, 0, 1]
    assert parsed.label_names == ["LABEL_1", "LABEL_3"]


@pytest.mark.parametrize("values", [[1, 0], ["b", "a"], [True, False]])
def test_given_names_map_strings_and_number_integers(values):
    parsed = read(split(values), split(values), labels=["a", "b"])
    assert ids(parsed) == ids(parsed, "validation") == [1, 0]
    assert parsed.label_names == ["a", "b"]


def test_given_names_may_rename_a_class_label_but_not_reorder_it():
    data = split([1, 0], names=["neg", "pos"])
    assert read(data, data, labels=["bad", "good"]).label_names == ["bad", "good"]
    for labels in (["pos", "neg"], ["neg", "pos", "mixed"]):
        assert read(data, data, labels=labels).problems == [
            f"labels: {', '.join(labels)}, but the ids of column 'label' stand for neg, pos; "
            "give as many labels in that order, or leave `labels` out"
        ]


def test_splits_that_order_their_labels_unlike_are_refused():
    parsed = read(split([0, 1], names=["a", "b"]), split([0, 1], names=["b", "a"]))
    assert parsed.problems == ["column 'label': the splits order or name their labels unlike"]


def test_labels_outside_the_map_are_counted_each():
    parsed = read(split([0, 1]), split([0, 5, -1, 5]))
    assert parsed.problems == [
        "validation: column 'label': 5 in 2 rows, first in row 1, is not a label; labels are 0, 1",
        "validation: column 'label': -1 in 1 row, first in row 2, is not a label; labels are 0, 1 "
        "(-1 is often a hidden label)",
    ]
    many = read(split([0, 1]), split(list(range(10))))
    assert len(many.problems) == 6
    assert many.problems[-1] == (
        "validation: column 'label': and 3 more values that are not labels"
    )


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["pos", "neg"], "labels are strings; list them in `labels`, in id order: neg, pos"),
        (
            [0.0, 0.5],
            "labels are integers or strings, found 0.0 in row 0; "
            "set `problem: regression` if they are numbers to predict",
        ),
        (
            [0, None, 1, None],
            "2 rows without a label, the first is row 1",
        ),
        ([1, 1], "every label is 1; two labels at least are needed"),
    ],
)
def test_labels_that_settle_no_map_are_refused(labels, problem):
    assert read(split(labels), split([0, 1])).problems == [f"train: column 'label': {problem}"]


def test_a_label_that_is_a_list_is_named_and_not_hashed():
    parsed = read(split([[0], [1]]), split([[0], [0]]), labels=["a", "b"])
    assert parsed.problems[0] == (
        "train: column 'label': [0] in 1 row, first in row 0, is not a label; labels are a, b, 0, 1"
    )


def test_regression_labels_are_finite_numbers():
    assert ids(read(split([1, 2]), split([0.5]), regression=True)) == [1.0, 2.0]
    for values, shown in (([1.0, math.nan, None], "nan"), (["1.5", "x", "y"], "'1.5'")):
        problem = read(split(values), split([0.5]), regression=True).problems[0]
        count, row = (2, 1) if shown == "nan" else (3, 0)
        assert problem == (
            f"train: column 'label': {count} rows without a finite number, the first is row {row} "
            f"with {shown}; a regression needs a number in every row"
        )


def test_missing_columns_and_empty_splits_are_named_together():
    train = Dataset.from_dict({"text": ["a"], "labels": [1]})
    parsed = read(train, split([]), texts=["txt", "text"])
    assert parsed.problems == [
        "train: no column 'txt'; did you mean 'text'? Choices: labels, text",
        "train: no column 'label'; did you mean 'labels'? Choices: labels, text",
        "validation: the split has no rows",
    ]
    assert parsed.rows == {}


def test_empty_texts_are_kept_unless_all_are():
    parsed = read(split([0, 1, 0], [None, " ", "a"]), split([0]))
    assert [row["texts"] for row in parsed.rows["train"]] == [[""], [" "], ["a"]]
    assert read(split([0, 1]), split([0, 1], [None, "\t"])).problems == [
        "validation: column 'text': all 2 texts are empty"
    ]


def test_texts_that_are_no_strings_are_refused():
    parsed = read(split([0, 1], [4, 5]), split([0]))
    assert parsed.problems == [
        "train: column 'text': 2 rows without text, the first is row 0 with int 4; "
        "a text column holds strings"
    ]
