"""The arithmetic of one delta on its base, a tensor at a time.

Called by whoever writes a merged model or compares deltas of different kinds. PEFT's own layers do
the arithmetic of adapters, on a model whose memory is never touched: only the layer at work holds
its weights.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.merging.held_base import HeldBase
from peftkit.modeling.base_tensors import BaseTensors
from peftkit.modeling.deltas import adapter_parameters
from peftkit.modeling.loading import skeleton, spec_config
from peftkit.modeling.parameters import mark_new
from peftkit.registry.fitting import model_spec, put_on
from peftkit.registry.manifest import DeltaInfo

_BLOCK_BYTES = 1 << 20
"""What is computed at once: small enough to stay in a processor's cache until it is written."""


class Fold:
    """What a delta makes of each tensor of its base."""

    def __init__(self, folder: Path, info: DeltaInfo, delta: Delta, base: HeldBase) -> None:
        """Fit `delta` to the model that its run built on the base in `folder`.

        Raises:
            RegistryError: tensors that do not fit, a method that cannot be folded into weights, or
                tied weights that would come apart.
            SourceError: the base has no such architecture.
        """
        self.base = base
        spec = model_spec(info)
        self.model = skeleton(spec, spec_config(folder, spec))
        """The model that the run built, without its weights and without the adapter."""
        self.carrier = empty_model(folder, info, base.files)
        """The same with the adapter's modules in their places."""
        names = {id(module): name for name, module in self.carrier.named_modules()}
        own = {id(p): name for name, p in self.carrier.named_parameters()}
        adapted = put_on(self.carrier, delta)
        self._layers: dict[str, list[Any]] = {}
        self._merged: dict[str, Tensor] = {}
        self._given = dict(delta.tensors)
        if delta.adapter_config is not None:
            _refuse_prompts(adapted)
            kept = adapter_parameters(adapted).values()
            self._given = {own[id(p)]: p.detach().clone() for p in kept if id(p) in own}
            self._given |= _saved_modules(adapted, names)
            for layer in _adapter_layers(adapted):
                self._layers.setdefault(names[id(layer.get_base_layer())], []).append(layer)
        self._refuse_loosened_ties()

    @cached_property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that the delta gives or may change, heads included."""
        return frozenset(self._given) | self.adapted

    @cached_property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that an adapter is folded into; none for a delta of weights."""
        return frozenset(name for layer in self._layers for name in self._touched(layer))

    def tensor(self, name: str) -> Tensor:
        """The float32 value of a changed tensor; asking twice computes it twice.

        Raises:
            RegistryError: NaN or Inf in it, or the base's files lack what it is made of.
        """
        layer = name.rpartition(".")[0]
        if name in self._merged:
            value = self._merged.pop(name)
        elif name in self._touched(layer):
            self._merged = self._merge(layer)
            value = self._merged.pop(name)
        else:
            value = self._given[name].float()
        return _finite(name, value)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """As `tensor`, in float32 parts along the first dimension; each overwrites the one before.

        A plain LoRA takes a pass over memory where PEFT's layers take several.
        """
        factors = self._plain_factors(name)
        if factors is None:
            yield self.tensor(name)
            return
        a, b, scale = factors
        held = self.base.as_held(name)
        rows = max(1, _BLOCK_BYTES // (held.shape[1] * 4))
        buffer = torch.empty(min(rows, len(held)), held.shape[1])
        for start in range(0, len(held), rows):
            part = held[start : start + rows].float()
            value = torch.addmm(
                part, b[start : start + rows], a, alpha=scale, out=buffer[: len(part)]
            )
            yield _finite(name, value)

    def _plain_factors(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """A (R, I), B (O, R) and the scale, where all that an adapter adds is scale · BA."""
        from peft.tuners.lora import Linear

        layer, _, parameter = name.rpartition(".")
        adapters = self._layers.get(layer, [])
        one: Any = adapters[0] if len(adapters) == 1 else None
        plain = isinstance(one, Linear) and parameter == "weight" and name not in self._given
        if not plain:
            return None
        if one.lora_variant or one.fan_in_fan_out or one.lora_bias["default"]:
            return None
        a, b = one.lora_A["default"].weight, one.lora_B["default"].weight
        return a.detach(), b.detach(), float(one.scaling["default"])

    def _touched(self, layer: str) -> list[str]:
        """The parameters of a layer that carries an adapter."""
        if layer not in self._layers:
            return []
        own = self._layers[layer][0].get_base_layer().named_parameters(recurse=False)
        return [f"{layer}.{name}" for name, _ in own]

    def _merge(self, layer: str) -> dict[str, Tensor]:
        """The layer's parameters after its adapters; the others of the model stay empty."""
        base_layer = self._layers[layer][0].get_base_layer()
        for name, parameter in base_layer.named_parameters(recurse=False):
            given = self._given.get(f"{layer}.{name}")
            own = self.base(f"{layer}.{name}") if given is None else given.clone()
            parameter.data = own
        with torch.no_grad():
            for adapter in self._layers[layer]:
                adapter.merge()
                adapter.merged_adapters.clear()
        found = {}
        for name, parameter in base_layer.named_parameters(recurse=False):
            found[f"{layer}.{name}"] = parameter.data
            parameter.data = torch.empty(0)
        return found

    def _refuse_loosened_ties(self) -> None:
        """Tensors that share memory in the base must come out equal, or one of them is lost."""
        ties: dict[str, str] = self.model.all_tied_weights_keys
        problems = [
            f"{target}: shares its memory with {source}, and the delta changes only "
            f"{target if target in self.changed else source}; it cannot be folded into this base"
            for target, source in ties.items()
            if (target in self.changed) != (source in self.changed) and self._layers
        ]
        if problems:
            raise RegistryError(problems)


def _finite(name: str, value: Tensor) -> Tensor:
    # A sum is cheap, and finite only if all values are; a finite tensor may still overflow it.
    if not value.sum().isfinite() and not value.isfinite().all():
        raise RegistryError(f"{name}: the merged tensor holds NaN or Inf; nothing is written")
    return value


def empty_model(folder: Path, info: DeltaInfo, files: BaseTensors) -> PreTrainedModel:
    """The model that a run built, its memory reserved and never touched.

    What the base's files lack is marked as new, as loading would do.

    Raises:
        SourceError: the base has no such architecture.
    """
    spec = model_spec(info)
    model = skeleton(spec, spec_config(folder, spec)).to_empty(device="cpu")
    model.tie_weights()
    for name, parameter in model.named_parameters():
        found = files(name)
        if found is None or found.shape != parameter.shape:
            mark_new(model.get_submodule(name.rpartition(".")[0]))
    return model


def _adapter_layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def _saved_modules(model: nn.Module, names: dict[int, str]) -> dict[str, Tensor]:
    """Tensors of the modules that the adapter replaces as a whole, by their names in the base."""
    from peft.utils.other import ModulesToSaveWrapper

    found = {}
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            copy: nn.Module = wrapper.modules_to_save["default"]
            prefix = names[id(wrapper.original_module)]
            found.update({f"{prefix}.{n}": p.detach() for n, p in copy.named_parameters()})
    return found


def _refuse_prompts(model: Any) -> None:
    config = model.peft_config["default"]
    merge: Callable[[], None] | None = getattr(model.base_model, "_check_merge_allowed", None)
    if config.is_prompt_learning or merge is None:
        raise RegistryError(
            f"{config.peft_type.value}: works beside the base's weights and cannot be folded into "
            "them; serve it as an adapter"
        )
    try:
        merge()
    except (NotImplementedError, ValueError) as error:
        raise RegistryError(f"{config.peft_type.value}: {' '.join(str(error).split())}") from error
