"""What a GPU's kernels keep in memory otherwise than a CPU's, on fake tensors of a CPU.

Called by the planner: a torch without CUDA has no fake CUDA tensors. Held to an H100 in
`docs/planner.md`.

- The fused attention kernels of both devices keep the output and one number a row, but a CPU's
  takes no dropout. A mask whose last dimension is not contiguous, as T5's position biases are, no
  fused kernel takes: attention is then computed step by step, in float32.
  Source: aten/src/ATen/native/transformers (sdp_utils_cpp.h, attention.cpp).
- Dropout keeps a byte an element on CUDA, and the element's own type on a CPU.
- Autocast on CUDA computes norms, softmax, powers and sums in float32, and what follows them then
  is. Source: torch docs, "CUDA Ops that can autocast to float32".
- PEFT's layers over 4-bit weights ask whether autocast is on without naming a device, which means
  CUDA, and copy their input only if it is not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

CUBLAS_WORKSPACES_BYTES = 65 * 2**20
"""What cuBLAS keeps once a forward and a backward pass have run, each in a thread of its own: as
measured on an H200 and an H100 (32 MiB each and 1 MiB). GPUs before Hopper take 8 MiB for each."""

_NAMES_IN_FLOAT32 = (
    *("softmax", "log_softmax", "pow", "exp", "log", "rsqrt", "reciprocal"),
    *("sum", "prod", "cumsum", "norm"),
)
_IN_FLOAT32 = {
    *(functional.layer_norm, functional.group_norm, functional.softmax, functional.log_softmax),
    *(functional.cross_entropy, functional.nll_loss, functional.softplus, functional.normalize),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in _NAMES_IN_FLOAT32),
    Tensor.__pow__,
}


class _GpuKernels(TorchFunctionMode):
    def __init__(self, mixed_precision: str) -> None:
        super().__init__()
        self._casts = mixed_precision != "no"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", _argument(args, 3, None))
            if mask is not None and mask.is_floating_point() and mask.stride(-1) != 1:
                scale = kwargs.get("scale") or args[0].shape[-1] ** -0.5
                chance = kwargs.get("dropout_p", _argument(args, 4, 0.0))
                return _stepwise_attention(args[0] * scale, args[1], args[2], mask, chance)
            args, kwargs["dropout_p"] = args[:4] + args[5:], 0.0
        if func is functional.dropout and kwargs.get("training", _argument(args, 2, True)):
            chance = kwargs.get("p", _argument(args, 1, 0.5))
            return torch.native_dropout(args[0], chance, True)[0] if chance else args[0]
        if self._casts and func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = (_in_float32(args[0]), *args[1:])
        return func(*args, **kwargs)


def _stepwise_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, chance: float
) -> Tensor:
    """Keeps what the kernel without fusion does; queries are scaled. (B, heads, T, head width)."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        query, key, value, mask = (t.to(dtype).float() for t in (query, key, value, mask))
        weights = (query @ key.transpose(-2, -1) + mask).softmax(-1)
        if chance:
            weights = torch.native_dropout(weights, chance, True)[0]
        return (weights @ value).to(dtype)


def _in_float32(value: Any) -> Any:
    is_16_bit = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_16_bit else value


def _argument(args: tuple[Any, ...], place: int, default: Any) -> Any:
    return args[place] if len(args) > place else default


@contextmanager
def gpu_kernels(mixed_precision: str, *, active: bool) -> Iterator[None]:
    """Count the tensors that a GPU would keep; nothing changes unless `active`."""
    if not active:
        yield
        return
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", mixed_precision != "no")
    try:
        with _GpuKernels(mixed_precision):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)
