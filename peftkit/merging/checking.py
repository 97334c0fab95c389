"""A combined or extracted delta put to the test before it is saved, and read back after.

Called by `combining` and `extraction`. Each side of a comparison has the memory for itself.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.merging.folding import Fold
from peftkit.merging.held_base import HeldBase
from peftkit.merging.verification import (
    SAME_4_BITS,
    SAME_ARITHMETIC,
    Bound,
    answers,
    compared,
    computing_in_float32,
    probe,
    trained_model,
)
from peftkit.modeling.base_tensors import BaseTensors
from peftkit.modeling.deltas import apply_weights
from peftkit.modeling.loading import load_model
from peftkit.registry.fitting import load_options, model_spec
from peftkit.registry.manifest import DeltaInfo
from peftkit.registry.store import Registry, StoredDelta
from peftkit.registry.tensors import delta_from_files, delta_to_files

_DRIFT = {"max_abs_difference", "kl_divergence", "top1_agreement"}


def checked(
    folder: Path,
    info: DeltaInfo,
    delta: Delta,
    expected: Iterable[tuple[str, Tensor]],
    *,
    exact: bool,
) -> DeltaInfo:
    """Write and read the delta in memory, and compare what it answers on a freshly loaded base.

    Args:
        folder: Of the base.
        info: The delta's; says how the base is held.
        delta: What is to be saved.
        expected: Name → float32 value of every tensor in what the delta stands for.
        exact: Whether it must answer as `expected` does, and not only as it did before writing.

    Returns:
        `info` with the comparison that had a bound, and in its `method` the drift: how far the
        delta is from `expected` in the norm of its changes, and in what it answers.

    Raises:
        RegistryError: beyond the bound.
    """
    rows, tensors = probe(folder), BaseTensors(folder)
    again = delta_from_files(delta.kind, delta_to_files(delta, base=tensors), base=tensors)
    found = answers(trained_model(folder, info, again), rows)
    written = answers(trained_model(folder, info, delta), rows)
    verification = compared(written, found, SAME_ARITHMETIC)
    distance, values = _distance(folder, info, again, expected)
    wanted = answers(_model_of(folder, info, values), rows)
    bound = SAME_4_BITS if info.quantisation else SAME_ARITHMETIC
    apart = compared(wanted, found, bound if exact else Bound())
    drift = {"relative_distance": distance, **apart.model_dump(include=_DRIFT)}
    return info.model_copy(
        update={
            "verification": apart if exact else verification,
            "method": {**info.method, "drift": drift},
        }
    )


def _distance(
    folder: Path, info: DeltaInfo, delta: Delta, expected: Iterable[tuple[str, Tensor]]
) -> tuple[float, dict[str, Tensor]]:
    """Relative distance of the changes that have a base, and the expected values."""
    base = HeldBase(folder, info)
    fold = Fold(folder, info, delta, base)
    between = whole = 0.0
    values = {}
    for name, value in expected:
        values[name] = value
        if base.files(name) is None:
            continue
        held = base(name)
        found = fold.tensor(name) if name in fold.changed else held
        between += float((found - value).double().square().sum())
        whole += float((value - held).double().square().sum())
    return (between / whole) ** 0.5 if whole else 0.0, values


def _model_of(folder: Path, info: DeltaInfo, values: dict[str, Tensor]) -> torch.nn.Module:
    """A base without adapters that holds `values`, computing in float32.

    What a run held in 4 bits is what was left of it, widened.
    """
    options = replace(load_options(info), quantisation=None)
    held = HeldBase(folder, info)
    rounded = {name: held(name) for name in held.four_bit if name not in values}
    model = load_model(folder, model_spec(info), options)
    return computing_in_float32(apply_weights(model, {**rounded, **values}))


def save_and_read_back(
    registry: Registry, name: str, delta: Delta, info: DeltaInfo, folder: Path
) -> StoredDelta:
    """Save the delta and compare what the store gives back, bit for bit.

    Raises:
        RegistryError: the store refuses it, or gives back another; nothing is kept.
    """
    stored = registry.save(name, delta, info, base=folder)
    found = registry.read_delta(stored, base=folder)
    if not _equal(delta, found):
        registry.rm(str(stored))
        raise RegistryError(f"{stored}: reads back as another than was saved; nothing is kept")
    return stored


def _equal(a: Delta, b: Delta) -> bool:
    return (
        (a.kind, a.adapter_config, a.tensors.keys()) == (b.kind, b.adapter_config, b.tensors.keys())
        and all(a.tensors[name].dtype == b.tensors[name].dtype for name in a.tensors)
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    )
