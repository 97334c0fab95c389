"""Words of an adapter's settings: each must match something, and the search must end."""

import time

import pytest
import tiny_runs

from peftkit.errors import MethodError
from peftkit.modeling import patterns
from peftkit.modeling.deltas import apply_delta
from peftkit.modeling.patterns import check_settings

BAD = r"(\w+\.?)+!"


@pytest.fixture
def model(base_of):
    return tiny_runs.load_base(base_of("bert"), tiny_runs.make_method({"type": "full"}))


def problems_of(model, settings):
    with pytest.raises(MethodError) as caught:
        check_settings(model, settings)
    return caught.value.problems


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query"], "modules_to_save": ["pooler"], "exclude_modules": ["key"]},
        {"target_modules": r".*\.(query|value)", "exclude_modules": r".*\.0\..*"},
        {"rank_pattern": {"layer.0.attention.self.query": 3, "value": 2, r".*\.1\..*": 4}},
        {"target_modules": ["query"], "layers_pattern": "layer", "layers_to_transform": [0, 2]},
        {"trainable_token_indices": [0, 21], "target_parameters": ["query.weight"]},
        {"target_modules": "all-linear", "modules_to_save": [], "exclude_modules": None},
        {},
    ],
)
def test_what_matches_is_let_through(model, settings):
    check_settings(model, settings)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"modules_to_save": ["poolr"]}, "modules_to_save 'poolr' match no module; did you mean"),
        ({"exclude_modules": ["nope"]}, "exclude_modules 'nope' match no module; Bert"),
        ({"exclude_modules": "nope"}, "exclude_modules 'nope' match no module; Bert"),
        ({"rank_pattern": {"querry": 3}}, "rank_pattern 'querry' match no module; did you mean"),
        ({"alpha_pattern": {"nope": 3}}, "alpha_pattern 'nope' match no module; Bert"),
        ({"layers_pattern": ["blocks"]}, "layers_pattern 'blocks' match no module; Bert"),
        ({"layers_to_transform": [0, 99]}, "layers_to_transform: no layer 99; take 0 to 2"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: no token -1; take 0 to 21"),
        ({"trainable_token_indices": [22]}, "trainable_token_indices: no token 22; take 0 to 21"),
        ({"trainable_token_indices": []}, "trainable_token_indices: empty; name a token or"),
        ({"target_parameters": ["no.w"]}, "target_parameters: no parameter ends in 'no.w'"),
    ],
)
def test_what_matches_nothing_is_refused(model, settings, start):
    (problem,) = problems_of(model, settings)
    assert problem.startswith(f"method: {start}")


def test_all_problems_are_named_at_once(model):
    settings = {"target_modules": ["a"], "exclude_modules": ["b"], "layers_to_transform": 7}
    assert len(problems_of(model, settings)) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": BAD},
        {"exclude_modules": BAD},
        {"rank_pattern": {BAD: 3}},
        {"layers_pattern": BAD},
        {"modules_to_save": [BAD]},
    ],
)
def test_a_search_without_end_is_cut_off(model, monkeypatch, settings):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    started = time.monotonic()
    (problem,) = problems_of(model, settings)
    assert time.monotonic() - started < 10
    assert problem.startswith(f"method: matching {next(iter(patterns._forms(settings)))[2]!r} with")
    assert problem.endswith("simplify the pattern, such as repeats inside repeats")


def test_a_stored_adapter_cannot_hang_its_loading_either(base_of, model, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    method = tiny_runs.make_method({"type": "lora", "r": 2})
    delta = method.delta(tiny_runs.prepare(base_of("bert"), method))
    delta.adapter_config["exclude_modules"] = BAD
    with pytest.raises(MethodError, match="simplify the pattern"):
        apply_delta(model, delta)


def test_a_broken_expression_is_one_line(model):
    (problem,) = problems_of(model, {"exclude_modules": "*.query"})
    assert problem == (
        r"method: '(?:*.query)\\Z': not all are regular expressions: "
        "re.error: nothing to repeat at position 3"
    )
