"""Stored deltas of every kind over one tiny base, and what their weighted sum truly is."""

import pytest
from stored_deltas import LORA, SECTIONS, store
from sums import plain_weights

from peftkit.merging.combining import combine
from peftkit.merging.plan import plan_from
from peftkit.registry.loading import load_delta
from peftkit.registry.store import Registry


@pytest.fixture(scope="session")
def registry(base_of, tmp_path_factory):
    """Every kind of delta over the tiny BERT in float32, and LoRA of other ranks and heads."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    for seed, (name, section) in enumerate(SECTIONS.items()):
        store(registry, base_of("bert"), name, section, seed=seed)
    others = {
        "rank-3": LORA | {"r": 3, "target_modules": ["query", "intermediate.dense"]},
        "patterns": LORA | {"rank_pattern": {"query": 4}, "alpha_pattern": {"key": 5}},
        "high": LORA | {"layers_to_transform": [2], "target_modules": ["query", "value"]},
        "expression": LORA | {"target_modules": r".*\.(key|value)"},
        "body": LORA | {"target_modules": ["query", "value"]},
        "body-other": LORA | {"target_modules": ["query", "value"]},
    }
    for seed, (name, section) in enumerate(others.items(), start=40):
        store(registry, base_of("bert"), name, section, seed=seed)
    store(registry, base_of("bert"), "three", LORA, labels=3, seed=51)
    store(registry, base_of("bert"), "full-three", {"type": "full"}, labels=3, seed=52)
    return registry


@pytest.fixture
def combined(registry):
    """Combines deltas to `out` and returns what was saved."""

    def run(names, weights=(), *, where=None, **options):
        plan = plan_from(names, weights, {"save_as": "out"} | options)
        return combine(where or registry, plan).stored

    return run


@pytest.fixture(scope="session")
def merged_weights(registry):
    """Name of a delta → float64 weights of its model, the adapter folded in by PEFT itself."""

    def weights(name, where=registry):
        model = load_delta(name, registry=where).model
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        return {key: value.double() for key, value in model.state_dict().items()}

    return weights


@pytest.fixture(scope="session")
def base_weights(base_of):
    """Float64 weights of the model without a delta; its head is of no meaning."""
    return plain_weights(base_of("bert"))
