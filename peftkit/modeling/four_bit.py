"""Linear layers in 4 bits: which ones, how, and what a weight becomes in them.

Called by the loading, and by merging, which needs the same bits without loading the model.
Source: arXiv:2305.14314; quantisation by bitsandbytes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from peftkit.contracts import Quantisation
from peftkit.modeling.libraries import import_peft
from peftkit.modeling.parameters import head_modules, pooler_modules


def four_bit_config(
    quantisation: Quantisation, held: torch.dtype, skeleton: PreTrainedModel
) -> BitsAndBytesConfig:
    """What transformers is told; `held` is the dtype of what stays out.

    Heads, poolers and output embeddings stay out: 4-bit loading would quantise them and then crash.
    What the architecture wants in float32 (`wo` of T5) does, too; transformers adds it as well.
    """
    import_peft()
    kept = skeleton._keep_in_fp32_modules or []
    output = skeleton.get_output_embeddings()
    others = [output, *pooler_modules(skeleton)]
    names = [name for name, m in skeleton.named_modules() if any(m is other for other in others)]
    compute = quantisation.compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantisation.quant_type,
        bnb_4bit_use_double_quant=quantisation.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute) if compute else held,
        llm_int8_skip_modules=sorted({*head_modules(skeleton), *names, *kept}),
    )


def four_bit_weights(skeleton: PreTrainedModel, config: BitsAndBytesConfig) -> dict[str, bool]:
    """Names of the weights that loading with `config` holds in 4 bits.

    Replaces the layers of `skeleton`, which is of no use afterwards.

    Returns:
        Name → whether it is stored (I, O), as in GPT-2, and quantised transposed.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D

    skip = config.llm_int8_skip_modules
    replace_with_bnb_linear(skeleton, modules_to_not_convert=skip, quantization_config=config)
    layers: dict[str, Any] = {
        n: m for n, m in skeleton.named_modules() if isinstance(m, Linear4bit)
    }
    return {f"{name}.weight": issubclass(m.source_cls, Conv1D) for name, m in layers.items()}


def quantised(weight: Tensor, quantisation: Quantisation, *, transposed: bool) -> Any:
    """The weight as bitsandbytes stores it: a `Params4bit` with its `quant_state`."""
    from bitsandbytes.nn import Params4bit

    value = weight.T.contiguous() if transposed else weight.contiguous()
    parameter: Any = Params4bit(
        value,
        requires_grad=False,
        quant_type=quantisation.quant_type,
        compress_statistics=quantisation.double_quant,
    )
    return parameter.to(value.device)


def rounded(weight: Tensor, quantisation: Quantisation, *, transposed: bool) -> Tensor:
    """What is left of a weight after 4 bits, in its shape and dtype."""
    from bitsandbytes.functional import dequantize_4bit

    stored = quantised(weight, quantisation, transposed=transposed)
    value: Tensor = dequantize_4bit(stored.data, stored.quant_state)
    return value.T.contiguous() if transposed else value


def keep_cpu_weights_unpacked(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking their weight in place at the first eval forward.

    On a CPU with AVX512-BF16 the repacked weight stays after `.train()`: gradients, merging and
    dequantising are then wrong without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
