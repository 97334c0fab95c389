"""Peak memory of each phase of a run, measured: tensors, the allocator's pool, the process.

The experiment opens one `MemoryMeter` per run; training and evaluation probe a few of their steps
with it. Imports torch and `peftkit.errors`. What the figures mean: `docs/measuring.md`.
"""

import os
import re
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from peftkit.errors import RunError, suggestion

PhaseName = Literal["load", "train_step", "eval"]

PROC = Path("/proc/self")


@dataclass(frozen=True)
class PhaseMemory:
    """Peaks of one phase, over all its entries. None: not measurable here, or not attributable."""

    allocated_bytes: int | None
    """Live tensors: storages on a CPU, the caching allocator's count on CUDA."""
    reserved_bytes: int | None
    """What the CUDA caching allocator held; None on a CPU, which has no such pool."""
    resident_bytes: int | None
    """Physical memory of this process, libraries and mapped files included."""


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
        self._count((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._count(result)
        return result

    def _count(self, values: Any) -> None:
        for tensor in _plain_tensors(values):
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


class MemoryMeter:
    """Measures the phases of one run, in this process, on one device.

    Phases follow one another and may be entered again; the peaks kept are the highest. On CUDA
    the allocator counts throughout a phase. On a CPU, `load` is counted throughout; in the other
    phases only the steps inside `probe` are, because counting slows small operations down.

    Attributes:
        overhead_seconds: wall time spent inside probes on a CPU, the probed steps included.
    """

    def __init__(self, device: torch.device) -> None:
        self.overhead_seconds = 0.0
        self._device = device
        self._peaks: dict[str, PhaseMemory] = {}
        self._open: str | None = None
        self._counter: LiveStorages | None = None
        self._allocated: int | None = None

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """Measure the enclosed part of the run as `name`, also if it ends in an exception.

        Raises:
            RunError: there is no such phase, or another one is open.
        """
        self._refuse_phase(name)
        self._open, self._allocated = name, None
        lifetime_before = None if _reset_high_water() else _high_water_bytes()
        self._reset_cuda()
        counted = name == "load" and self._device.type == "cpu"
        try:
            with self._counting_load() if counted else nullcontext():
                yield
        finally:
            self._open = None
            self._keep(name, lifetime_before)

    @contextmanager
    def probe(self, roots: Iterable[nn.Module | Optimizer]) -> Iterator[None]:
        """Count live storages during the enclosed steps, starting with those that `roots` hold.

        Inside `load`, which is counted anyway, `roots` are added to the count. Does nothing on
        CUDA. Values and gradients are the same with and without a probe.

        Raises:
            RunError: no phase is open, or another probe is.
        """
        started = time.perf_counter()
        with self._counting_roots(roots):
            try:
                yield
            finally:
                if self._device.type == "cpu":
                    self.overhead_seconds += time.perf_counter() - started

    def result(self) -> dict[str, PhaseMemory]:
        """Peaks of the phases that were left, by name."""
        return dict(self._peaks)

    def _refuse_phase(self, name: str) -> None:
        if name not in get_args(PhaseName):
            hint = suggestion(name, get_args(PhaseName))
            raise RunError(f"memory phase '{name}': unknown; {hint}")
        if self._open is not None:
            raise RunError(f"memory phase '{name}': '{self._open}' is open; leave that one first")

    def _counting_roots(
        self, roots: Iterable[nn.Module | Optimizer]
    ) -> AbstractContextManager[object]:
        """What to enter around the probed steps."""
        if self._open is None:
            raise RunError("memory probe: no phase is open; enter one with phase(…) first")
        if self._device.type != "cpu":
            return nullcontext()
        if self._counter is None:
            return self._counting(roots)
        if self._open != "load":
            raise RunError("memory probe: another probe is open; leave it first")
        self._counter.add_roots(roots)
        return nullcontext()

    @contextmanager
    def _counting(self, roots: Iterable[nn.Module | Optimizer]) -> Iterator[None]:
        self._counter = counter = LiveStorages()
        try:
            counter.add_roots(roots)
            with counter:
                yield
        finally:
            self._counter = None
            counter.stop()
            self._allocated = _highest(self._allocated, counter.peak_bytes)

    @contextmanager
    def _counting_load(self) -> Iterator[None]:
        # transformers reads weights in a pool of threads, where the count would not see them.
        with _environment("HF_DEACTIVATE_ASYNC_LOAD", "1"), self._counting(()):
            yield

    def _reset_cuda(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self._device)

    def _keep(self, name: str, lifetime_before: int | None) -> None:
        old = self._peaks.get(name, PhaseMemory(None, None, None))
        allocated, reserved = self._allocated, None
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
        self._peaks[name] = PhaseMemory(
            allocated_bytes=_highest(old.allocated_bytes, allocated),
            reserved_bytes=_highest(old.reserved_bytes, reserved),
            resident_bytes=_resident_peak(old.resident_bytes, lifetime_before),
        )


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor with a storage of its own in nested lists, tuples, dicts and wrappers."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _plain_tensors([getattr(value, name) for name in names])
        elif value.layout is torch.strided:
            yield value
        elif value.layout is torch.sparse_coo:
            yield from (value._indices(), value._values())
    elif isinstance(value, dict):
        yield from _plain_tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _plain_tensors(item)


def _root_tensors(root: nn.Module | Optimizer) -> Iterator[Tensor]:
    """Parameters, buffers and optimizer state, each followed by its gradient if it has one."""
    if isinstance(root, nn.Module):
        held: list[Any] = [*root.parameters(), *root.buffers()]
    else:
        held = [*root.param_groups, *root.state.values()]
    for tensor in _plain_tensors(held):
        yield tensor
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


def _highest(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _reset_high_water() -> bool:
    """Let the kernel's resident peak start again from now; False where it cannot."""
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _proc_high_water() -> int | None:
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", (PROC / "status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _high_water_bytes() -> int | None:
    """Resident peak since the process started or the last reset."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    kib_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _proc_high_water() or kib_or_bytes * (1 if sys.platform == "darwin" else 1024)


def _resident_peak(old: int | None, lifetime_before: int | None) -> int | None:
    """The phase's resident peak, given that of its earlier entries.

    `lifetime_before` is None if the mark was reset at entry. Else the mark only ever rises, and
    tells of this phase if it rose in it or is still the one that an earlier entry set.
    """
    after = _high_water_bytes()
    if lifetime_before is None:
        return _highest(old, after)
    return after if after == old or (after or 0) > lifetime_before else None
