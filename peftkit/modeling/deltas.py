"""Taking a delta from a trained model, and putting one on a freshly loaded base, strictly.

Called by the methods (take) and by the registry (put).
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkit.contracts import Delta
from peftkit.errors import MethodError, RegistryError
from peftkit.modeling.libraries import import_peft
from peftkit.modeling.parameters import is_new, trainable_parameters
from peftkit.modeling.patterns import unmatched


def weights_delta(model: nn.Module) -> Delta:
    """The trained parameters under their own names, copied to the CPU."""
    tensors = {n: p.detach().to("cpu", copy=True) for n, p in trainable_parameters(model).items()}
    return Delta("weights", tensors)


def adapter_delta(model: nn.Module) -> Delta:
    """What PEFT would save of its adapter, copied to the CPU.

    Raises:
        MethodError: a trained parameter that PEFT's files would not hold.
    """
    configs: Any = model.peft_config
    config = configs["default"]
    kept = _adapter_tensors(model)
    held = _parameters_of(model, kept)
    lost = [name for name in trainable_parameters(model) if name not in held]
    if config.is_prompt_learning:
        # What encodes the prompt is left behind: the files hold the prompt that came of it.
        lost = [name for name in lost if not name.startswith("prompt_encoder.")]
    if lost:
        raise MethodError(f"method: trained but not part of the adapter's files: {', '.join(lost)}")
    settings = {**config.to_dict(), "inference_mode": True}
    return Delta(
        kind="adapter",
        tensors={name: t.detach().to("cpu", copy=True) for name, t in kept.items()},
        adapter_config=json.loads(json.dumps(settings, default=sorted)),
    )


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT's files hold of the adapter, heads included, in the model's own memory."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        # With `lora_bias`, PEFT takes the bias of B for a damaged matrix.
        warnings.filterwarnings("ignore", r".*invalid shape: \S*lora_B\.bias")
        return get_peft_model_state_dict(model, save_embedding_layers=False)  # type: ignore[no-any-return]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of an adapted model for those that PEFT's files hold."""
    return _parameters_of(model, _adapter_tensors(model))


def _parameters_of(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Name → parameter for those whose memory the adapter's tensors `kept` share."""
    pointers = {tensor.data_ptr() for tensor in kept.values()}
    return {name: p for name, p in model.named_parameters() if p.data_ptr() in pointers}


def adapter_slots(model: nn.Module) -> dict[str, Tensor] | None:
    """Name in PEFT's files → the parameter of the adapted model that holds it.

    Returns:
        None if a name stands for anything else than one whole parameter with memory of its own:
        a prompt that comes of an encoder, a buffer, tied parameters.
    """
    kept = _adapter_tensors(model)
    owners: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        owners.setdefault(parameter.data_ptr(), []).append(parameter)
    slots: dict[str, Tensor] = {}
    for name, tensor in kept.items():
        owner = owners.get(tensor.data_ptr(), [])
        if len(owner) != 1 or owner[0].shape != tensor.shape:
            return None
        slots[name] = owner[0]
    return slots if len({id(slot) for slot in slots.values()}) == len(kept) else None


def weights_slots(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name in a delta of kind `weights` → the parameter or buffer that holds it."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: own[name] for name in tensors}


def apply_delta(model: PreTrainedModel, delta: Delta) -> nn.Module:
    """Put `delta` on `model`, changing it in place.

    Returns:
        The model itself for `weights`; a `peft.PeftModel` around it for `adapter`.

    Raises:
        RegistryError: missing, unexpected or misshapen tensors, each on a line.
    """
    if delta.adapter_config is None:
        return apply_weights(model, delta.tensors)
    return _apply_adapter(model, delta)


def apply_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put `tensors` in place of the parameters of the same names, in their own dtype.

    Raises:
        RegistryError: a name or shape that the model lacks, or a new head without its tensors.
    """
    own: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    required = {name for name in own if is_new(model, name)}
    refuse_mismatch({name: own[name] for name in own if name in tensors.keys() | required}, tensors)
    for name, tensor in tensors.items():
        own[name].data = tensor.to(device=own[name].device, copy=True)
    return model


def _apply_adapter(model: PreTrainedModel, delta: Delta) -> nn.Module:
    import_peft()
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    # In inference mode a prompt is what the file says, not what an encoder makes of it.
    config = PeftConfig.from_peft_type(**{**(delta.adapter_config or {}), "inference_mode": True})
    unmatched(model, delta.adapter_config or {})  # refuses an expression that would never end
    model.name_or_path = config.base_model_name_or_path or ""
    with warnings.catch_warnings():
        # PEFT still asks transformers for `is_gradient_checkpointing`.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # It sets it right for the layer at hand: in 4 bits a GPT-2 has other layers.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        adapted = get_peft_model(model, config)
    expected = _adapter_tensors(adapted)
    refuse_mismatch(expected, delta.tensors)
    for parameter in _parameters_of(adapted, expected).values():
        parameter.requires_grad = True
        # A 16-bit copy would round the trained tensors; memory that is shared is not written to.
        parameter.data = parameter.data.to(torch.float32, copy=True)
    set_peft_model_state_dict(adapted, delta.tensors)
    return adapted  # type: ignore[no-any-return]


def refuse_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of a delta's tensors with those that a model has for them.

    Raises:
        RegistryError: missing, unexpected or misshapen tensors, each on a line.
    """
    problems = [f"delta: tensor '{n}' is missing" for n in sorted(expected.keys() - found.keys())]
    problems += [
        f"delta: tensor '{n}' has no place in the model"
        for n in sorted(found.keys() - expected.keys())
    ]
    problems += [
        f"delta: tensor '{n}' has shape {list(found[n].shape)}, the model {list(tensor.shape)}"
        for n, tensor in sorted(expected.items())
        if n in found and found[n].shape != tensor.shape
    ]
    if problems:
        raise RegistryError(problems)
