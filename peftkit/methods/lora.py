"""LoRA and its kin (DoRA, rsLoRA, PiSSA, OLoRA) through PEFT.

Named by `method.type: lora`; `qlora` and `peft` build on the functions here.

Legend: R adapter rank, I and O a layer's input and output widths.
"""

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from peftkit.contracts import Delta, LoadOptions, ParameterGroup
from peftkit.errors import MethodError
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_OWN_KEYS = {"type", "loraplus_lr_ratio", "quant_type", "double_quant", "compute_dtype"}


class LoraConfig(Section):
    """LoRA; the keys are those of `peft.LoraConfig` and mean the same."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=8, gt=0)
    """Rank of the update."""
    lora_alpha: int = Field(default=16, gt=0)
    """The update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: list[str] | str = "all-linear"
    """Names of modules, one regular expression, or `all-linear`."""
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] = []
    """Modules to train in full besides the head, which always trains."""
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    """Rank-stabilised scaling. Source: arXiv:2312.03732."""
    use_dora: bool = False
    """Weight-decomposed LoRA. Source: arXiv:2402.09353."""
    init_lora_weights: bool | str = True
    """true, `gaussian`, `orthogonal`, `olora`, `pissa` or `pissa_niter_<n>` (arXiv:2404.02948)."""
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int] = {}
    trainable_token_indices: list[int] | None = None
    """Rows of the input embedding to train."""
    target_parameters: list[str] | None = None
    """Parameters to adapt that are no module of their own, e.g. of a mixture of experts."""
    fan_in_fan_out: bool = False
    """true where weights are stored (I, O), as in GPT-2."""
    lora_bias: bool = False
    loraplus_lr_ratio: float | None = Field(default=None, gt=0.0)
    """Learning rate of the B matrices over that of the A matrices. Source: arXiv:2402.12354."""

    @field_validator("init_lora_weights")
    @classmethod
    def _known_initialisation(cls, value: bool | str) -> bool | str:
        names = "gaussian|orthogonal|olora|pissa|pissa_niter_[1-9][0-9]*"
        if isinstance(value, str) and not re.fullmatch(names, value):
            raise ValueError(
                f"'{value}' is unknown; allowed: true, false, gaussian, orthogonal, olora, pissa, "
                "pissa_niter_<n> (others need calibration data)"
            )
        return value

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _expression(cls, value: list[str] | str | None) -> list[str] | str | None:
        if isinstance(value, str):
            check_expressions([value])
        return value

    @field_validator("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
    @classmethod
    def _expressions(cls, value: Any) -> Any:
        check_expressions([value] if isinstance(value, str) else value or ())
        return value

    @model_validator(mode="after")
    def _convertible(self) -> Self:
        if self.changes_base and (self.use_dora or self.use_rslora):
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} changes the base's weights and is "
                "stored as plain LoRA, which use_dora and use_rslora do not allow"
            )
        return self

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation moves part of the base's weights into the adapter."""
        name = self.init_lora_weights
        return isinstance(name, str) and name.startswith(("pissa", "olora"))


def check_expressions(patterns: Iterable[str]) -> None:
    """Refuse what PEFT could not use as a regular expression.

    Raises:
        ValueError: one of them is none.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from None


class Lora:
    """Trains low-rank updates of linear layers, and the head."""

    Config = LoraConfig

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._initial: dict[str, Tensor] = {}

    def load_options(self) -> LoadOptions:
        """Frozen, so held in the 16-bit type of the run, unless its rounding would be learnt from.

        PiSSA and OLoRA subtract from the base what the adapter starts with. In 16 bits the rest
        would be rounded, and the stored adapter would not make up for it on the first base.
        """
        return LoadOptions(frozen=True, keeps_float32=self.config.changes_base)

    def prepare(self, model: "PreTrainedModel") -> "nn.Module":
        """Wrap the model with PEFT; adapters and head train."""
        from peftkit.modeling.deltas import adapter_delta

        settings = self.config.model_dump(exclude=_OWN_KEYS, exclude_none=True)
        adapted = wrap(model, {**settings, "peft_type": "LORA"})
        if self.config.changes_base:
            self._initial = adapter_delta(adapted).tensors
        return adapted

    def parameter_groups(self, model: "nn.Module", learning_rate: float) -> list[ParameterGroup]:
        """One group, or two when the B matrices have a rate of their own (LoRA+)."""
        from peftkit.modeling.parameters import trainable_parameters

        ratio = self.config.loraplus_lr_ratio or 1.0
        slow: list[nn.Parameter] = []
        fast: list[nn.Parameter] = []
        for name, parameter in trainable_parameters(model).items():
            is_b = ".lora_B." in name or ".lora_embedding_B." in name
            (fast if is_b and ratio != 1.0 else slow).append(parameter)
        groups = [ParameterGroup(slow, learning_rate)]
        return [*groups, ParameterGroup(fast, learning_rate * ratio)] if fast else groups

    def delta(self, model: "nn.Module") -> Delta:
        """PEFT's adapter; after PiSSA or OLoRA as an equal LoRA over the unchanged base."""
        from peftkit.modeling.deltas import adapter_delta

        delta = adapter_delta(model)
        return _over_original_base(delta, self._initial) if self._initial else delta


def wrap(model: "PreTrainedModel", settings: dict[str, Any]) -> "nn.Module":
    """Give `model` the adapter that PEFT's `settings` describe, the head trained with it.

    Raises:
        MethodError: target modules that the model lacks, settings that PEFT refuses, or an
            adapter of which PEFT would not save all that trains.
    """
    from peftkit.modeling.libraries import import_peft

    import_peft()
    from peft import PeftConfig, get_peft_model

    from peftkit.modeling.deltas import adapter_delta
    from peftkit.modeling.parameters import head_modules
    from peftkit.modeling.patterns import check_settings

    heads = head_modules(model)
    check_settings(model, settings)
    settings = {**settings, "task_type": task_type(model)}
    if "modules_to_save" in settings:
        # PEFT puts no adapter inside these, whatever `target_modules` matches.
        settings["modules_to_save"] = [*heads, *settings["modules_to_save"]]
    try:
        with warnings.catch_warnings():
            # PEFT still asks transformers for `is_gradient_checkpointing`.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # It sets it right for the layer at hand and only says so.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            adapted = get_peft_model(model, PeftConfig.from_peft_type(**settings))
    except (TypeError, ValueError) as error:
        raise MethodError(f"method: PEFT refuses it: {' '.join(str(error).split())}") from error
    adapter_delta(adapted)  # what could not be saved is refused now, not after the training
    _check_heads(adapted, heads, settings)
    return adapted  # type: ignore[no-any-return]


def _check_heads(adapted: "nn.Module", heads: list[str], settings: dict[str, Any]) -> None:
    """Every head must train: a few of PEFT's adapters leave it as it was drawn, and unsaved."""
    from peftkit.modeling.parameters import trainable_parameters

    trained = trainable_parameters(adapted)
    still = [head for head in heads if not any(f".{head}." in f".{name}" for name in trained)]
    if still:
        raise MethodError(
            f"method: peft_type {settings['peft_type']} does not train the head "
            f"({', '.join(still)}), so the task could not be learnt; take another"
        )


def task_type(model: "PreTrainedModel") -> str | None:
    """PEFT's word for what the model is for, by the name of its class."""
    by_suffix = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    name = type(model).__name__
    return next((word for suffix, word in by_suffix.items() if name.endswith(suffix)), None)


def _over_original_base(delta: Delta, initial: "dict[str, Tensor]") -> Delta:
    """The same model as a LoRA of rank 2R over the base before its initialisation.

    W - B0·A0 + B·A = W + [B, -B0]·[A; A0], with A (R, I) and B (O, R). Source: PEFT,
    `LoraModel.subtract_mutated_init`.
    """
    import torch

    tensors = dict(delta.tensors)
    for name, tensor in delta.tensors.items():
        if ".lora_A." in name or name.endswith(".lora_embedding_A"):
            tensors[name] = torch.cat([tensor, initial[name]], dim=0)
        elif ".lora_B." in name or name.endswith(".lora_embedding_B"):
            tensors[name] = torch.cat([tensor, -initial[name]], dim=1)
    settings = dict(delta.adapter_config or {})
    settings["r"], settings["lora_alpha"] = 2 * settings["r"], 2 * settings["lora_alpha"]
    for pattern in ("rank_pattern", "alpha_pattern"):
        settings[pattern] = {name: 2 * value for name, value in settings[pattern].items()}
    settings["init_lora_weights"] = True
    return Delta("adapter", tensors, settings)
