"""Several LoRA adapters of one structure in one forward, each for its own rows of the batch.

Called by `registry.structures`; fills PEFT's layers, whose `adapter_names` does the arithmetic.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_FIRST = "default"
"""PEFT's name for the adapter that the structure was built with."""


class LoraMixture:
    """The adapters side by side in the layers of one PEFT model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._keys: dict[str, str] = {}
        self._count = 0

    def __call__(self, owners: Sequence[str], inputs: Mapping[str, Tensor]) -> Any:
        """The model's outputs, row i with the adapter of `owners[i]`."""
        return self._model(**inputs, adapter_names=[self._keys[owner] for owner in owners])

    def add(self, owner: str, tensors: Mapping[Tensor, Tensor]) -> None:
        """Put an adapter beside the others: `tensors` has the first one's parameters as keys."""
        if owner in self._keys:
            return
        self._count += 1
        # PEFT takes no dots, which an owner's name may have.
        key = self._keys[owner] = f"mixed{self._count}"
        memo = {
            id(slot): nn.Parameter(tensor, requires_grad=False) for slot, tensor in tensors.items()
        }
        try:
            for module, parts in _layers(self._model):
                for part in parts:
                    if _FIRST in part:
                        part[key] = copy.deepcopy(part[_FIRST], memo)
                if hasattr(module, "_adapters"):
                    module._adapters.add(key)
        except BaseException:  # also Ctrl-C: no half an adapter stays
            self.remove(owner)
            raise

    def remove(self, owner: str) -> None:
        """Take an adapter out again, if it is there."""
        key = self._keys.pop(owner, None)
        for module, parts in _layers(self._model) if key else ():
            for part in parts:
                if key in part:
                    del part[key]
            if hasattr(module, "_adapters"):
                module._adapters.discard(key)


def mixable(model: nn.Module) -> bool:
    """Whether PEFT runs the model's adapters side by side without a difference.

    It does not for DoRA and other variants, for adapters that own a bias of the base, for trained
    tokens, and for heads that are more than one layer.
    """
    from peft import PeftModel
    from peft.tuners.lora import Embedding, Linear, LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if not isinstance(model, PeftModel):
        return False
    config: Any = model.peft_config[_FIRST]
    if config.peft_type != "LORA" or config.bias != "none":
        return False
    linear = (Linear, *_four_bit_layers())
    return all(
        (isinstance(module, (*linear, Embedding)) and not module.lora_variant)
        if isinstance(module, LoraLayer)
        else isinstance(module, ModulesToSaveWrapper)
        and isinstance(module.original_module, nn.Linear | nn.Embedding)
        for module in model.modules()
        if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper)
    )


def _four_bit_layers() -> list[type]:
    from peft.tuners.lora import bnb

    return [bnb.Linear4bit] if hasattr(bnb, "Linear4bit") else []


def _layers(model: nn.Module) -> Iterator[tuple[Any, list[Any]]]:
    """Each layer of PEFT's, and its mappings from an adapter's name to a part of the adapter."""
    for module in model.modules():
        names = (
            *getattr(module, "adapter_layer_names", ()),
            *getattr(module, "other_param_names", ()),
        )
        if names:
            yield module, [getattr(module, name) for name in names]
