"""The state of every random number generator, on every process.

Called by the loop when it writes or reads a checkpoint, and around what must leave no trace.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def gather(accelerator: Accelerator) -> list[dict[str, Any]]:
    """State of each process, by rank, as `own_state` gives it."""
    states: list[dict[str, Any]] = gather_object([own_state()])
    return states


def own_state() -> dict[str, Any]:
    """State of this process. Plain containers and tensors: loads without unpickling."""
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = legacy
    return {
        "torch": torch.get_rng_state(),
        # Of this process's own device only: reading the others' would open them.
        "accelerator": torch.get_device_module().get_rng_state() if _accelerated() else None,
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
    }


def restore(state: dict[str, Any]) -> None:
    """Set this process's generators to `state`, as `own_state` gave it."""
    torch.set_rng_state(state["torch"])
    if state["accelerator"] is not None:
        torch.get_device_module().set_rng_state(state["accelerator"])
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))


def _accelerated() -> bool:
    """Whether there is a GPU, of any make."""
    return bool(torch.accelerator.is_available())


@contextmanager
def untouched() -> Iterator[None]:
    """Whatever draws numbers inside, the generators go on afterwards as if it had not.

    An evaluation needs it: scikit-learn draws a number when it is first imported, which in a
    resumed process happens at another step.
    """
    state = own_state()
    try:
        yield
    finally:
        restore(state)
