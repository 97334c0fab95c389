"""Whether a stored delta belongs to a base, and how a model must be held to carry it.

Called by `registry.loading` and `registry.shared`; imports `modeling`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from peftkit.contracts import Delta, LoadOptions
from peftkit.errors import RegistryError
from peftkit.modeling.config import differences_from, read_config
from peftkit.modeling.deltas import apply_delta
from peftkit.modeling.identity import base_digest, tokenizer_digest
from peftkit.modeling.loading import HELD_DTYPES, ModelSpec, held_dtype
from peftkit.modeling.parameters import freeze, set_precision
from peftkit.modeling.sharing import Held
from peftkit.registry.manifest import DeltaInfo
from peftkit.registry.reading import StoredDelta

_REFUSALS = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)
"""What PEFT raises over settings that do not fit."""


@dataclass(frozen=True)
class BaseIdentity:
    """What a delta is compared with: digests and config of a base's folder as they were read."""

    folder: Path
    weights: str
    tokenizer: str
    config: PretrainedConfig
    _same_configs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> "BaseIdentity":
        """Read every byte of the folder's weights and tokenizer.

        Raises:
            SourceError: a file is damaged, or the config needs code of its own.
        """
        config = read_config(folder)
        return cls(folder, base_digest(folder), tokenizer_digest(folder), config)

    def problems(self, stored: StoredDelta) -> list[str]:
        """One line for each way in which the delta was trained on another base."""
        info, reference = stored.info, f"{stored.name}@{stored.version}"
        found = {"weights": self.weights, "tokenizer": self.tokenizer}
        expected = {"weights": info.base_digest, "tokenizer": info.tokenizer_digest}
        problems = [
            f"{reference}: trained on {info.base_name} with {what} {expected[what]}, "
            f"but {self.folder} has {found[what]}"
            for what in expected
            if expected[what] != found[what]
        ]
        return problems + [
            f"{reference}: {self.folder} has another config than {info.base_name} had: {line}"
            for line in self._differences(info.base_config)
        ]

    def _differences(self, config: dict[str, Any] | None) -> list[str]:
        """Filling in transformers' defaults takes longer than reading a small delta."""
        if config is None or config in self._same_configs:
            return []
        lines = differences_from(self.config, config)
        if not lines:
            self._same_configs.append(config)
        return lines


def model_spec(info: DeltaInfo) -> ModelSpec:
    """What the run built on the base's files.

    Raises:
        RegistryError: the info does not say.
    """
    precision = _said(info, "mixed_precision")
    if precision not in HELD_DTYPES:
        raise RegistryError(
            f"delta: its info says mixed_precision {str(precision)[:40]!r}, "
            f"expected one of {', '.join(HELD_DTYPES)}"
        )
    config = _config_overrides(_said(info, "config"))
    return ModelSpec(_said(info, "auto_class"), config, _said(info, "dropout"), precision)


def load_options(info: DeltaInfo) -> LoadOptions:
    """How the run loaded its base."""
    return LoadOptions(
        quantisation=info.quantisation,
        frozen=_said(info, "frozen"),
        keeps_float32=info.model.get("keeps_float32", False),
    )


def held_by(info: DeltaInfo) -> Held:
    """How the run held the frozen part of its base."""
    return Held(held_dtype(model_spec(info), load_options(info)), info.quantisation)


def put_on(model: PreTrainedModel, delta: Delta) -> nn.Module:
    """Put a delta on a model, changing it in place, whatever PEFT makes of the settings.

    Raises:
        RegistryError: settings that PEFT refuses, or tensors that do not fit.
    """
    try:
        _refuse_unknown(delta.adapter_config or {})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unexpected keyword arguments", UserWarning)
            return apply_delta(model, delta)
    except _REFUSALS as error:
        raise RegistryError(f"delta: PEFT refuses it: {' '.join(str(error).split())}") from error


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    """PEFT leaves out settings that it does not know. One that is empty has no effect anyway.

    Raises:
        ValueError: names them.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configs: Mapping[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    config = configs.get(settings.get("peft_type"))
    known = {field.name for field in fields(config)} if config else settings.keys()
    unknown = sorted(key for key, value in settings.items() if value and key not in known)
    if unknown:
        raise ValueError(f"this version does not know the settings {', '.join(unknown)[:200]}")


def restore_precision(model: nn.Module, held: torch.dtype, delta: Delta) -> None:
    """Hold what was frozen in training as it was held then; freeze everything, in place."""
    if delta.kind == "weights":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in delta.tensors
    set_precision(model, held)
    freeze(model)


def _said(info: DeltaInfo, key: str) -> Any:
    if key not in info.model:
        raise RegistryError(f"delta: its info says nothing of model.{key}; save it again")
    return info.model[key]


def _config_overrides(stored: dict[str, Any]) -> dict[str, Any]:
    """JSON made the keys of `id2label` text."""
    overrides = dict(stored)
    if "id2label" in overrides:
        overrides["id2label"] = {int(key): name for key, name in overrides["id2label"].items()}
    return overrides
