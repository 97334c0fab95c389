"""Top-layer freezing: the last blocks, the pooler and the head train, the rest stands still.

Named by `method.type: top_layers`; called by the experiment through `contracts.Method`.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftkit.contracts import Delta, LoadOptions, ParameterGroup
from peftkit.errors import MethodError
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class TopLayersConfig(Section):
    """Top-layer freezing."""

    type: Literal["top_layers"] = "top_layers"
    num_layers: int = Field(default=2, ge=0)
    """How many of the last blocks train, besides the pooler and the head; 0 is the head (and
    pooler) only. Embeddings are always frozen."""


class TopLayers:
    """Trains the top of the model.

    The frozen embeddings and blocks run in eval mode, without dropout, also while the rest trains:
    they compute the same features for a text in every epoch. Dropout there would only add noise
    to features that cannot adapt to it.
    """

    Config = TopLayersConfig

    def __init__(self, config: TopLayersConfig) -> None:
        self.config = config

    def load_options(self) -> LoadOptions:
        """In float32; what stays frozen is then held in the 16-bit type of the run."""
        return LoadOptions()

    def prepare(self, model: "PreTrainedModel") -> "nn.Module":
        """Freeze all, then unfreeze the last blocks, the pooler and the head, in place."""
        from peftkit.modeling import parameters

        blocks = parameters.transformer_blocks(model)
        count = self.config.num_layers
        if count > len(blocks):
            raise MethodError(
                f"method: num_layers is {count}, but {type(model).__name__} has "
                f"{len(blocks)} blocks; take 0 to {len(blocks)}"
            )
        trained = [*blocks[len(blocks) - count :], *parameters.pooler_modules(model)]
        trained += [model.get_submodule(name) for name in parameters.head_modules(model)]
        parameters.freeze(model)
        for module in trained:
            parameters.unfreeze(module)
        inside = {id(m) for module in trained for m in module.modules()}
        for module in getattr(model, model.base_model_prefix).modules():
            if not any(id(part) in inside for part in module.modules()):
                parameters.keep_in_eval(module)
        return model

    def parameter_groups(self, model: "nn.Module", learning_rate: float) -> list[ParameterGroup]:
        """One group of all that trains."""
        from peftkit.modeling.parameters import trainable_parameters

        return [ParameterGroup(list(trainable_parameters(model).values()), learning_rate)]

    def delta(self, model: "nn.Module") -> Delta:
        """The trained blocks, pooler and head."""
        from peftkit.modeling.deltas import weights_delta

        return weights_delta(model)
