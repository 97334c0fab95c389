"""Small deltas that go between two stores, and what is looked at afterwards."""

import pytest
import torch

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.registry import DeltaInfo, RunSummary
from peftkit.registry.remotes import pull

DIGEST = f"sha256:{'0' * 64}"


def about(kind, **changes):
    content = {
        "kind": kind,
        "base_name": "some/base",
        "base_digest": DIGEST,
        "tokenizer_digest": DIGEST,
        "task": {"type": "classification", "dataset": "some/data"},
        "method": {"type": "lora" if kind == "adapter" else "top_layers"},
        "labels": ["no", "yes"],
        "model": {},
        "recipe": {},
        "recipe_digest": DIGEST,
        "run": RunSummary(
            record="record.json", seed=3, status="completed", metrics={"accuracy": 0.5, "f1": None}
        ),
        "stand_in": False,
        "created": "2026-11-23T16:28:16+00:00",
    }
    return DeltaInfo(**(content | changes))


def save(registry, name, *, kind="adapter", value=1.0, size=300, **changes):
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "some/base"}
    delta = Delta(
        kind, {"layer.weight": torch.full((size,), value)}, config if kind == "adapter" else None
    )
    return registry.save(name, delta, about(kind, **changes))


def contents_of(registry, reference):
    contents = registry.contents(registry.find(reference))
    return contents.files, contents.info, contents.manifest


def nothing_in(registry):
    """No version, no blob, nothing that a crash could have left."""
    return not registry.root.exists() or not [p for p in registry.root.rglob("*") if p.is_file()]


def problem_of(action, *words, **options):
    """The one line of a refusal."""
    with pytest.raises(RegistryError) as caught:
        action(*words, **options)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def refused_pull(elsewhere, address):
    """The one line with which a pull ends that leaves nothing."""
    problem = problem_of(pull, elsewhere, address)
    assert nothing_in(elsewhere)
    return problem
