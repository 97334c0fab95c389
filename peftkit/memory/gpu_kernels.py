"""What a GPU's kernels keep in memory otherwise than a CPU's, on fake tensors of a CPU.

Called by the planner: a torch without CUDA has no fake CUDA tensors. The fused attention kernels of
both devices keep the output and one number a row, but a CPU's takes no dropout; autocast on CUDA
computes norms and softmax in float32. Source: torch docs, "CUDA Ops that can autocast to float32".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

CUBLAS_WORKSPACES_BYTES = 65 * 2**20
"""What cuBLAS keeps once a forward and a backward pass have run, each in a thread of its own: as
measured on an H200 (32 MiB each and 1 MiB). GPUs before Hopper take 8 MiB for each."""

_IN_FLOAT32 = (functional.layer_norm, functional.softmax, functional.group_norm)


class _GpuKernels(TorchFunctionMode):
    def __init__(self, mixed_precision: str) -> None:
        super().__init__()
        self._casts = mixed_precision != "no"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            args, kwargs["dropout_p"] = args[:4] + args[5:], 0.0
        if self._casts and func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


@contextmanager
def gpu_kernels(mixed_precision: str, *, active: bool) -> Iterator[None]:
    """Count the tensors that a GPU would keep; nothing changes unless `active`."""
    if not active:
        yield
        return
    with _GpuKernels(mixed_precision):
        yield
