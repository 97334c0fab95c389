"""The deltas that a plan names, read and compared with one another.

Called by `combining`; stands on `registry`. What can be refused without a model is refused here,
all of it at once.

Legend: I input width of a layer, R adapter rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from peftkit.contracts import Delta
from peftkit.errors import PeftkitError, RegistryError
from peftkit.merging.plan import ON_WEIGHTS, CombinePlan, averages, decomposes
from peftkit.registry.fitting import held_by
from peftkit.registry.manifest import DeltaInfo
from peftkit.registry.store import Registry, StoredDelta

_OF_PLAIN_LORA = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
        *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora"),
        *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"),
        *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_lora_weights"),
        *("ensure_weight_tying", "qalora_group_size"),
    }
)
"""Settings that leave a LoRA layer B·A with a scaling; any other must have its default."""


@dataclass(frozen=True)
class Source:
    """A stored delta that becomes a part of another, and its weight."""

    stored: StoredDelta
    delta: Delta
    weight: float

    @property
    def info(self) -> DeltaInfo:
        """What its manifest says."""
        return self.stored.info

    def __str__(self) -> str:
        return str(self.stored)


@dataclass(frozen=True)
class Sources:
    """Deltas that can be combined, and how."""

    every: list[Source]
    combine: str
    on_factors: bool
    """Whether the factors of plain LoRA are combined, or the weights that the deltas change."""
    head: Source
    """Whose task, labels, recipe and model the result takes."""
    average_heads: bool

    @property
    def weights(self) -> list[float]:
        """In the order of the deltas."""
        return [source.weight for source in self.every]

    @property
    def sum_weights(self) -> list[float]:
        """Those of the weighted sum that the method stands for.

        TIES divides by the number of deltas that agree, and so stands for a mean.
        """
        count = len(self.every) if averages(self.combine) else 1
        return [weight / count for weight in self.weights]


def read_sources(registry: Registry, plan: CombinePlan) -> Sources:
    """Find and read the deltas of a plan.

    Raises:
        RegistryError: unknown or damaged ones, and whatever keeps them from being combined; a line
            for each problem.
    """
    problems: list[str] = []
    found: dict[str, Source] = {}
    for entry in plan.deltas:
        try:
            stored = registry.find(entry.name)
            found[entry.name] = Source(stored, registry.read_delta(stored), 0.0)
        except PeftkitError as error:
            problems += error.problems
    every = list(found.values())
    on_factors = _factors_suffice(every)
    combine = plan.combine or ("cat" if on_factors else "linear")
    problems += _repeated(found) + _other_bases(every) + _unfit(every, combine, on_factors)
    problems += [] if plan.head_from else _other_heads(every)
    weights = plan.weights(combine)
    if problems:
        raise RegistryError(problems)
    weighted = {
        name: replace(source, weight=weight)
        for (name, source), weight in zip(found.items(), weights, strict=True)
    }
    head = weighted[plan.head_from or plan.deltas[0].name]
    return Sources(
        list(weighted.values()), combine, on_factors, head, average_heads=not plan.head_from
    )


def _repeated(found: dict[str, Source]) -> list[str]:
    """The same manifest under two references."""
    first: dict[str, str] = {}
    problems = []
    for name, source in found.items():
        other = first.setdefault(source.stored.digest, name)
        if other != name:
            problems.append(f"{name}: the same delta as {other}; name each once")
    return problems


def _other_bases(sources: Sequence[Source]) -> list[str]:
    """What differs in the bases of the deltas, or in how they held them."""
    facts: dict[str, Callable[[DeltaInfo], Any]] = {
        "weights": lambda info: info.base_digest,
        "tokenizer": lambda info: info.tokenizer_digest,
        "config": lambda info: info.base_config,
        "quantisation": lambda info: _quantisation(info),
        "precision": lambda info: _precision(info),
    }
    problems = []
    for source in sources[1:]:
        for what, fact in facts.items():
            first, found = fact(sources[0].info), fact(source.info)
            if first != found and None not in (first, found):
                problems.append(
                    f"{source}: its base has {what} {found}, that of {sources[0]} has {first}; "
                    "only deltas over one base can be combined"
                )
    return problems


def _quantisation(info: DeltaInfo) -> str:
    if info.quantisation is None:
        return "none"
    return f"{info.quantisation.quant_type} (double_quant {info.quantisation.double_quant})"


def _precision(info: DeltaInfo) -> str:
    held = str(held_by(info).dtype).removeprefix("torch.")
    return f"{held} (mixed precision {info.model['mixed_precision']})"


def _other_heads(sources: Sequence[Source]) -> list[str]:
    return [
        f"{source}: its head is {head_of(source.info)}, that of {sources[0]} is "
        f"{head_of(sources[0].info)}; only equal heads are averaged, so name the delta whose head "
        "the result takes with head_from"
        for source in sources[1:]
        if head_of(source.info) != head_of(sources[0].info)
    ]


def head_of(info: DeltaInfo) -> str:
    """What the head of a delta answers, in words that differ where heads do."""
    config = info.model["config"]
    labels = f"for {', '.join(info.labels)}" if info.labels else "without labels"
    outputs = f"{config.get('num_labels')} outputs, {config.get('problem_type')}"
    return f"{info.model['auto_class']} {labels} ({outputs})"


def _unfit(sources: Sequence[Source], combine: str, on_factors: bool) -> list[str]:
    """Deltas that the method cannot combine."""
    if on_factors:
        return [] if combine == "cat" or decomposes(combine) else _other_ranks(sources, combine)
    prompts = [source for source in sources if _is_prompt(source.delta)]
    problems = [
        f"{source}: {_peft_type(source.delta)} works beside the base's weights, so there is "
        "nothing that could be combined"
        for source in prompts
    ]
    if combine not in ON_WEIGHTS and not prompts:
        others = [f"{s} is {why}" for s in sources if (why := not_plain_lora(s.delta))]
        problems.append(
            f"combine: '{combine}' joins the factors of plain LoRA deltas, and "
            f"{'; '.join(others or ['what one of them adapts, another saves whole'])}; take "
            f"linear, which adds the changed weights exactly, or another of {', '.join(ON_WEIGHTS)}"
        )
    return problems + [
        f"{source}: its base is held in 4 bits, where changed weights have no place; combine plain "
        "LoRA deltas over it, by cat or svd"
        for source in sources
        if source.info.quantisation
    ]


def _other_ranks(sources: Sequence[Source], combine: str) -> list[str]:
    """The first layer of each delta in which its factors have another rank than those before."""
    known: dict[str, tuple[Source, int]] = {}
    problems = []
    for source in sources:
        for layer, factor in sorted(_factors(source.delta).items()):
            rank = factor.shape[0]
            other, expected = known.setdefault(layer, (source, rank))
            if rank != expected:
                problems.append(
                    f"{source}: rank {rank} in {layer}, {other} has {expected}; '{combine}' adds "
                    "factors of one rank only, so take cat or svd"
                )
                break
    return problems


def _factors(delta: Delta) -> dict[str, Tensor]:
    """Layer → the A (R, I) of an adapter's factors."""
    return {
        name.partition(".lora_")[0].removeprefix("base_model.model."): tensor
        for name, tensor in delta.tensors.items()
        if ".lora_A." in name or ".lora_embedding_A" in name
    }


def _factors_suffice(sources: Sequence[Source]) -> bool:
    """Whether the deltas are plain LoRA, and none saves whole what another adapts."""
    if any(not_plain_lora(source.delta) for source in sources):
        return False
    layers = tuple(f"{layer}." for source in sources for layer in _factors(source.delta))
    names = (name for source in sources for name in source.delta.tensors if ".lora_" not in name)
    return not any(name.removeprefix("base_model.model.").startswith(layers) for name in names)


def _peft_type(delta: Delta) -> str:
    return str((delta.adapter_config or {}).get("peft_type"))


def _is_prompt(delta: Delta) -> bool:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig

    by_name = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return issubclass(by_name.get(_peft_type(delta), object), PromptLearningConfig)


def not_plain_lora(delta: Delta) -> str | None:
    """What a delta is if it is no LoRA of plain factors."""
    from peft import LoraConfig

    config = delta.adapter_config
    if config is None:
        return f"of kind {delta.kind}"
    if config["peft_type"] != "LORA":
        return str(config["peft_type"])
    usual = LoraConfig().to_dict()
    strange = [
        f"{key} {value!r}"
        for key, value in sorted(config.items())
        if key not in _OF_PLAIN_LORA and (value or None) != (usual.get(key) or None)
    ]
    return f"a LoRA with {', '.join(strange)}" if strange else None
