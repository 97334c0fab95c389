"""How much memory there is: sizes as people write them, and GPUs by name.

Called by the answers and the verb `plan`; imports errors only.
"""

import re
from dataclasses import dataclass

from peftkit.errors import UsageError, suggestion

GIB = 2**30

GPUS = {
    "t4": 14.6,
    "v100-16": 15.8,
    "v100-32": 31.7,
    "rtx3090": 23.6,
    "rtx4090": 23.5,
    "rtx5090": 31.4,
    "a10g": 22.1,
    "l4": 22.0,
    "l40s": 44.4,
    "a100-40": 39.4,
    "a100-80": 79.2,
    "h100": 79.2,
    "h200": 139.8,
    "b200": 178.4,
}
"""GiB that `torch.cuda.get_device_properties` reports; the name on the box promises more."""

GPU_RESERVE_BYTES = GIB
"""What a GPU needs beside live tensors: the CUDA context and kernels (about 0.5 GiB), and gaps
between blocks of the caching allocator."""

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B)")
_UNITS = {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for infix, base in (("", 1000), ("i", 1024))
}


@dataclass(frozen=True)
class Budget:
    """What there is, in bytes, and what of it live tensors may take."""

    name: str
    total_bytes: int
    on_gpu: bool = False

    @property
    def usable_bytes(self) -> int:
        """Less what a GPU needs beside tensors."""
        return max(0, self.total_bytes - (GPU_RESERVE_BYTES if self.on_gpu else 0))


def gpu_budget(name: str) -> Budget:
    """A GPU by its short name.

    Raises:
        UsageError: unknown; lists those that are known.
    """
    key = name.lower()
    if key not in GPUS:
        raise UsageError(f"--gpu {name!r}: unknown; {suggestion(key, GPUS)}")
    return Budget(key, int(GPUS[key] * GIB), on_gpu=True)


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `16 GB`, `900MiB`.

    Raises:
        UsageError: no number with a unit.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--budget {text!r}: expected a number with a unit, such as 24GiB or 16GB")
    return int(float(found[1]) * _UNITS[found[2]])


def gib(size_bytes: float) -> str:
    """A size for people."""
    if size_bytes < 0.1 * GIB:
        return f"{size_bytes / 2**20:,.0f} MiB"
    return f"{size_bytes / GIB:,.1f} GiB"
