"""Loading a base model in the precision and quantisation that a method asks for.

Called by the experiment before `method.prepare`, and by the registry to rebuild a trained model.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from peftkit.contracts import LoadOptions
from peftkit.errors import SourceError
from peftkit.modeling.config import read_config
from peftkit.modeling.four_bit import four_bit_config, keep_cpu_weights_unpacked
from peftkit.modeling.parameters import head_modules, mark_new, pooler_modules

HELD_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Mixed precision of the run → dtype in which a frozen base is held."""

_DROPOUT_KEY = re.compile(r"(\w+_)?p?drop(out)?(_prob|_rate|_p)?")
"""Every spelling in transformers' configs; not `…_layerdrop`, which drops whole blocks."""

CONFIG_OVERRIDES = frozenset({"id2label", "label2id", "num_labels", "pad_token_id", "problem_type"})
"""Keys of the base's config that a task may set: none of them chooses files or code."""


@dataclass(frozen=True)
class ModelSpec:
    """What to build on top of a base's files.

    `auto_class` names a transformers Auto class; `config` overrides keys of the base's config;
    `dropout` sets every dropout probability that the config has; `mixed_precision` is
    Accelerate's word (`no`, `bf16`, `fp16`).
    """

    auto_class: str
    config: Mapping[str, Any] = field(default_factory=dict)
    dropout: float | None = None
    mixed_precision: str = "no"


def load_model(
    folder: Path, spec: ModelSpec, options: LoadOptions, *, to_be_sharded: bool = False
) -> PreTrainedModel:
    """Load the base on the CPU with the task's head, freshly initialised from torch's RNG.

    No code of the base runs, whatever its config asks for. A base in 4 bits is quantised on this
    process's device; `to_be_sharded` keeps its bits in a floating-point type, which FSDP2 needs.

    Raises:
        SourceError: the base has no such architecture or needs code of its own, its files are
            quantised, its weights do not fit its config, or the spec sets more of the config than
            a task may.
    """
    config = spec_config(folder, spec)
    _refuse_quantised(folder, config)
    auto_class = getattr(transformers, spec.auto_class)
    dtype = held_dtype(spec, options)
    quantised = options.quantisation
    four_bit = None
    if quantised:
        four_bit = four_bit_config(quantised, dtype, skeleton(spec, config))
        if to_be_sharded:
            four_bit.bnb_4bit_quant_storage = dtype
    with QuietLoading():
        model, report = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype if options.frozen or quantised else torch.float32,
            quantization_config=four_bit,
            device_map=_device_map() if quantised else None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    _check_report(folder, model, report)
    if quantised:
        keep_cpu_weights_unpacked(model)
    return model  # type: ignore[no-any-return]


def _refuse_quantised(folder: Path, config: PretrainedConfig) -> None:
    """A base's memory, digest and merges are told of the weights before they are quantised."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        kind = found.get("quant_method", "?") if isinstance(found, dict) else type(found).__name__
        raise SourceError(
            f"{folder}: its files are quantised already ({kind}); take the base in 16 or 32 bits, "
            "which method.type: qlora quantises as it is loaded"
        )


def skeleton(spec: ModelSpec, config: PretrainedConfig) -> PreTrainedModel:
    """The spec's model on the meta device, without weights; `config` is `spec_config`'s."""
    with torch.device("meta"):
        return getattr(transformers, spec.auto_class).from_config(config)  # type: ignore[no-any-return]


def held_dtype(spec: ModelSpec, options: LoadOptions) -> torch.dtype:
    """The dtype of what is frozen."""
    return torch.float32 if options.keeps_float32 else HELD_DTYPES[spec.mixed_precision]


def spec_config(folder: Path, spec: ModelSpec) -> Any:
    """The base's config with the spec's overrides and dropout.

    Raises:
        SourceError: no such architecture, or the spec sets more of the config than a task may.
    """
    if strange := sorted(spec.config.keys() - CONFIG_OVERRIDES):
        allowed = ", ".join(sorted(CONFIG_OVERRIDES))
        raise SourceError(f"{folder}: config keys {', '.join(strange)} are not set; only {allowed}")
    config = read_config(folder, **spec.config)
    if not (spec.auto_class.startswith("AutoModelFor") and hasattr(transformers, spec.auto_class)):
        raise SourceError(
            f"{folder}: '{spec.auto_class}' is no AutoModelFor… class of transformers"
        )
    known = getattr(transformers, spec.auto_class)._model_mapping
    if type(config) not in known:
        raise SourceError(
            f"{folder}: a base of type '{config.model_type}' has no {spec.auto_class}; "
            "take a base with that architecture or another task"
        )
    if _reads_both_ways(config, spec.auto_class):
        raise SourceError(
            f"{folder}: a base of type '{config.model_type}' reads in both directions, so it would "
            "see what it is to write; take a causal language model"
        )
    if spec.dropout is not None:
        set_dropout(config, spec.dropout)
    return config


def _reads_both_ways(config: PretrainedConfig, auto_class: str) -> bool:
    """Whether a language model's tokens see what follows: an encoder's do, if it is no decoder."""
    is_encoder = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    is_decoder = getattr(config, "is_decoder", False)
    return auto_class == "AutoModelForCausalLM" and is_encoder and not is_decoder


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Give every dropout of a config the same probability, in place."""
    for key, value in config.to_dict().items():
        if _DROPOUT_KEY.fullmatch(key) and (value is None or type(value) in (int, float)):
            setattr(config, key, probability)


def _device_map() -> dict[str, Any]:
    """The whole model on this process's device: each rank quantises its own copy."""
    from accelerate import PartialState

    return {"": PartialState().device}


def _check_report(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Accept new weights only in heads and poolers; mark their modules as new."""
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    missing = set(report["missing_keys"]) | mismatched
    poolers = pooler_modules(model)
    new = {*head_modules(model), *(n for n, m in model.named_modules() if m in poolers)}
    strange = sorted(k for k in missing if not any(k.startswith(f"{name}.") for name in new))
    problems = [
        f"{folder}: '{key}' of {type(model).__name__} "
        + ("has another shape than" if key in mismatched else "is missing from")
        + " the base's files"
        for key in strange[:10]
    ]
    if len(strange) > len(problems):
        problems.append(f"{folder}: and {len(strange) - len(problems)} more tensors")
    if problems:
        raise SourceError(problems)
    for name in {key.rpartition(".")[0] for key in missing}:
        mark_new(model.get_submodule(name))


class QuietLoading:
    """Silences the progress bar and the load report, which the caller looks at itself."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self._verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity(logging.CRITICAL)
        hf_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity(self._verbosity)
