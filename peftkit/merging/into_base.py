"""A stored delta folded into its base: a model of its own, verified before it appears.

Called by the `merge` verb. The base's files are read and never written to.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkit.contracts import Delta
from peftkit.errors import RegistryError, suggestion
from peftkit.merging.folding import Fold
from peftkit.merging.targets import TARGETS, Target, fold_into, model_of
from peftkit.merging.verification import (
    FREE,
    ROUNDED_TO_16_BITS,
    SAME_4_BITS,
    SAME_ARITHMETIC,
    Bound,
    answers,
    compared,
    computing_in_float32,
    probe,
    trained_model,
)
from peftkit.merging.writing import Form, write_model, written_dtype
from peftkit.modeling.four_bit import keep_cpu_weights_unpacked
from peftkit.modeling.loading import QuietLoading
from peftkit.registry import Registry, StoredDelta
from peftkit.registry.base import base_of
from peftkit.registry.manifest import Verification
from peftkit.registry.root import disk_refusal
from peftkit.staging import staged_folder

RECORD_FILE = "peftkit_merge.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergeOptions:
    """What the `merge` verb was told."""

    target: str | None = None
    """None is `dequantised`. Only a delta that was trained over 4 bits has a choice."""
    dtype: str | None = None
    max_kl: float | None = None
    """Takes the place of the bound that goes with target and dtype. Other targets than
    `dequantised` are another model than the trained one and have none by themselves."""


@dataclass(frozen=True)
class Merged:
    """A merged model."""

    folder: Path
    stored: StoredDelta
    target: Target
    verification: Verification
    drift: dict[Target, Verification]
    """Every target beside the trained model; empty unless that was trained over 4 bits."""


def merge_into_base(
    registry: Registry, reference: str, output: Path, options: MergeOptions
) -> Merged:
    """Fold a delta into its base and write the model to `output`, or nothing at all.

    Raises:
        RegistryError: the output exists, the delta is damaged, belongs to another base or cannot
            be folded, the options do not fit it, or the result answers differently.
        SourceError: the base cannot be found.
    """
    if output.exists():
        raise RegistryError(f"{output}: exists; take another folder or remove it")
    stored = registry.find(reference)
    form = _form(stored, options)
    base = base_of(stored)
    delta = registry.read_delta(stored, base=base)
    with disk_refusal(output, "nothing was written"), staged_folder(output) as staging:
        fold = fold_into(form.target, base, stored.info, delta)
        write_model(fold, base, staging, form)
        rows = probe(base)
        trained = answers(trained_model(base, stored.info, delta), rows)
        found = answers(_reopened(staging, fold), rows)
        verification = compared(trained, found, _bound(fold, form, options))
        merged = Merged(output, stored, form.target, verification, {})
        if stored.info.quantisation:
            folded = _answers_by_target(stored, base, delta, rows)
            compared(folded[form.target], found, _bound_of_writing(fold, form))
            drift = {target: compared(trained, f, FREE) for target, f in folded.items()}
            merged = replace(merged, drift=drift)
        _write_record(staging / RECORD_FILE, merged)
    return merged


def described(merged: Merged) -> dict[str, object]:
    """The merge as plain values."""
    info = merged.stored.info
    return {
        "delta": str(merged.stored),
        "delta_digest": merged.stored.digest,
        "base": info.base_name,
        "base_digest": info.base_digest,
        "target": merged.target,
        "verification": merged.verification.model_dump(),
        "drift": {target: found.model_dump() for target, found in merged.drift.items()},
    }


def _form(stored: StoredDelta, options: MergeOptions) -> Form:
    problems, target = [], options.target
    if target is not None and target not in TARGETS:
        problems.append(f"--target: unknown '{target}'; {suggestion(target, TARGETS)}")
    elif target is not None and stored.info.quantisation is None:
        problems.append(f"--target: {stored} was not trained over 4 bits and has one target only")
    if options.dtype is not None and options.dtype not in DTYPES:
        problems.append(f"--dtype: unknown '{options.dtype}'; {suggestion(options.dtype, DTYPES)}")
    if options.max_kl is not None and not options.max_kl > 0:
        problems.append(f"--max-kl: expected a number above 0, found {options.max_kl}")
    if problems:
        raise RegistryError(problems)
    return Form(cast(Target, target or "dequantised"), DTYPES.get(options.dtype or ""))


def _bound(fold: Fold, form: Form, options: MergeOptions) -> Bound:
    """How near the result must be to the trained model."""
    if options.max_kl is not None:
        return Bound(kl_divergence=options.max_kl)
    if form.target != "dequantised":
        return FREE
    if fold.base.quantisation and written_dtype(fold, form) == torch.float32:
        return SAME_4_BITS
    return _bound_of_writing(fold, form)


def _bound_of_writing(fold: Fold, form: Form) -> Bound:
    """How near the files must be to the arithmetic."""
    return SAME_ARITHMETIC if written_dtype(fold, form) == torch.float32 else ROUNDED_TO_16_BITS


def _reopened(folder: Path, fold: Fold) -> nn.Module:
    """What plain transformers makes of the folder.

    Raises:
        RegistryError: tensors without a place in the model, or without a counterpart.
    """
    four_bit = hasattr(fold.model.config, "quantization_config")
    opened: Any
    with QuietLoading():
        opened = type(fold.model).from_pretrained(
            folder,
            dtype=fold.base.held if four_bit else torch.float32,
            device_map={"": "cpu"} if four_bit else None,
            output_loading_info=True,
        )
    model, report = opened
    wrong = sorted(f"{kind} {name}" for kind, names in report.items() for name in names)
    if wrong:
        raise RegistryError(
            f"verification: transformers opens the model with {', '.join(wrong[:5])}; "
            "nothing is kept"
        )
    keep_cpu_weights_unpacked(model)
    return computing_in_float32(model)


def _answers_by_target(
    stored: StoredDelta, base: Path, delta: Delta, rows: list[dict[str, Tensor]]
) -> dict[Target, list[Tensor]]:
    """What the delta folded into each target answers, in memory."""
    folds = {target: fold_into(target, base, stored.info, delta) for target in TARGETS}
    return {target: answers(model_of(fold, target), rows) for target, fold in folds.items()}


def _write_record(path: Path, merged: Merged) -> None:
    record = {"schema_version": 1, **described(merged)}
    path.write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")
