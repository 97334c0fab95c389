"""Any other adapter that PEFT knows, by `peft_type` and the keys of its config class.

Named by `method.type: peft`; stands on the functions of `methods.lora`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, model_validator

from peftkit.contracts import Delta, LoadOptions, ParameterGroup
from peftkit.errors import suggestion
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_SET_BY_PEFTKIT = {"base_model_name_or_path", "inference_mode", "revision", "task_type"}


class PeftConfig(Section):
    """An adapter of PEFT. Further keys are those of the config class that `peft_type` names."""

    model_config = ConfigDict(extra="allow")

    type: Literal["peft"] = "peft"
    peft_type: str
    """PEFT's name, e.g. IA3, LOHA, VERA, OFT, PREFIX_TUNING, P_TUNING."""

    @model_validator(mode="after")
    def _keys_of_the_named_config(self) -> Self:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        if self.peft_type == "LORA":
            raise ValueError("peft_type 'LORA' has a method of its own; write type: lora")
        if self.peft_type == "ADALORA":
            raise ValueError(
                "peft_type 'ADALORA' moves ranks between layers during training, which the "
                "training loop does not do; take method lora with a rank_pattern"
            )
        known = {
            peft_type.value: config for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        }
        if self.peft_type not in known:
            raise ValueError(
                f"peft_type '{self.peft_type}' is unknown; {suggestion(self.peft_type, known)}"
            )
        allowed = {f.name for f in dataclasses.fields(known[self.peft_type])} - _SET_BY_PEFTKIT
        unknown = sorted(set(self.settings) - allowed - {"peft_type"})
        if unknown:
            hints = "; ".join(f"'{key}' ({suggestion(key, allowed)})" for key in unknown)
            raise ValueError(f"no keys of {known[self.peft_type].__name__}: {hints}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of PEFT's config class."""
        return {"peft_type": self.peft_type, **(self.__pydantic_extra__ or {})}


class Peft:
    """Trains one of PEFT's adapters, and the head."""

    Config = PeftConfig

    def __init__(self, config: PeftConfig) -> None:
        self.config = config

    def load_options(self) -> LoadOptions:
        """Frozen, so held in the 16-bit type of the run."""
        return LoadOptions(frozen=True)

    def prepare(self, model: "PreTrainedModel") -> "nn.Module":
        """Wrap the model with PEFT; adapter and head train."""
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        from peftkit.methods.lora import wrap

        settings = self.config.settings
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
        if "modules_to_save" in {f.name for f in dataclasses.fields(config_class)}:
            settings["modules_to_save"] = settings.get("modules_to_save") or []
        return wrap(model, settings)

    def parameter_groups(self, model: "nn.Module", learning_rate: float) -> list[ParameterGroup]:
        """One group of all that trains."""
        from peftkit.modeling.parameters import trainable_parameters

        return [ParameterGroup(list(trainable_parameters(model).values()), learning_rate)]

    def delta(self, model: "nn.Module") -> Delta:
        """PEFT's adapter."""
        from peftkit.modeling.deltas import adapter_delta

        return adapter_delta(model)
