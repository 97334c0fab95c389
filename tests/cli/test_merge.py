"""`merge` folds one delta into its base or combines several, and says how near the result is."""

import json

import pytest
from stored_deltas import LORA, QLORA, store

from peftkit.cli import main
from peftkit.cli.merge import with_repeated_weights
from peftkit.registry.store import Registry


@pytest.fixture
def stored(base_of, workplace):
    registry = Registry(workplace / "registry")
    for seed, name in enumerate(("a", "b")):
        store(registry, base_of("bert"), name, LORA, seed=seed)
    return registry


def lines_of(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {key.strip(): value.strip() for key, value in (line.split("  ", 1) for line in lines)}


def test_one_delta_becomes_a_model_folder(stored, workplace, capsys):
    assert main(["merge", "a", "-o", "merged"]) == 0
    lines = lines_of(capsys)
    assert lines["written"] == "merged, from a@v1"
    assert lines["verified"].startswith("max |Δlogit| ")
    assert lines["verified"].endswith("top-1 100.0% against the trained model")
    assert (workplace / "merged" / "model.safetensors").is_file()
    assert main(["merge", "a", "-o", "again", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["folder"], found["delta"]) == ("again", "a@v1")
    assert found["verification"]["bound"] == "KL ≤ 0.0001"


def test_the_drift_of_every_target_is_told_after_qlora(base_of, workplace, capsys):
    store(Registry(workplace / "registry"), base_of("bert"), "q", QLORA)
    assert main(["merge", "q", "-o", "merged", "--target", "original"]) == 0
    assert list(lines_of(capsys)) == [
        "written",
        "verified",
        "dequantised",
        "original (written)",
        "quantised",
    ]


def test_several_deltas_become_one(stored, workplace, capsys):
    words = ["merge", "a", "b", "--save-as", "ab", "--weights", "0.7", "-0.3"]
    assert main(words) == 0
    lines = lines_of(capsys)
    assert lines["saved"] == "ab@v1 (adapter)"
    assert lines["combined"] == "cat of 0.7 · a@v1, -0.3 · b@v1"
    (workplace / "plan.yaml").write_text(
        "save_as: ab\ndeltas:\n- {name: a, weight: 0.5}\n- {name: b, weight: 0.5}\n"
    )
    assert main(["merge", "plan.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "v2"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["a"],
            "merge: give -o DIR to fold into the base, or --save-as NAME to combine",
        ),
        (
            ["a", "b", "-o", "merged"],
            "merge: -o takes one delta, 2 given; combine them first by --save-as",
        ),
        (["a", "-o", "merged", "--combine", "cat"], "--combine: belongs to --save-as, not to -o"),
        (
            ["a", "b", "--save-as", "ab", "--target", "original"],
            "--target: belongs to -o, not to --save-as",
        ),
        (["plan.yaml", "--save-as", "ab"], "--save-as: is said in the plan"),
        (
            ["a", "b", "--save-as", "ab", "--weights", "1"],
            "merge: weights: 1 for 2 deltas; give one to each",
        ),
        (["plan.yml"], "plan.yml: cannot be read: No such file or directory"),
    ],
)
def test_what_does_not_fit_together_is_wrong_usage(workplace, capsys, words, line):
    assert main(["merge", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{line}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "--weights", "1", "-2.5", "b"], ["a", "--weights", "1", "--weights", "-2.5", "b"]),
        (["--weights", "1", "--json"], ["--weights", "1", "--json"]),
        (["a", "0.5"], ["a", "0.5"]),
        (["--weights", "half"], ["--weights", "half"]),
        (["--weights"], ["--weights"]),
    ],
)
def test_each_weight_gets_an_option_word(words, expected):
    assert with_repeated_weights(words) == expected
