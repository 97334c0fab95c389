"""How two stored deltas differ: in what is said of them, and in their tensors.

Called by the `diff` verb. Both are verified on the way.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.registry.store import Registry

if TYPE_CHECKING:
    from torch import Tensor

_NOT_COMPARED = frozenset({"created"})


@dataclass(frozen=True)
class Difference:
    """What differs between two deltas."""

    facts: list[tuple[str, Any, Any]]
    """Dotted key of the info with the value of each."""
    tensors: dict[str, str]
    """Name → `only in NAME`, `shape` or `values`; equal ones are left out."""
    summary: dict[str, Any]


def compare(registry: Registry, first: str, second: str) -> Difference:
    """Compare two versions.

    `relative distance` is ‖a - b‖ / ‖a‖ and `cosine` the cosine of the angle between them, over the
    tensors of both that have the same shape, in float64.

    Raises:
        RegistryError: unknown or damaged.
    """
    left, right = registry.find(first), registry.find(second)
    a, b = registry.read_delta(left).tensors, registry.read_delta(right).tensors
    shared = {name for name in a.keys() & b.keys() if a[name].shape == b[name].shape}
    tensors = dict.fromkeys(a.keys() - b.keys(), f"only in {left}")
    tensors |= dict.fromkeys(b.keys() - a.keys(), f"only in {right}")
    tensors |= dict.fromkeys((a.keys() & b.keys()) - shared, "shape")
    changed = {name for name in shared if not _equal(a[name], b[name])}
    tensors |= dict.fromkeys(sorted(changed), "values")
    facts = _facts(left.info.model_dump(mode="json"), right.info.model_dump(mode="json"))
    counts = {
        "equal tensors": len(shared - changed),
        "changed tensors": len(changed),
        f"only in {left}": len(a.keys() - b.keys()),
        f"only in {right}": len(b.keys() - a.keys()),
        "other shape": len((a.keys() & b.keys()) - shared),
    }
    return Difference(facts, tensors, {**counts, **_distance(a, b, shared)})


def _equal(a: "Tensor", b: "Tensor") -> bool:
    return a.dtype == b.dtype and bool((a == b).all())


def _distance(a: "dict[str, Tensor]", b: "dict[str, Tensor]", names: set[str]) -> dict[str, float]:
    squares = {"a": 0.0, "b": 0.0, "between": 0.0, "dot": 0.0}
    for name in names:
        left, right = a[name].double().flatten(), b[name].double().flatten()
        squares["a"] += float(left @ left)
        squares["b"] += float(right @ right)
        squares["dot"] += float(left @ right)
        squares["between"] += float((left - right).square().sum())
    if not squares["a"] or not squares["b"]:
        return {}
    return {
        "relative distance": (squares["between"] / squares["a"]) ** 0.5,
        "cosine": squares["dot"] / (squares["a"] * squares["b"]) ** 0.5,
    }


def _facts(left: dict[str, Any], right: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    a, b = _flat(left), _flat(right)
    keys = (key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key))
    return [(key, a.get(key), b.get(key)) for key in keys if key not in _NOT_COMPARED]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found
