"""How a peak is shared out over several processes: a rule over kinds, not a run.

Called by the answers. Sources: PyTorch DDP (a bucket beside each gradient), ZeRO, arXiv:1910.02054
(what each stage shares out), PyTorch FSDP2 (weights of two blocks gathered at a time).
"""

from typing import Literal

from peftkit.memory.storage_tape import Kind, Peak
from peftkit.planning.predict import Prediction

Sharding = Literal["ddp", "zero2", "zero3", "fsdp"]

_SHARED: dict[Sharding, tuple[Kind, ...]] = {
    "ddp": (),
    "zero2": ("gradients", "optimizer_state"),
    "zero3": ("gradients", "optimizer_state", "trainable_weights", "base_weights", "quantisation"),
    "fsdp": ("gradients", "optimizer_state", "trainable_weights", "base_weights", "quantisation"),
}
GATHERED_BLOCKS = 2
"""Of a sharded model: the block that computes and the one that is fetched meanwhile."""


def sharded(found: Prediction, how: Sharding, processes: int) -> Prediction:
    """Peaks of one of `processes` that train together; batches are each process's own."""
    if processes == 1:
        return found
    trainable = found.phases["load"].by_kind.get("trainable_weights", 0)
    beside = trainable if how == "ddp" else 0
    if how in ("zero3", "fsdp"):
        beside = GATHERED_BLOCKS * found.block_bytes
    phases = {
        phase: _share(peak, how, processes, beside if phase != "load" else 0)
        for phase, peak in found.phases.items()
    }
    return Prediction(phases, found.block_bytes, found.on_gpu)


def _share(peak: Peak, how: Sharding, processes: int, beside_bytes: int) -> Peak:
    shared: dict[Kind, int] = {
        kind: -(-size // processes) if kind in _SHARED[how] else size
        for kind, size in peak.by_kind.items()
    }
    shared["temporary"] = shared.get("temporary", 0) + beside_bytes
    return Peak(sum(shared.values()), shared)
