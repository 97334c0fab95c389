"""From a name in the registry to a model that answers: base, delta, task and tokenizer.

Called by the `evaluate` and `predict` verbs. The base must be the very one the delta was trained
on: its digest and its tokenizer's are checked before anything is put on it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftkit import plugins
from peftkit.contracts import Delta, LoadOptions, Task
from peftkit.modeling.deltas import apply_delta
from peftkit.modeling.loading import ModelSpec, held_dtype, load_model
from peftkit.modeling.parameters import freeze, set_precision
from peftkit.registry.base import base_of
from peftkit.registry.root import default_root
from peftkit.registry.store import Registry, StoredDelta


@dataclass(frozen=True)
class LoadedDelta:
    """A stored delta on its base. The model is on the CPU, in eval mode, nothing trains."""

    model: nn.Module
    task: Task
    tokenizer: PreTrainedTokenizerBase
    stored: StoredDelta


def load_delta(reference: str, *, registry: Registry | None = None) -> LoadedDelta:
    """Verify and load `name`, `name@v2` or `name@latest`.

    Raises:
        RegistryError: unknown, damaged, or another base or tokenizer than it was trained on.
        SourceError: the base cannot be found.
    """
    registry = registry or Registry(default_root())
    stored = registry.find(reference)
    base, info = base_of(stored), stored.info
    delta = registry.read_delta(stored, base=base)
    spec = ModelSpec(
        info.model["auto_class"],
        _config_overrides(info.model["config"]),
        info.model["dropout"],
        info.model["mixed_precision"],
    )
    options = LoadOptions(
        quantisation=info.quantisation,
        frozen=info.model["frozen"],
        keeps_float32=info.model.get("keeps_float32", False),
    )
    model = apply_delta(load_model(base, spec, options), delta)
    _restore_precision(model, held_dtype(spec, options), delta)
    task_class = plugins.load("tasks", info.task["type"])
    task = task_class(task_class.Config.model_validate(info.task))
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    return LoadedDelta(model.eval(), task, tokenizer, stored)


def _config_overrides(stored: dict[str, Any]) -> dict[str, Any]:
    """JSON made the keys of `id2label` text."""
    overrides = dict(stored)
    if "id2label" in overrides:
        overrides["id2label"] = {int(key): name for key, name in overrides["id2label"].items()}
    return overrides


def _restore_precision(model: nn.Module, held: torch.dtype, delta: Delta) -> None:
    """Hold what was frozen in training as it was held then; freeze everything."""
    if delta.kind == "weights":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in delta.tensors
    set_precision(model, held)
    freeze(model)
