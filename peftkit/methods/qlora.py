"""QLoRA: LoRA over a base whose linear layers are stored in 4 bits.

Named by `method.type: qlora`. Source: arXiv:2305.14314; quantisation by bitsandbytes.
"""

from typing import Literal, Self

from pydantic import model_validator

from peftkit.contracts import LoadOptions, Quantisation
from peftkit.methods.lora import Lora, LoraConfig


class QloraConfig(LoraConfig):
    """QLoRA: every key of `lora`, and how the base is quantised."""

    type: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    """Quantise the quantisation constants too."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the matrix products; the default is that of the run's mixed precision."""

    @model_validator(mode="after")
    def _base_must_stand_still(self) -> Self:
        if self.changes_base:
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} changes the base's weights, "
                "which qlora holds in 4 bits; use true, gaussian or orthogonal"
            )
        return self


class Qlora(Lora):
    """LoRA whose base is loaded in NF4; the head stays out of quantisation."""

    Config = QloraConfig  # type: ignore[assignment]

    def __init__(self, config: QloraConfig) -> None:
        super().__init__(config)
        self.quantisation = Quantisation(
            config.quant_type, config.double_quant, config.compute_dtype
        )

    def load_options(self) -> LoadOptions:
        """Linear layers in 4 bits, the rest held in the 16-bit type of the run."""
        return LoadOptions(quantisation=self.quantisation, frozen=True)
