"""Plain LoRA deltas combined to one, layer by layer, by PEFT's `add_weighted_adapter`.

Called by `combining`. PEFT combines adapters of a whole model; here its model is one layer, because
on a whole one it gives the result the settings of the first adapter: with rsLoRA the result is
scaled by sqrt(R) once more, layers that only the others adapt get lost, `cat` pads with zeros, and
an svd of full rank breaks layers that are not square.

Legend: I and O a layer's input and output widths, R adapter rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.contracts import Delta
from peftkit.merging.folding import Fold
from peftkit.merging.lora_delta import PREFIX, Factors, NormHeld, lora_config
from peftkit.merging.parents import Parents
from peftkit.merging.plan import decomposes
from peftkit.merging.task_vectors import Arithmetic


@dataclass(frozen=True)
class LoraCombination:
    """The combined delta, and what an svd kept; `exact` if that is all."""

    delta: Delta
    norm: NormHeld | None
    exact: bool


def combined_lora(parents: Parents, arithmetic: Arithmetic) -> LoraCombination:
    """One LoRA delta from several; whole modules beside the factors go with them."""
    layers = [_layers(fold) for fold in parents.folds]
    names = [name for name in _union(layers) if name in dict(parents.shell.named_modules())]
    found, norm = {}, NormHeld()
    exact = arithmetic.combine in ("cat", "svd")
    with arithmetic.drawing():
        for name in names:
            parts = [own.get(name) for own in layers]
            found[name], kept = combined_factors(parts, arithmetic)
            norm += kept
            ranks = sum(part.rank for part in parts if part)
            exact &= found[name].rank >= min(ranks, *found[name].widths)
        whole = _whole(parents, arithmetic, set(names))
    tensors = {k: t for name, factors in found.items() for k, t in factors.named(name).items()}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    config = _config(parents, found, whole)
    decomposed = norm if decomposes(arithmetic.combine) else None
    return LoraCombination(Delta("adapter", tensors, config), decomposed, exact)


def combined_factors(parts: Sequence[Factors | None], how: Arithmetic) -> tuple[Factors, NormHeld]:
    """One layer's factors from those of each delta, None where a delta leaves the layer alone.

    An svd is made at full rank and cut: the norms of its B's columns are the singular values.
    """
    given = [part for part in parts if part]
    if how.combine == "cat":
        pairs = [(part, w) for part, w in zip(parts, how.weights, strict=True) if part]
    else:  # PEFT prunes nothing of a delta that is alone in a layer: the others count as zeros
        pairs = [(part or _zeros(given[0]), w) for part, w in zip(parts, how.weights, strict=True)]
    a, b = _through_peft(pairs, how)
    if not decomposes(how.combine):
        return Factors(a, b, embedding=given[0].embedding), NormHeld()
    singular = b.double().square().sum(0)
    rank = min(how.rank or sum(part.rank for part in given), len(singular))
    kept = NormHeld(float(singular[:rank].sum()), float(singular.sum()))
    a, b = a[:rank].float().contiguous(), b[:, :rank].float().contiguous()
    return Factors(a, b, embedding=given[0].embedding), kept


def _through_peft(pairs: Sequence[tuple[Factors, float]], how: Arithmetic) -> tuple[Tensor, Tensor]:
    from peft import LoraConfig, get_peft_model

    widths = pairs[0][0].widths
    # In float32 an svd of a wide layer comes near the bound of the verification.
    dtype = torch.float64 if decomposes(how.combine) else torch.float32
    # An embedding's factors combine like those of a linear layer from V to its width.
    model: Any = nn.Sequential(nn.utils.skip_init(nn.Linear, *widths, bias=False))
    keys = [f"source{number}" for number in range(len(pairs))]
    for key, (part, _) in zip(keys, pairs, strict=True):
        config = LoraConfig(r=part.rank, lora_alpha=part.rank, target_modules=["0"])
        if key == keys[0]:
            model = get_peft_model(model, config, adapter_name=key)
        else:
            model.add_adapter(key, config)
        layer = model.base_model.model[0]
        layer.lora_A[key].weight.data = part.a.to(dtype)
        layer.lora_B[key].weight.data = part.b.to(dtype)
        layer.scaling[key] = part.scaling
    model.base_model.add_weighted_adapter(
        keys,
        [weight for _, weight in pairs],
        "combined",
        combination_type=how.combine,
        density=how.density,
        svd_rank=min(widths),
        svd_full_matrices=False,
    )
    a, b = layer.lora_A["combined"].weight, layer.lora_B["combined"].weight
    return a.detach(), b.detach() * layer.scaling["combined"]


def _zeros(like: Factors) -> Factors:
    return Factors(torch.zeros_like(like.a), torch.zeros_like(like.b), like.scaling)


def _layers(fold: Fold) -> dict[str, Factors]:
    """Name of each adapted layer → its factors."""
    from peft.tuners.lora import Embedding, LoraLayer

    found = {}
    for name, layer in fold.carrier.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        embedding = isinstance(layer, Embedding)
        if embedding:
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaling = layer.scaling["default"]
        found[name] = Factors(a.detach().float(), b.detach().float(), scaling, embedding)
    return found


def _union(layers: Sequence[dict[str, Factors]]) -> list[str]:
    return sorted({name for own in layers for name in own})


def _whole(parents: Parents, arithmetic: Arithmetic, layers: set[str]) -> dict[str, Tensor]:
    """Tensors beside the factors, by their names in the model: saved modules and the head."""
    names = [name for name in parents.body() if name.rpartition(".")[0] not in layers]
    body = {name: parents.base(name) + arithmetic(parents.task_vectors(name)) for name in names}
    return {**body, **parents.head()}


def _config(
    parents: Parents, layers: dict[str, Factors], whole: dict[str, Tensor]
) -> dict[str, Any]:
    configs = [source.delta.adapter_config or {} for source in parents.sources.every]
    head = parents.sources.head.delta.adapter_config or {}
    taken = {key: head.get(key) for key in ("task_type", "base_model_name_or_path", "revision")}
    return lora_config(
        {**taken, "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs)},
        ranks={name: factors.rank for name, factors in layers.items()},
        saved=_saved_modules(parents, whole),
    )


def _saved_modules(parents: Parents, whole: dict[str, Tensor]) -> list[str]:
    """The outermost modules that the sources save whole, as far as the result has them."""
    from peft.utils.other import ModulesToSaveWrapper

    found = {
        name
        for fold in parents.folds
        for name, module in fold.carrier.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        and any(tensor.startswith(f"{name}.") for tensor in whole)
    }
    return sorted(n for n in found if not any(n.startswith(f"{outer}.") for outer in found))
