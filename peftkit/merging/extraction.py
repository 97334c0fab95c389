"""A LoRA of a chosen rank out of a full fine-tune or top layers, by singular values.

Called by the `extract` verb. Linear layers give their largest singular values, heads stay whole,
and what a LoRA has no place for (norms, biases, embeddings) is counted and left out.
Source: LoRD, arXiv:2403.00212; mergekit's `extract_lora`.

Legend: I and O a layer's input and output widths, R adapter rank.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkit.contracts import Delta
from peftkit.errors import RegistryError, UsageError
from peftkit.merging.checking import checked, save_and_read_back
from peftkit.merging.derived import derived_info, derived_pairs, derived_plain
from peftkit.merging.folding import empty_model
from peftkit.merging.held_base import HeldBase
from peftkit.merging.lora_delta import PREFIX, Factors, NormHeld, lora_config
from peftkit.merging.parents import head_tensors
from peftkit.merging.sources import Source
from peftkit.methods.lora import task_type
from peftkit.modeling.parameters import head_modules
from peftkit.registry.base import base_of
from peftkit.registry.manifest import DeltaInfo
from peftkit.registry.names import check_name
from peftkit.registry.store import Registry, StoredDelta

EXACT_SHARE = 1 - 1e-12
"""Of the norm: what float32 loses of a change whose rank is not above the chosen one."""
FULL_SVD = 1024
"""Width up to which every singular value is computed; above, the largest are approximated."""
ITERATIONS = 8
"""Of the approximation: its error falls with (σ_{R+1} / σ_R) to twice this power."""


@dataclass(frozen=True)
class Extracted:
    """What was saved; its info says how it was made and verified."""

    stored: StoredDelta

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return derived_plain(self.stored)

    def pairs(self) -> list[tuple[str, str]]:
        """As lines for a person."""
        info = self.stored.info
        method = info.method
        return [
            ("saved", f"{self.stored} (adapter of rank {method['rank']})"),
            ("extracted from", info.parents[0].reference),
            ("norm held", f"{method['norm_held']:.2%} of the change below the head"),
            ("in layers", f"{method['norm_held_in_layers']:.2%} of {method['layers']} linear ones"),
            ("left out", f"{method['left_out']} changed norms, biases, embeddings and the like"),
            *derived_pairs(self.stored),
        ]


@dataclass
class _Parts:
    """What becomes of a weights delta."""

    factors: dict[str, Factors] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    in_layers: NormHeld = field(default_factory=NormHeld)
    left_out: dict[str, float] = field(default_factory=dict)
    """Name of a tensor that a LoRA has no place for → squared norm of its change."""

    @property
    def everywhere(self) -> NormHeld:
        return self.in_layers + NormHeld(0.0, sum(self.left_out.values()))


def extract(registry: Registry, reference: str, *, rank: int, save_as: str) -> Extracted:
    """Save the best LoRA of `rank` for what a delta of kind `weights` changes.

    Raises:
        UsageError: a rank below 1.
        RegistryError: unknown, damaged or an adapter already; nothing that a LoRA could hold; or a
            result that answers differently from what it was made of.
        SourceError: the base cannot be found.
    """
    if rank < 1:
        raise UsageError(f"extract: --rank {rank}: must be at least 1")
    check_name(save_as)
    stored = registry.find(reference)
    if stored.info.kind != "weights":
        raise RegistryError(
            f"{stored}: an adapter already; a LoRA is extracted from a delta of kind weights, such "
            "as a full fine-tune"
        )
    folder = base_of(stored)
    source = Source(stored, registry.read_delta(stored, base=folder), 1.0)
    base = HeldBase(folder, source.info)
    model = empty_model(folder, source.info, base.files)
    parts = _parts(source.delta, base, model, rank)
    if not parts.factors:
        raise RegistryError(f"{stored}: changes no linear layer below its head; nothing to extract")
    delta = _delta(parts, model, base_name=source.info.base_name)
    info = _info(source, _method(parts, rank))
    expected = ((name, tensor.float()) for name, tensor in source.delta.tensors.items())
    exact = parts.everywhere.share >= EXACT_SHARE
    info = checked(folder, info, delta, expected, exact=exact)
    return Extracted(save_and_read_back(registry, save_as, delta, info, folder))


def _parts(delta: Delta, base: HeldBase, model: PreTrainedModel, rank: int) -> _Parts:
    heads, layers = head_tensors(model), _linear_layers(model)
    parts = _Parts()
    for name, tensor in sorted(delta.tensors.items()):
        if name in heads:
            parts.head[name] = tensor
            continue
        change = tensor.float() - base(name)
        layer = name.removesuffix(".weight")
        if not change.any():
            continue
        if layer not in layers or layer == name:
            parts.left_out[name] = float(change.double().square().sum())
            continue
        wide = change.T if layers[layer] else change
        parts.factors[layer], held = low_rank(wide, rank)
        parts.in_layers += held
    return parts


def low_rank(change: Tensor, rank: int) -> tuple[Factors, NormHeld]:
    """The best factors B·A of `rank` for a change (O, I), each with the roots of the values."""
    rank = min(rank, *change.shape)
    if min(change.shape) <= FULL_SVD:
        u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            q = min(rank + 16, *change.shape)
            u, s, v = torch.svd_lowrank(change, q=q, niter=ITERATIONS)
            vh = v.T
    roots = s[:rank].sqrt()
    b, a = (u[:, :rank] * roots).float(), (roots[:, None] * vh[:rank]).float()
    whole = float(change.double().square().sum())
    lost = float((change.double() - b.double() @ a.double()).square().sum())
    return Factors(a.contiguous(), b.contiguous()), NormHeld(whole - lost, whole)


def _linear_layers(model: nn.Module) -> dict[str, bool]:
    """Name of each linear layer → whether its weight is stored (I, O), as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _delta(parts: _Parts, model: PreTrainedModel, *, base_name: str) -> Delta:
    tensors = {k: t for name, f in parts.factors.items() for k, t in f.named(name).items()}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in parts.head.items()}
    layers = _linear_layers(model)
    config = lora_config(
        {
            "task_type": task_type(model),
            "base_model_name_or_path": base_name,
            "fan_in_fan_out": any(layers[name] for name in parts.factors),
        },
        ranks={name: factors.rank for name, factors in parts.factors.items()},
        saved=head_modules(model),
    )
    return Delta("adapter", tensors, config)


def _method(parts: _Parts, rank: int) -> dict[str, Any]:
    return {
        "type": "extract",
        "rank": rank,
        "layers": len(parts.factors),
        "norm_held": parts.everywhere.share,
        "norm_held_in_layers": parts.in_layers.share,
        "left_out": len(parts.left_out),
    }


def _info(source: Source, method: dict[str, Any]) -> DeltaInfo:
    info = derived_info(source, [source], kind="adapter", method=method)
    if info.model["frozen"]:
        return info
    # The change was measured from the base in float32, whatever the run's precision.
    return info.model_copy(update={"model": {**info.model, "frozen": True, "keeps_float32": True}})
