"""What a delta may be folded into, and the float32 values that come of it.

Called by `writing` and `into_base`. Only a delta that was trained over 4 bits has a choice.
"""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from peftkit.contracts import Delta
from peftkit.merging.folding import Fold
from peftkit.merging.held_base import HeldBase
from peftkit.modeling.four_bit import rounded
from peftkit.registry.manifest import DeltaInfo

Target = Literal["dequantised", "original", "quantised"]

TARGETS: tuple[Target, ...] = ("dequantised", "original", "quantised")
"""The base as 4 bits left it, which the delta was trained over; the base before it was rounded to 4
bits; 4 bits again, after folding into the dequantised base."""


def fold_into(target: Target, folder: Path, info: DeltaInfo, delta: Delta) -> Fold:
    """The arithmetic of a delta on what `target` means.

    Raises:
        RegistryError: as for `Fold`.
    """
    return Fold(folder, info, delta, HeldBase(folder, info, exact=target == "original"))


def value_of(fold: Fold, name: str, target: Target) -> Tensor:
    """Float32 value of any tensor of the merged model, as a 4-bit one computes with it."""
    value = fold.tensor(name) if name in fold.changed else fold.base(name)
    base = fold.base
    if target == "quantised" and base.quantisation and name in base.four_bit:
        transposed = base.four_bit[name]
        return rounded(value.to(base.held), base.quantisation, transposed=transposed).float()
    return value


def model_of(fold: Fold, target: Target) -> nn.Module:
    """The merged model in memory, in float32 and in eval mode."""
    model: nn.Module = type(fold.model)(fold.model.config)
    for name, tensor in model.named_parameters():
        tensor.data = value_of(fold, name, target)
    return model.eval()
