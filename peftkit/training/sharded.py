"""Parameters shared out over processes: gathering them whole, and sharing them out again.

Called by the updates, the evaluation and the checkpoints. A *sharded* tensor is a `DTensor` of
FSDP2, of which a process holds a part, or a parameter that DeepSpeed manages (`zero`). Whatever
gathers is called by every process, at the same point. Models that are not sharded pass through
unchanged.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from peftkit.errors import MethodError
from peftkit.modeling.parameters import transformer_blocks
from peftkit.training import zero


def will_shard(accelerator: Accelerator) -> bool:
    """Whether the parameters of a model will be shared out when training begins."""
    return is_fsdp(accelerator) or zero.stage_asked(accelerator) == 3


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether the launch is for FSDP."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def shard_by_blocks(accelerator: Accelerator, model: nn.Module) -> None:
    """Tell FSDP2 to gather block by block, where the launch did not name the modules.

    Left alone Accelerate takes transformers' list, which names the embeddings of a BERT beside its
    blocks, and then fails on them, as it shards input embeddings by themselves.
    """
    if not is_fsdp(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is not None:
        return
    inner: Any = getattr(model, "get_base_model", None)
    bare: Any = inner() if inner else model
    try:
        blocks = transformer_blocks(bare)
    except MethodError:  # an encoder and a decoder: Accelerate's own list will do
        return
    plugin.transformer_cls_names_to_wrap = [type(blocks[0]).__name__]


def reduce_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 sum gradients over processes in float32, as DDP does; Accelerate says 16 bits."""
    if is_fsdp(accelerator):
        plugin = accelerator.state.fsdp_plugin
        policy = plugin.mixed_precision_policy
        if policy is not None:
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds parts of parameters, so that each forward needs all processes."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any(zero.is_shared_out(parameter) for parameter in model.parameters())


def free_gathered(model: nn.Module) -> None:
    """Give back what a forward without a backward pass left gathered, in its 16-bit type."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Any, *, keep: bool = True) -> Any:
    """Nested containers with every sharded tensor gathered, on the CPU.

    With `keep` false they are gathered for others, one at a time, and None stands in their place.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.to("cpu") if keep else None
    if isinstance(value, Mapping):
        return {key: whole(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep=keep) for item in value)
    return value


def whole_parameter(parameter: Tensor, *, keep: bool = True) -> Tensor | None:
    """A parameter that trains, gathered, detached; with `keep` false for others, and None here."""
    if zero.is_shared_out(parameter):
        gathered = zero.whole_parameter(parameter)
        return gathered if keep else None
    held: Tensor | None = whole(parameter.detach(), keep=keep)
    return held


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every process, into a parameter that trains."""
    if zero.is_managed(parameter):
        zero.set_parameter(parameter, value)
    else:
        parameter.copy_(shared_out(value, parameter))


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, in the shape in which `like` is held."""
    if not isinstance(like, DTensor):
        return tensor
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def shared_out_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The `state_dict` of an optimizer with whole tensors, in the shape of its own parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {
            name: shared_out(item, parameters[number]) if _is_of(item, parameters[number]) else item
            for name, item in items.items()
        }
        for number, items in state["state"].items()
    }
    return {**state, "state": moments}


def make_whole(model: nn.Module) -> None:
    """Put whole tensors on the CPU in the place of the sharded ones that train.

    The model can be read afterwards, and no longer run.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if isinstance(parameter, DTensor) or zero.is_shared_out(parameter):
                held = whole_parameter(parameter)
                assert held is not None
                module._parameters[name] = nn.Parameter(held)


def _is_of(item: Any, parameter: Tensor) -> bool:
    """Whether a value of the optimizer's state has an entry for each of the parameter's."""
    return isinstance(item, Tensor) and item.shape == parameter.shape and item.ndim > 0


def scalar(tensor: Tensor) -> float:
    """A scalar that may be spread over processes."""
    with torch.no_grad():
        return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
