"""Small deltas whose one value says which they are, and all that a store shows of them."""

from pathlib import Path

import torch

from peftkit.contracts import Delta
from peftkit.registry import DeltaInfo, Registry, RunSummary
from peftkit.registry.layout import decode_index

DIGEST = "sha256:" + "0" * 64


def info(kind="weights") -> DeltaInfo:
    return DeltaInfo(
        kind=kind,
        base_name="org/base",
        base_digest=DIGEST,
        tokenizer_digest=DIGEST,
        task={"type": "classification"},
        method={"type": "full"},
        labels=["bad", "good"],
        model={"auto_class": "AutoModelForSequenceClassification"},
        recipe={"name": "r"},
        recipe_digest=DIGEST,
        run=RunSummary(record="runs/r", seed=1, status="finished", metrics={"f1": 0.5}),
        stand_in=False,
        created="2026-11-01T10:00:00+00:00",
    )


def weights(value: float = 1.0) -> Delta:
    return Delta("weights", {"head.weight": torch.full((2, 3), value)})


def adapter(value: float = 1.0) -> Delta:
    return Delta("adapter", {"q.lora_A": torch.full((2,), value)}, {"peft_type": "LORA", "r": 2})


def summary(registry: Registry) -> dict[str, float]:
    """First value of every version, read with verification; the store has no problem."""
    listing = registry.ls()
    assert listing.problems == []
    values = {}
    for row in listing.rows:
        reference = f"{row['name']}@{row['version']}"
        tensors = registry.read_delta(registry.find(reference)).tensors
        values[reference] = next(iter(tensors.values())).flatten()[0].item()
    return values


def state_of(root: Path) -> dict[str, float]:
    """Version → its value and `name@tag` → the value that it means, of a store opened anew."""
    registry = Registry(root)
    values = summary(registry)
    for row in registry.ls().rows:
        for tag in row["tags"]:
            meant = registry.find(f"{row['name']}@{tag}")
            values[f"{row['name']}@{tag}"] = values[str(meant)]
    return values


def indexed(registry: Registry) -> list[str]:
    """The references that other OCI tools see, sorted by name and number."""
    found = decode_index((registry.root / "index.json").read_bytes(), "index.json")
    return sorted(found, key=lambda entry: (len(entry), entry))
