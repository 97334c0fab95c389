"""Counting the bytes of live tensors while operations run.

Called by the meter; imports torch only. What the count sees and what not: `docs/measuring.md`.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of live tensor storages; `peak_bytes` is the most since it was made.

    A storage counts once however many views share it, from the first operation that reads or
    makes it until it is freed. Unseen: a kernel's scratch memory, and what other threads do.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        # Not weakref.finalize, whose registry would outlive the count.
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add_roots(self, roots: Iterable[nn.Module | Optimizer]) -> None:
        """Count what modules and optimizers hold now: parameters, buffers, gradients, state."""
        for root in roots:
            self._count(list(_root_tensors(root)))

    def stop(self) -> None:
        """Watch no storage any longer; `peak_bytes` stays."""
        self._watches.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation; count what it reads, then what it made."""
        if func is torch.ops.prim.device.default:  # most of what a fake tensor is asked
            return func(*args)
        self._count((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._count(result)
        return result

    def _count(self, values: Any) -> None:
        for tensor in plain_tensors(values):
            if tensor.device.type == self.device_type:
                self._watch(tensor.untyped_storage())

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known == size:
            return
        if known is None:
            self._watches[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._sizes[key] = size
        self.live_bytes += size - (known or 0)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)
        del self._watches[key]


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor with a storage of its own in nested lists, tuples, dicts and wrappers."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from plain_tensors([getattr(value, name) for name in names])
        elif value.layout is torch.strided:
            yield value
        elif value.layout is torch.sparse_coo:
            yield from (value._indices(), value._values())
    elif isinstance(value, dict):
        yield from plain_tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from plain_tensors(item)


def _root_tensors(root: nn.Module | Optimizer) -> Iterator[Tensor]:
    """Parameters, buffers and optimizer state, each followed by its gradient if it has one."""
    if isinstance(root, nn.Module):
        held: list[Any] = [*root.parameters(), *root.buffers()]
    else:
        held = [*root.param_groups, *root.state.values()]
    for tensor in plain_tensors(held):
        yield tensor
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad
