"""Word that a process which fails leaves for the first one, which writes the record.

Called by the experiment. By torch's key-value store, which every process of a run reaches; where it
is gone, or was never there, nothing is left and nothing found.
"""

from datetime import timedelta
from typing import Any

import torch

_KEY = "peftkit/failed"
_PATIENCE = timedelta(seconds=5)


def leave_word(status: str, reason: str) -> None:
    """Say how this process fails; of several words the first process finds the last."""
    if store := _store():
        try:
            rank = torch.distributed.get_rank()
            store.set(_KEY, "\n".join([status, *(f"rank {rank}: {r}" for r in reason.split("\n"))]))
        except RuntimeError:  # the store's process is gone, and with it whoever would read this
            return


def word() -> tuple[str, str] | None:
    """Status and reason that another process left."""
    if store := _store():
        try:
            if store.check([_KEY]):
                status, _, reason = store.get(_KEY).decode().partition("\n")
                return status, reason
        except RuntimeError:
            return None
    return None


def _store() -> Any:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set_timeout(_PATIENCE)
    return store
