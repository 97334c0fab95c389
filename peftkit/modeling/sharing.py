"""One base in memory and any number of models over it, which own their module trees only.

Called by `registry.shared`. A model of another class, or with heads of other shapes, is a copy of
the module tree whose tensors point into the memory of the first; nothing here writes to it.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkit.contracts import LoadOptions, Quantisation
from peftkit.modeling.loading import HELD_DTYPES, ModelSpec, load_model, spec_config
from peftkit.modeling.parameters import is_new, mark_new, new_modules

_COMPUTES = ("num_labels", "pad_token_id")
"""Overrides of the base's config that change what a model computes; the others are words."""


@dataclass(frozen=True)
class Held:
    """How the frozen part of a base is held: the dtype, and 4 bits for its linear layers."""

    dtype: torch.dtype = torch.float32
    quantisation: Quantisation | None = None

    @property
    def mixed_precision(self) -> str:
        """Accelerate's word for the run whose base is held so."""
        return next(word for word, dtype in HELD_DTYPES.items() if dtype == self.dtype)


class LiveBase:
    """The tensors of one base folder, loaded once; makes models that share them."""

    def __init__(self, folder: Path, held: Held) -> None:
        self.folder = folder
        self.held = held
        self._tensors: dict[str, Tensor] = {}
        self._models: dict[str, dict[tuple[Any, ...], PreTrainedModel]] = {}

    def model(self, auto_class: str, overrides: Mapping[str, Any]) -> PreTrainedModel:
        """A model of its own over the shared tensors; what is new in it is blank or random.

        The files are read for the first model of a class only.

        Raises:
            SourceError: as for `load_model`.
        """
        family = self._models.setdefault(auto_class, {})
        key = shape_of(overrides)
        if key not in family:
            first = next(iter(family.values()), None)
            spec = ModelSpec(auto_class, overrides, None, self.held.mixed_precision)
            family[key] = self._loaded(spec) if first is None else self._derived(first, spec)
        return shared_copy(family[key])

    def _loaded(self, spec: ModelSpec) -> PreTrainedModel:
        options = LoadOptions(quantisation=self.held.quantisation, frozen=True)
        model = load_model(self.folder, spec, options)
        for name, tensor in named_tensors(model):
            if is_new(model, name):
                continue
            own = self._tensors.setdefault(name.removeprefix(f"{model.base_model_prefix}."), tensor)
            if own is tensor:
                continue
            if _equal(own, tensor):
                _point(tensor, own)
            else:
                self._tensors[f"{spec.auto_class}:{name}"] = tensor
        model.eval()
        return model

    def _derived(self, model: PreTrainedModel, spec: ModelSpec) -> PreTrainedModel:
        """As `model`, with heads of the shapes that the spec asks for, if all else stays."""
        config = spec_config(self.folder, spec)
        with torch.device("meta"):
            shell = type(model)(config)
        heads = {name: shell.get_submodule(name) for name in new_modules(model)}
        derived = shared_copy(model, {id(model.config): config})
        for name, head in heads.items():
            blank = head.to(self.held.dtype).to_empty(device=model.device).requires_grad_(False)
            for tensor in blank.parameters():
                tensor.zero_()
            mark_new(blank)
            derived.set_submodule(name, blank)
        if not _fits(derived, shell):
            return self._loaded(spec)
        if hasattr(shell, "num_labels"):
            derived.num_labels = shell.num_labels
        derived.eval()
        return derived

    def digest(self) -> str:
        """`sha256:<hex>` over names and bytes of the tensors as they are in memory now."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            for part in (tensor, *_quantisation_constants(tensor)):
                digest.update(f"{name} {part.dtype} {list(part.shape)}\n".encode())
                digest.update(_bytes_of(part))
        return f"sha256:{digest.hexdigest()}"

    def pointers(self) -> set[int]:
        """Addresses of the shared tensors."""
        return {tensor.data_ptr() for tensor in self._tensors.values()}


def shape_of(overrides: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of the config's overrides makes two models compute differently."""
    labels = overrides.get("id2label")
    known = {"num_labels": len(labels)} if labels else {}
    return tuple((known | dict(overrides)).get(key) for key in _COMPUTES)


def shared_copy(model: PreTrainedModel, memo: dict[int, Any] | None = None) -> PreTrainedModel:
    """The module tree anew, each parameter and buffer a new object over the same memory.

    `.data` of a copy's tensor may be set without touching the original; writing into it may not.
    `memo` is deepcopy's: id of an object → what stands in its place.
    """
    aliases = {id(tensor): _alias(tensor) for _, tensor in named_tensors(model)}
    return copy.deepcopy(model, aliases | (memo or {}))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, by its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()


def _alias(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return copy.copy(tensor)  # 4 bits: keeps the class and the quantisation constants
    return tensor.detach()


def _point(tensor: Tensor, own: Tensor) -> None:
    tensor.data = own.data
    if hasattr(own, "quant_state"):
        tensor.quant_state = own.quant_state  # type: ignore[attr-defined]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether both hold the same bits, the constants of 4-bit weights included."""
    pairs = zip(
        (one, *_quantisation_constants(one)),
        (other, *_quantisation_constants(other)),
        strict=False,
    )
    return type(one) is type(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs
    )


def _quantisation_constants(tensor: Tensor) -> list[Tensor]:
    state: Any = getattr(tensor, "quant_state", None)
    found = []
    while state is not None:
        found += [part for part in (state.absmax, state.code, state.offset) if part is not None]
        state = state.state2
    return found


def _fits(model: nn.Module, shell: nn.Module) -> bool:
    """Whether the model has the shell's parameters."""
    own, wanted = (
        {name: _shape(tensor) for name, tensor in side.named_parameters()}
        for side in (model, shell)
    )
    return own == wanted


def _shape(tensor: Tensor) -> torch.Size:
    state: Any = getattr(tensor, "quant_state", None)
    return tensor.shape if state is None else torch.Size(state.shape)
