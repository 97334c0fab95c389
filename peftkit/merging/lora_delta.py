"""A LoRA delta put together from factors: its tensors and its settings under PEFT's names.

Called by `lora_combination` and by `extraction`.

Legend: I and O a layer's input and output widths, R adapter rank.
"""

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PREFIX = "base_model.model."
"""Of every name in PEFT's files."""


@dataclass(frozen=True)
class Factors:
    """What a LoRA adds to a layer: scaling · B·A."""

    a: Tensor
    """(R, I) float32."""
    b: Tensor
    """(O, R) float32."""
    scaling: float = 1.0
    embedding: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """I and O."""
        return self.a.shape[1], self.b.shape[0]

    def named(self, layer: str) -> dict[str, Tensor]:
        """The factors under PEFT's names; the scaling is not among them."""
        ending = ("lora_embedding_A", "lora_embedding_B")
        if not self.embedding:
            ending = ("lora_A.weight", "lora_B.weight")
        return {f"{PREFIX}{layer}.{ending[0]}": self.a, f"{PREFIX}{layer}.{ending[1]}": self.b}


@dataclass(frozen=True)
class NormHeld:
    """Squared Frobenius norms of what was to be written and of what low rank leaves of it."""

    held: float = 0.0
    whole: float = 0.0

    def __add__(self, other: "NormHeld") -> "NormHeld":
        return NormHeld(self.held + other.held, self.whole + other.whole)

    @property
    def share(self) -> float:
        """Between 0 and 1; 1 for nothing."""
        return self.held / self.whole if self.whole else 1.0


def lora_config(
    settings: dict[str, Any], *, ranks: dict[str, int], saved: list[str]
) -> dict[str, Any]:
    """The content of `adapter_config.json`; alpha equals the rank, so that the scaling is 1.

    Args:
        settings: More of `peft.LoraConfig`.
        ranks: Name of each adapted layer → R.
        saved: Names of the modules that are saved whole, heads among them.
    """
    from peft import LoraConfig

    found = sorted(ranks.values())
    usual = max(found, key=found.count)
    # `^` makes PEFT compare the whole name.
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        **settings,
        r=usual,
        lora_alpha=usual,
        target_modules=sorted(ranks),
        modules_to_save=saved or None,
        rank_pattern=others,
        alpha_pattern=others,
        inference_mode=True,
    )
    content: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    return content
