import pytest
from pydantic import ValidationError

from peftkit.tasks.classification import ClassificationConfig

FIELDS = {"type": "classification", "dataset": "d", "text_columns": ["a"]}


def errors_of(**changes):
    with pytest.raises(ValidationError) as caught:
        ClassificationConfig(**FIELDS | changes)
    return [
        (".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, "))
        for error in caught.value.errors()
    ]


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        (
            {"validation_split": "train"},
            "validation_split",
            "evaluating on the training split 'train'; name another split",
        ),
        (
            {"train_split": "validation"},
            "validation_split",
            "evaluating on the training split 'validation'; name another split",
        ),
        (
            {"text_columns": ["a", "a"]},
            "text_columns",
            "column 'a' is named twice; name two different columns",
        ),
        (
            {"text_columns": ["label"]},
            "label_column",
            "column 'label' is a text column; name the column of the label",
        ),
        ({"labels": ["x", "y", "x"]}, "labels", "each name stands once, found twice: x"),
        ({"metrics": ["f1", "f1"]}, "metrics", "each name stands once, found twice: f1"),
        (
            {"problem": "regression", "labels": ["x", "y"]},
            "problem",
            "a regression has no labels; leave `labels` out",
        ),
        (
            {"problem": "regression", "metrics": ["accuracy"]},
            "metrics",
            "'accuracy' scores classes and the problem is a regression; "
            "choose from mae, mse, pearsonr, spearmanr",
        ),
        (
            {"labels": ["x", "y", "z"], "metrics": ["f1"]},
            "metrics",
            "'f1' is that of class 1 of two and there are 3 labels; "
            "use accuracy, f1_macro or matthews_correlation",
        ),
        (
            {"offline": "sample:revews"},
            "offline",
            "sample:revews: unknown sample, did you mean 'reviews'? Choices: reviews",
        ),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(changes, key, problem):
    assert errors_of(**changes) == [(key, problem)]


@pytest.mark.parametrize(
    "changes",
    [
        {"text_columns": []},
        {"text_columns": ["a", "b", "c"]},
        {"labels": ["x"]},
        {"metrics": []},
        {"max_length": 0},
        {"max_length": "128"},
        {"holdout_fraction": 1.0},
        {"holdout_fraction": -0.1},
        {"max_train_examples": 0},
        {"problem": "ranking"},
        {"sentence": "a"},
    ],
)
def test_a_value_out_of_range_is_refused(changes):
    assert [key.split(".")[0] for key, _ in errors_of(**changes)] == list(changes)


def test_an_integer_fraction_and_every_documented_field_are_accepted():
    assert ClassificationConfig(**FIELDS, holdout_fraction=0).holdout_fraction == 0.0
    schema = ClassificationConfig.model_json_schema()
    assert [key for key, entry in schema["properties"].items() if "description" not in entry] == []
