"""A record of every storage that appears and goes, from which peaks by phase and kind are read.

Called by the planner around one training step on fake tensors; imports `live_storages` and the
allocator. The kind of a storage is often known only later (what outlives the forward pass is an
activation), so the tape is read when the step is over.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from peftkit.memory.caching_allocator import CachingAllocator
from peftkit.memory.live_storages import LiveStorages, plain_tensors

Kind = Literal[
    "base_weights",
    "trainable_weights",
    "quantisation",
    "gradients",
    "optimizer_state",
    "activations",
    "temporary",
    "rounding",
]
"""`quantisation` is the constants of 4-bit weights; their packed bits are base weights, and what
they are unpacked into is temporary. `rounding` is what a GPU's allocator hands out beyond what it
was asked for."""


@dataclass(frozen=True)
class Peak:
    """The most that was alive at one moment, in bytes, and what it was."""

    total_bytes: int = 0
    by_kind: Mapping[Kind, int] = field(default_factory=dict)


class StorageTape(LiveStorages):
    """Counts like its parent and remembers each change, under the phase that was last begun."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}
        self._kinds: dict[int, Kind] = {}
        self._changes: list[tuple[str, int, int]] = []
        self._next_number = 0
        self._phase = ""

    def begin(self, phase: str) -> None:
        """What happens from now on belongs to `phase`; what is alive counts in it, too."""
        self._phase = phase
        self._changes.append((phase, -1, 0))

    def name(self, kind: Kind, values: Any) -> None:
        """Say what the storages of nested tensors are; the first word on a storage counts."""
        for tensor in plain_tensors(values):
            self._watch(tensor.untyped_storage())
            number = self._numbers[tensor.untyped_storage()._cdata]
            self._kinds.setdefault(number, kind)

    def name_living(self, kind: Kind) -> None:
        """Say what all storages are that are alive now and have no name yet."""
        for number in self._numbers.values():
            self._kinds.setdefault(number, kind)

    def peaks(self, allocator: CachingAllocator | None = None) -> dict[str, Peak]:
        """Phase → its peak; what was never named is temporary.

        Args:
            allocator: Counts what it would hand out for all that came and went; None: bytes.
        """
        totals: dict[Kind, int] = {}
        alive, peaks = 0, dict[str, Peak]()
        for phase, number, change in self._changes:
            if number >= 0:
                kind = self._kinds.get(number, "temporary")
                totals[kind] = totals.get(kind, 0) + change
                alive += change
            if allocator:
                self._hand_out(allocator, number, change)
            held = allocator.allocated_bytes if allocator else alive
            if phase and held > peaks.get(phase, Peak(-1)).total_bytes:
                kinds = {**totals, "rounding": held - alive}
                peaks[phase] = Peak(held, {kind: size for kind, size in kinds.items() if size})
        return peaks

    @staticmethod
    def _hand_out(allocator: CachingAllocator, number: int, change: int) -> None:
        if change > 0:
            allocator.allocate(number, change)
        elif change < 0:
            allocator.free(number)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        before = self._sizes.get(key)
        super()._watch(storage)
        if before is None:
            self._numbers[key] = self._next_number
            self._next_number += 1
        if before == self._sizes[key]:
            return
        for change in (-(before or 0), self._sizes[key]):
            if change:
                self._changes.append((self._phase, self._numbers[key], change))

    def _forget(self, key: int) -> None:
        self._changes.append((self._phase, self._numbers.pop(key), -self._sizes[key]))
        super()._forget(key)


def largest(peaks: Iterable[Peak]) -> Peak:
    """The highest of several; of equals the first."""
    return max(peaks, key=lambda peak: peak.total_bytes, default=Peak())
