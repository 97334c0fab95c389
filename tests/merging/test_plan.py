"""What is wrong with a plan is told with its place, all of it at once, before anything loads."""

import pytest

from peftkit.errors import UsageError
from peftkit.merging.plan import ON_FACTORS, averages, load_plan, plan_from, prunes

CHOICES = (
    "cat, dare_linear, dare_linear_svd, dare_ties, dare_ties_svd, linear, magnitude_prune, "
    "magnitude_prune_svd, svd, ties, ties_svd"
)
PRUNING = (
    "dare_linear, dare_linear_svd, dare_ties, dare_ties_svd, magnitude_prune, "
    "magnitude_prune_svd, ties, ties_svd"
)
GOOD_NAME = (
    "expected 1 to 63 characters of a-z, 0-9, '.', '_' and '-', the first a letter or a digit, "
    "such as 'reviews-lora'"
)


def told(text, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_plan(path)
    assert caught.value.exit_code == 2
    return [line.removeprefix(f"{path}") for line in caught.value.problems]


def refused(names, weights=(), **options):
    with pytest.raises(UsageError) as caught:
        plan_from(names, weights, {"save_as": "all"} | options)
    return caught.value.problems


def test_a_file_and_the_words_of_a_command_give_the_same_plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "save_as: all\ncombine: dare_ties_svd\ndensity: 0.5\nrank: 4\nseed: 7\nhead_from: a\n"
        "deltas:\n  - {name: a, weight: 1}\n  - {name: b@v2, weight: -0.5}\n"
    )
    options = {"combine": "dare_ties_svd", "density": 0.5, "rank": 4, "seed": 7, "head_from": "a"}
    words = plan_from(["a", "b@v2"], [1, -0.5], {"save_as": "all", **options})
    assert load_plan(path) == words
    assert words.weights("dare_ties_svd") == [1, -0.5]


def test_every_problem_of_a_file_is_told_with_its_line(tmp_path):
    text = (
        "save_as: All\ncombine: svdd\ndensity: 0\nranck: 4\ndeltas:\n  - {name: a, weight: .nan}\n"
        '  - {name: ../b, wieght: 3}\n  - {weight: "1"}\nhead_from: q\nseed: -1\n'
    )
    assert told(text, tmp_path) == [
        f":1: save_as: 'All': {GOOD_NAME}",
        f":2: combine: 'svdd' is unknown; did you mean 'svd'? Choices: {CHOICES}",
        ":3: density: must be greater than 0, found 0 (number)",
        ":4: ranck: unknown key; did you mean 'rank'? Choices: combine, deltas, density, "
        "head_from, rank, save_as, seed",
        ":6: deltas.0.weight: must be a finite number, found NaN (number)",
        f":7: deltas.1.name: delta name '../b': {GOOD_NAME}",
        ":7: deltas.1.wieght: unknown key; did you mean 'weight'? Choices: name, weight",
        ":8: deltas.2.name: missing key",
        ':8: deltas.2.weight: must be a valid number, found "1" (text)',
        ":10: seed: must be greater than or equal to 0, found -1 (number)",
    ]


def test_files_that_are_no_plan(tmp_path):
    assert told("[]\n", tmp_path) == [": must be a mapping with the keys save_as and deltas"]
    assert told("{}\n", tmp_path) == [":1: deltas: missing key", ":1: save_as: missing key"]
    assert told("a: 1\na: 2\n", tmp_path) == [":2: a: duplicate key, first on line 1"]
    assert told("save_as: x\ndeltas: 3\n", tmp_path) == [
        ":2: deltas: must be a valid list, found 3 (number)"
    ]
    with pytest.raises(UsageError, match=r"nope\.yaml: cannot be read: No such file or directory"):
        load_plan(tmp_path / "nope.yaml")


def test_weights_for_some_deltas_only(tmp_path):
    text = "save_as: x\ndeltas:\n  - {name: a, weight: 1}\n  - {name: b}\n"
    line = ":2: deltas: 1 of 2 have a weight; give one to all or to none"
    assert told(text, tmp_path) == [line]


def test_every_problem_of_a_command_is_told():
    options = {"combine": "tise", "density": 1.5, "rank": 0, "head_from": "d"}
    assert refused(["a", "b", "c"], [0.5, float("nan")], **options) == [
        "merge: weights: 2 for 3 deltas; give one to each",
        "merge: weights: must be finite numbers, found nan",
        f"merge: combine: 'tise' is unknown; did you mean 'ties'? Choices: {CHOICES}",
        "merge: density: must be less than or equal to 1, found 1.5 (number)",
        "merge: head_from: 'd' is none of the deltas; Choices: a, b, c",
        "merge: rank: must be greater than 0, found 0 (number)",
    ]


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_density_is_a_share(density):
    (line,) = refused(["a", "b"], combine="ties", density=density)
    assert line.startswith("merge: density: must be ")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_is_a_number(weight):
    assert refused(["a", "b"], [0.5, weight]) == [
        f"merge: weights: must be finite numbers, found {weight}"
    ]


def test_a_density_is_needed_where_values_are_pruned_and_only_there():
    alone = "merge: deltas: at least two are combined, found 1"
    for combine in ON_FACTORS:
        given = sorted({*refused(["a"], combine=combine, density=0.5)} - {alone})
        left_out = sorted({*refused(["a"], combine=combine)} - {alone})
        if prunes(combine):
            line = f"missing; '{combine}' keeps this share of the values: above 0, at most 1"
            assert (given, left_out) == ([], [f"merge: density: {line}"])
        else:
            line = f"leave it out, or combine by one of {PRUNING}"
            assert left_out == []
            assert given == [f"merge: density: '{combine}' prunes nothing; {line}"]
    line = f"the default prunes nothing; leave it out, or combine by one of {PRUNING}"
    assert refused(["a", "b"], density=0.5) == [f"merge: density: {line}"]


def test_a_rank_is_taken_where_there_is_one_to_choose():
    others = "dare_linear_svd, dare_ties_svd, magnitude_prune_svd, svd, ties_svd"
    line = f"has no rank to choose; leave it out, or combine by one of {others}"
    assert refused(["a", "b"], combine="cat", rank=4) == [f"merge: rank: 'cat' {line}"]
    assert refused(["a", "b"], rank=4) == [f"merge: rank: the default {line}"]
    assert plan_from(["a", "b"], [], {"save_as": "x", "combine": "svd", "rank": 4}).rank == 4


def test_two_deltas_are_the_least_and_each_is_named_once():
    assert refused(["a"]) == ["merge: deltas: at least two are combined, found 1"]
    assert refused(["a", "b", "a"]) == ["merge: deltas: a: named more than once"]


def test_without_weights_the_result_is_an_average():
    plan = plan_from(["a", "b", "c", "d"], [], {"save_as": "x"})
    for combine in ON_FACTORS:
        # PEFT's TIES divides by the number of deltas that agree.
        assert plan.weights(combine) == [1.0 if averages(combine) else 0.25] * 4
