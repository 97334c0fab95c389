"""A base as it will be loaded, on fake tensors: shapes, dtypes and modules without memory.

Called by the planner; reads the base's config and no weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from peftkit.contracts import LoadOptions
from peftkit.errors import SourceError
from peftkit.modeling.four_bit import four_bit_config
from peftkit.modeling.loading import ModelSpec, held_dtype, skeleton


class _Forgetful(FakeTensorConverter):
    """Keeps no weak references: torch does not convert a module whose tensors have some."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        """Forget it."""


class FakeMemory(FakeTensorMode):
    """The mode under which tensors have no memory, and modules may be converted and copied."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.fake_tensor_converter = _Forgetful()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeMemory":
        """A copied tensor, such as a head that PEFT trains, stays in the mode of its original."""
        return self


def fake_model(
    config: PretrainedConfig, spec: ModelSpec, options: LoadOptions, mode: FakeMemory
) -> PreTrainedModel:
    """What `load_model` would return for a base of this config, its tensors fake ones on the CPU.

    `config` is `spec_config`'s; to be called outside of `mode`.

    Raises:
        SourceError: its values make no model.
    """
    held, quantised = held_dtype(spec, options), options.quantisation
    model = _empty(config, spec, held if options.frozen or quantised else torch.float32)
    if quantised is None:
        _make_fake(model, mode)
        return model
    settings = four_bit_config(quantised, held, skeleton(spec, config))
    _replace_linear_layers(model, settings)
    _make_fake(model, mode)
    with mode:
        _pack(model, settings, held)
    return model


def _empty(config: PretrainedConfig, spec: ModelSpec, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return getattr(transformers, spec.auto_class).from_config(config, dtype=dtype)  # type: ignore[no-any-return]
    except Exception as error:  # each architecture objects in a way of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SourceError(
            f"{config.name_or_path}: no model can be built from its config.json: {reason}"
        ) from error


def quantisation_constants(model: nn.Module) -> Iterator[Tensor]:
    """The tensors beside the packed weights of 4-bit layers."""
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        nested = (state, state.state2) if state is not None and state.nested else (state,)
        for part in filter(None, nested):
            yield from (part.absmax, part.code)


def _make_fake(model: nn.Module, mode: FakeMemory) -> None:
    """Put fake tensors in the place of those without a device, in place; ties stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    with mode:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                        made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                with mode:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _replace_linear_layers(model: PreTrainedModel, settings: BitsAndBytesConfig) -> None:
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    skip = settings.llm_int8_skip_modules
    replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=settings)
    marked: Any = model
    marked.is_loaded_in_4bit = marked.is_quantized = True


def _pack(model: nn.Module, settings: BitsAndBytesConfig, held: torch.dtype) -> None:
    """Give 4-bit layers packed weights, in place.

    `Params4bit` cannot wrap a fake tensor; a plain parameter with the same attributes serves the
    layer, and PEFT, as well.
    """
    from bitsandbytes.nn import Linear4bit

    kind, nested = settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            elements = layer.out_features * layer.in_features
            packed = torch.empty(((elements + 1) // 2, 1), dtype=torch.uint8)
            weight: Any = nn.Parameter(packed, requires_grad=False)
            weight.quant_state, weight.bnb_quantized = _constants(layer, settings, held), True
            weight.compress_statistics, weight.quant_type = nested, kind
            layer.weight = weight
            layer.support_avx512bf16_for_cpu = False


def _constants(layer: Any, settings: BitsAndBytesConfig, held: torch.dtype) -> Any:
    """As `quantize_4bit` makes them: one for 64 weights, with double quantisation in 8 bits.

    Source: bitsandbytes `functional.quantize_4bit`, which cannot run here: it keeps tables in a
    global, and those would be fake ones.
    """
    from bitsandbytes.functional import QuantState

    blocks = -(-layer.out_features * layer.in_features // 64)
    nested = settings.bnb_4bit_use_double_quant
    second = QuantState(
        absmax=torch.empty(-(-blocks // 256)),
        code=torch.empty(256),
        blocksize=256,
        dtype=torch.float32,
    )

    class Unsaved(QuantState):
        """Writing it down would read its numbers, which a fake tensor has not."""

        def as_dict(self, packed: bool = False) -> dict[str, Any]:
            return {}

    return Unsaved(  # type: ignore[no-untyped-call]
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((layer.out_features, layer.in_features)),
        dtype=held,
        blocksize=64,
        code=torch.empty(16),
        quant_type=settings.bnb_4bit_quant_type,
        offset=torch.empty(()) if nested else None,
        state2=second if nested else None,
    )
