"""One forward in eval mode: in the precision of a training run, and what it answers.

Called by `registry.shared`; stands on torch and `modeling`.

Legend: B rows of a batch, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.modeling.loading import HELD_DTYPES
from peftkit.modeling.parameters import freeze, new_modules
from peftkit.modeling.sharing import LiveBase


def plain_model(base: LiveBase, auto_class: str) -> nn.Module:
    """The base without a delta, and without a head that its files do not hold."""
    model = base.model(auto_class, {})
    freeze(model)
    return getattr(model, model.base_model_prefix) if new_modules(model) else model


def run(forward: Callable[[], Any], precision: str, device: str) -> Tensor:
    """Logits in Accelerate's `precision`, as in training."""
    autocast = torch.autocast(device, HELD_DTYPES[precision], enabled=precision != "no")
    with torch.no_grad(), autocast:
        return _tensor_of(forward())


def device_of(inputs: Mapping[str, Tensor]) -> str:
    """Type of the device that a batch lies on."""
    return next(iter(inputs.values())).device.type


def _tensor_of(outputs: Any) -> Tensor:
    """float32 logits, (B, T, 2) for starts and ends, or the last hidden states."""
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1).float()
    logits = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return logits.float()  # type: ignore[no-any-return]
