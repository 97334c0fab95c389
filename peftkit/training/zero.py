"""DeepSpeed's ZeRO: gradients and optimizer state shared out, at stage 3 weights as well.

Called by `updates` and `sharded`. Imports deepspeed inside functions: few launches ask for it.

What trains stays in float32 and computes under torch's autocast, as in any other launch;
DeepSpeed's own bf16 would hold the model in 16 bits. Its engine finds the gradients' norm and
refuses a step in which that is not finite.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.optim import Optimizer

_BUCKET_ELEMENTS = 20_000_000
"""Gradients that are exchanged at once; DeepSpeed's own 500 million take 2 GB of a GPU."""


def stage_asked(accelerator: Accelerator) -> int | None:
    """ZeRO's stage, or None where the launch is of another kind."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    stage: int = accelerator.deepspeed_plugin.zero_stage
    return stage


def is_asked(accelerator: Accelerator) -> bool:
    """Whether the launch is for DeepSpeed."""
    return stage_asked(accelerator) is not None


def load_whole() -> None:
    """Make transformers load models as ever; at stage 3 it would share them out as it reads them.

    Accelerate has told it of the launch, whatever `zero3_init_flag` says.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


class ZeroUpdates:
    """A model and its optimizer in DeepSpeed's engine; `peftkit.training.updates` says the rest.

    Args:
        accelerator: Started for DeepSpeed.
        model: With its parameters where they were loaded; shared out in place.
        optimizer: Over the parameters that train.
        batch_size: Examples in a micro-batch of one process; DeepSpeed only notes it.
        bound: Largest norm that gradients keep; None: any.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        batch_size: int,
        bound: float | None,
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        config = accelerator.deepspeed_plugin.deepspeed_config
        config |= {
            "train_micro_batch_size_per_gpu": batch_size,
            "train_batch_size": batch_size * accelerator.num_processes,
            "gradient_accumulation_steps": 1,  # the loop says itself where a step ends
            "gradient_clipping": bound or 0.0,
        }
        config["zero_optimization"].setdefault("reduce_bucket_size", _BUCKET_ELEMENTS)
        with _in_float32(accelerator, model):
            if accelerator.deepspeed_plugin.zero_stage == 3:
                _share_out(model, config, accelerator.device)
            self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """DeepSpeed is told where the step ends; stage 2 exchanges gradients at each."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients, shared out."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def apply(self, loss: float) -> tuple[float, bool]:
        """Update; DeepSpeed leaves the parameters alone where the norm is not finite."""
        if not math.isfinite(loss):
            return math.nan, False
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm, math.isfinite(norm)

    def optimizer_state(self, *, keep: bool) -> dict[str, Any]:
        """In torch's own form, by the order of the parameters."""
        from deepspeed.utils import safe_get_full_optimizer_state

        own: Mapping[str, Any] = next(iter(self._inner.state.values()), {})
        shared = [name for name, value in own.items() if _is_per_element(value)]
        alike = {name: value for name, value in own.items() if name not in shared}
        _link(self._zero)
        state = {}
        for number, parameter in enumerate(self._parameters if own else ()):
            gathered = {n: safe_get_full_optimizer_state(parameter, n) for n in shared}
            if keep:
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in gathered.items()}
                state[number] = alike | tensors
        return {"state": state, "param_groups": self._groups()}

    def restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Each process keeps its share."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for group, saved in zip(self._inner.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        if not state["state"]:
            return
        _make_state(self._zero, self._inner, state["state"][0])
        for parameter, items in zip(self._parameters, state["state"].values(), strict=True):
            for name, item in items.items():
                if _is_per_element(item):
                    there = item.to(parameter.device)
                    safe_set_full_optimizer_state(parameter, there, name)

    def _groups(self) -> list[dict[str, Any]]:
        """`param_groups` as torch's `state_dict` has them: settings, and numbers of parameters."""
        numbers = iter(range(len(self._parameters)))
        return [
            {**group, "params": [next(numbers) for _ in range(size)]}
            for group, size in zip(self._inner.param_groups, self._sizes, strict=True)
        ]

    @property
    def _engine(self) -> Any:
        return self.model

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, inside Accelerate's."""
        wrapped: Any = self.optimizer
        return wrapped.optimizer

    @property
    def _inner(self) -> Optimizer:
        """The optimizer that was handed in, now over this process's share, in flat tensors."""
        inner: Optimizer = self._zero.optimizer
        return inner


@contextmanager
def _in_float32(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Keep DeepSpeed from holding the model in 16 bits: its forward runs under autocast instead.

    Accelerate reads the precision of the run from the same setting, so that is put back.
    """
    config, precision = accelerator.deepspeed_plugin.deepspeed_config, accelerator.mixed_precision
    if precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, dtype=torch.bfloat16)
        forward = autocast(type(model).forward)
        attributes: Any = model
        attributes._original_forward = model.forward  # what Accelerate puts back when it unwraps
        attributes.forward = MethodType(convert_outputs_to_fp32(forward), model)
        config["bf16"] = {"enabled": False}
    yield
    if precision == "bf16":
        config["bf16"] = {"enabled": True}


def _share_out(model: nn.Module, config: Mapping[str, Any], device: torch.device) -> None:
    """Move parameter by parameter to the device and keep a share, in place.

    DeepSpeed's engine would first move the whole model to each device.
    """
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=dict(config))
    for buffer in model.buffers():
        buffer.data = buffer.to(device)


def _make_state(zero: Any, inner: Optimizer, like: Mapping[str, Any]) -> None:
    """Give each flat tensor of `inner` an empty state with the entries of `like`."""
    flats = getattr(zero, "fp32_partitioned_groups_flat", None)
    for flat in flats or [p for group in inner.param_groups for p in group["params"]]:
        inner.state[flat] = {
            name: torch.zeros_like(flat) if _is_per_element(item) else _copy(item)
            for name, item in like.items()
        }
    _link(zero)


def _link(zero: Any) -> None:
    """Let stages 1 and 2 find each parameter's part of the optimizer's state.

    DeepSpeed does so after the update of the first group, when the others have no state yet.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def is_shared_out(parameter: Tensor) -> bool:
    """Whether a process holds only a share of the parameter (stage 3)."""
    return hasattr(parameter, "ds_id")


def is_managed(parameter: Tensor) -> bool:
    """Whether a parameter that trains has its master copy in DeepSpeed's optimizer."""
    return is_shared_out(parameter) or hasattr(parameter, "_hp_mapping")


def whole_parameter(parameter: Tensor) -> Tensor:
    """A parameter that trains, gathered; for every process to call."""
    from deepspeed.utils import safe_get_full_fp32_param

    gathered: Tensor = safe_get_full_fp32_param(parameter)
    return gathered


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor) -> None:
    """Put a whole value, the same on every process, into a parameter and its master copy."""
    import deepspeed

    there = value.to(device=parameter.device, dtype=torch.float32)
    deepspeed.utils.safe_set_full_fp32_param(parameter, there)
    sharers = [parameter] if is_shared_out(parameter) else []
    with deepspeed.zero.GatheredParameters(sharers, modifier_rank=0, enabled=bool(sharers)):
        parameter.data.copy_(there)


def _is_per_element(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
