"""A model whose delta can be exchanged: every tensor of a delta has a place that points to it.

Called by `registry.shared`. Deltas of one structure (class, shapes of the heads, adapter settings
or names of the changed weights) take turns in one module tree, and a turn moves pointers only.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.modeling.deltas import adapter_slots, refuse_mismatch, weights_slots
from peftkit.modeling.sharing import shape_of
from peftkit.registry.fitting import put_on, restore_precision
from peftkit.registry.manifest import DeltaInfo
from peftkit.registry.mixing import LoraMixture, mixable

_MOVES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Starts of `init_lora_weights` that write into the base when PEFT puts the adapter on it."""

_WITHOUT_EFFECT = frozenset(
    {"base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
)
"""Adapter settings that change nothing of what a model in eval mode computes."""


class Structure:
    """One module tree over the shared base, and the places in it that a delta fills."""

    def __init__(self, model: PreTrainedModel, delta: Delta, held: torch.dtype) -> None:
        """Put `delta` on `model`, which becomes the structure's own.

        Raises:
            RegistryError: tensors that do not fit, or an adapter that would change the base.
        """
        _refuse_moved_base(delta)
        adapted = put_on(model, delta)
        restore_precision(adapted, held, delta)
        self.model: nn.Module = adapted.eval()
        self._slots = _slots(adapted, delta)
        self._forms = {
            name: torch.empty_like(slot, device="meta") for name, slot in self.slots.items()
        }
        self._owner: str | None = None
        self.mixture = LoraMixture(adapted) if self.exchangeable and mixable(adapted) else None

    @property
    def exchangeable(self) -> bool:
        """Whether another delta can take its turn; otherwise the first one stays."""
        return self._slots is not None

    @property
    def slots(self) -> Mapping[str, Tensor]:
        """Name in a delta's files → what holds it in the model."""
        return self._slots or {}

    def fitted(self, delta: Delta) -> list[Tensor]:
        """Copies of the delta's tensors in the order and dtype of the places.

        Copies, because they then lie in memory as torch aligns it, which the last bit depends on.

        Raises:
            RegistryError: missing, unexpected or misshapen tensors.
        """
        if self._slots is None:
            return []
        refuse_mismatch(self._forms, delta.tensors)
        return [
            delta.tensors[name].to(slot.device, self._forms[name].dtype, copy=True)
            for name, slot in self._slots.items()
        ]

    def place(self, owner: str, tensors: list[Tensor]) -> None:
        """Point every place to the tensors of `owner`, which `fitted` made."""
        if owner == self._owner:
            return
        self._owner = None  # until all places are filled, no delta is in place
        for slot, tensor in zip(self.slots.values(), tensors, strict=True):
            slot.data = tensor
        self._owner = owner

    def mixed(
        self,
        owners: Sequence[str],
        tensors: Mapping[str, list[Tensor]],
        inputs: Mapping[str, Tensor],
    ) -> Any:
        """The model's outputs, row i with the delta of `owners[i]`; there must be a mixture."""
        assert self.mixture is not None
        for owner, own in tensors.items():
            self.mixture.add(owner, dict(zip(self.slots.values(), own, strict=True)))
        return self.mixture(owners, inputs)

    def clear(self, owner: str) -> None:
        """Let go of the tensors of `owner`, if they are in place."""
        if self.mixture is not None:
            self.mixture.remove(owner)
        if owner == self._owner:
            self._owner = None
            for slot in self.slots.values():
                slot.data = slot.new_empty(0)


def structure_key(info: DeltaInfo, delta: Delta) -> str:
    """Equal for deltas that can take turns in one module tree."""
    model = [info.model["auto_class"], shape_of(info.model["config"])]
    if delta.adapter_config is None:
        return json.dumps([*model, sorted(delta.tensors)])
    settings = {k: v for k, v in delta.adapter_config.items() if k not in _WITHOUT_EFFECT}
    return json.dumps([*model, settings], sort_keys=True)


def _slots(model: nn.Module, delta: Delta) -> dict[str, Tensor] | None:
    if delta.adapter_config is None:
        return weights_slots(model, delta.tensors)
    return adapter_slots(model)


def _refuse_moved_base(delta: Delta) -> None:
    settings: Mapping[str, Any] = delta.adapter_config or {}
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_MOVES_BASE):
        raise RegistryError(
            f"delta: init_lora_weights '{init}' changes the base's weights, which others share; "
            "store it as plain LoRA"
        )
    if settings.get("kasa_config"):
        raise RegistryError("delta: kasa_config changes the base's weights, which others share")
