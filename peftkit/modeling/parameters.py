"""Finding, freezing, holding and counting parameters of any transformers model.

Called by the methods (what trains), the loading (what is new) and the loop (train mode).
"""

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftkit.errors import MethodError

_NEW = "_peftkit_new"
_ALWAYS_EVAL = "_peftkit_always_eval"
_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


def mark_new(module: nn.Module) -> None:
    """Remember that the module's weights were not in the base's files."""
    module.__dict__[_NEW] = True


def is_new(model: nn.Module, parameter_name: str) -> bool:
    """Whether the parameter belongs to a module that `mark_new` named."""
    module = model.get_submodule(parameter_name.rpartition(".")[0])
    return bool(module.__dict__.get(_NEW))


def new_modules(model: nn.Module) -> list[str]:
    """Names of the modules that `mark_new` named."""
    return [name for name, module in model.named_modules() if module.__dict__.get(_NEW)]


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that the task adds to the base and that every method trains.

    They are what stands outside the base model (`classifier`, `score`, …), without pretrained
    output embeddings, and whatever else was newly initialised because the files lack it.
    """
    output = model.get_output_embeddings()
    heads = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix
        and child is not output
        and next(child.parameters(), None) is not None
    ]
    return _outermost([*heads, *new_modules(model)])


def _outermost(names: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for name in sorted(set(names), key=lambda n: (n.count("."), n)):
        if not any(name.startswith(f"{outer}.") for outer in kept):
            kept.append(name)
    return kept


def transformer_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of equal blocks, first to last.

    Raises:
        MethodError: the model has no single list of `num_hidden_layers` blocks, or an encoder and
            a decoder.
    """
    depth = model.config.get_text_config().num_hidden_layers
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len({type(block) for block in module}) == 1
    }
    outer = _outermost(stacks)
    if len(outer) != 1 or getattr(model.config, "is_encoder_decoder", False):
        found = f"; found {', '.join(outer)}" if outer else ""
        raise MethodError(
            f"method: {type(model).__name__} has no single list of {depth} equal blocks to count "
            f"layers in{found}"
        )
    return stacks[outer[0]]


def pooler_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Modules between the last block and the head, by the name that transformers gives them."""
    names = re.compile(r"(^|\.)pooler$")
    return [module for name, module in model.named_modules() if names.search(name)]


def freeze(module: nn.Module) -> None:
    """Stop every parameter of the module from training, in place."""
    for parameter in module.parameters():
        parameter.requires_grad = False


def unfreeze(module: nn.Module) -> None:
    """Let every floating-point parameter of the module train, in place."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad = True


def keep_in_eval(module: nn.Module) -> None:
    """Exempt the module from `train_mode`: it runs without dropout."""
    module.__dict__[_ALWAYS_EVAL] = True


def train_mode(model: nn.Module) -> None:
    """`model.train()`, except for the modules that `keep_in_eval` named."""
    model.train()
    for module in model.modules():
        if module.__dict__.get(_ALWAYS_EVAL):
            module.eval()


def position_limit(model: nn.Module) -> int | None:
    """Tokens that a table of positions has rows for; None where positions are computed."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES
    ]
    return min(map(_rows_of_tokens, tables), default=None)


def _rows_of_tokens(table: nn.Embedding) -> int:
    """RoBERTa and its kin count on from the row of padding, BART and OPT from an offset."""
    padding = table.padding_idx
    unused = getattr(table, "offset", 0) if padding is None else padding + 1
    return table.num_embeddings - int(unused)


def checkpoint_activations(
    model: PreTrainedModel,
    *,
    preserve_rng_state: bool = True,
    recompute_in: Callable[[], AbstractContextManager[object]] | None = None,
) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them, in place.

    `recompute_in` gives the context in which a block runs once more.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if recompute_in:
        options["context_fn"] = lambda: (nullcontext(), recompute_in())
    # Earlier releases of transformers 5 have it under its old name.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable(options)


def set_precision(model: nn.Module, frozen_dtype: torch.dtype) -> None:
    """Hold frozen floating-point parameters in `frozen_dtype` and trainable ones in float32.

    A norm of which a part trains is float32 as a whole: it computes in one dtype. A trained
    embedding among frozen modules hands its rows on in `frozen_dtype`: autocast leaves embeddings
    alone, and a 16-bit norm takes no float32 on a CPU. PEFT's prompt encoders stand before the
    base, feed float32 layers of their own and are cast by PEFT. Changes the model in place.
    Quantised weights are integers and stay as they are.
    """
    holds = any(p.is_floating_point() and not p.requires_grad for p in model.parameters())
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        is_norm = all(p.ndim == 1 for p in own)
        norm_trains = is_norm and any(p.requires_grad for p in own)
        for parameter in own:
            dtype = torch.float32 if parameter.requires_grad or norm_trains else frozen_dtype
            parameter.data = parameter.data.to(dtype)
        is_prompt = "prompt_encoder" in name.split(".")
        if (
            holds
            and not is_prompt
            and isinstance(module, nn.Embedding)
            and module.weight.requires_grad
        ):
            module.register_forward_hook(lambda *call: call[-1].to(frozen_dtype))


def layer_depths(model: PreTrainedModel) -> dict[str, int]:
    """Parameter name → depth: 0 below the blocks, 1 to N in them, N + 1 above.

    Above are the head, the pooler, and what the model registers after its blocks (a last norm).
    """
    blocks = transformer_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    above = tuple(f"{name}." for name in head_modules(model))
    depths, others = {}, 0
    for name, _ in model.named_parameters():
        if name.startswith(f"{prefix}."):
            depths[name] = int(name[len(prefix) + 1 :].partition(".")[0]) + 1
            others = len(blocks) + 1
        else:
            depths[name] = len(blocks) + 1 if name.startswith(above) else others
    return depths


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter for all that train."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total numbers of parameters; a 4-bit weight counts its unpacked elements."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(elements(p) for p in model.parameters())


def elements(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for; of packed 4-bit weights, those they unpack into."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
