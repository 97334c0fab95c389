"""Full fine-tuning: every parameter trains, and the delta holds every one of them.

Named by `method.type: full`; called by the experiment through `contracts.Method`.
"""

from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from peftkit.contracts import Delta, LoadOptions, ParameterGroup
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class FullConfig(Section):
    """Full fine-tuning."""

    type: Literal["full"] = "full"
    layerwise_lr_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Each block trains at this fraction of the rate of the block above it; embeddings at the
    rate of one more block below. 1 is one rate for all. Source: ELECTRA, arXiv:2003.10555."""


class Full:
    """Trains everything."""

    Config = FullConfig

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def load_options(self) -> LoadOptions:
        """In float32: these are the master weights of training."""
        return LoadOptions()

    def prepare(self, model: "PreTrainedModel") -> "nn.Module":
        """Unfreeze everything, in place."""
        from peftkit.modeling.parameters import unfreeze

        unfreeze(model)
        return model

    def parameter_groups(self, model: "nn.Module", learning_rate: float) -> list[ParameterGroup]:
        """One group, or one for each depth when the rate decays by layer."""
        from peftkit.modeling.parameters import layer_depths, trainable_parameters

        parameters = trainable_parameters(model)
        if self.config.layerwise_lr_decay == 1.0:
            return [ParameterGroup(list(parameters.values()), learning_rate)]
        depths = layer_depths(cast("PreTrainedModel", model))
        top = max(depths.values())
        groups: dict[int, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(depths[name], []).append(parameter)
        return [
            ParameterGroup(members, learning_rate * self.config.layerwise_lr_decay ** (top - depth))
            for depth, members in sorted(groups.items())
        ]

    def delta(self, model: "nn.Module") -> Delta:
        """All parameters."""
        from peftkit.modeling.deltas import weights_delta

        return weights_delta(model)
