"""Peak memory of each phase of a run, measured: tensors, the allocator's pool, the process.

The experiment opens one `MemoryMeter` per run; training and evaluation probe a few of their steps
with it. Imports torch and `live_storages`. What the figures mean: `docs/measuring.md`.
"""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from peftkit.errors import RunError, suggestion
from peftkit.memory.live_storages import LiveStorages

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


class MemoryMeter:
    """Measures the phases of one run, in this process, on one device.

    Phases follow one another and may be entered again; the peaks kept are the highest. On CUDA
    the allocator counts throughout a phase. On a CPU, `load` is counted throughout; in the other
    phases only the steps inside `probe` are, because counting slows small operations down.

    Attributes:
        overhead_seconds: wall time spent inside probes on a CPU, the probed steps included.
        last_phase: the phase that was entered last, also after it was left.
    """

    def __init__(self, device: torch.device) -> None:
        self.overhead_seconds = 0.0
        self.last_phase: PhaseName | None = None
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
        self._open, self.last_phase, self._allocated = name, name, None
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

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, as plain JSON values."""
        peaks = {name: asdict(peak) for name, peak in self._peaks.items()}
        return {"peaks": peaks, "overhead_seconds": self.overhead_seconds}

    def add_earlier(self, state: Mapping[str, Any]) -> None:
        """Take in what `state_dict` gave in an earlier process of the same run."""
        self.overhead_seconds += state["overhead_seconds"]
        for name, earlier in state["peaks"].items():
            self._peaks[name] = _merged(self._peaks.get(name), PhaseMemory(**earlier))

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


def _merged(one: PhaseMemory | None, other: PhaseMemory) -> PhaseMemory:
    own, others = asdict(one) if one else {}, asdict(other)
    return PhaseMemory(**{name: _highest(own.get(name), others[name]) for name in others})


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
