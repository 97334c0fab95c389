"""Where the registry lies, and whether it can be written.

Called by the store, by the experiment before anything is loaded, and by `doctor`.
"""

import os
from pathlib import Path


def default_root() -> Path:
    """`$PEFTKIT_REGISTRY`, else `registry` in the current folder."""
    return Path(os.environ.get("PEFTKIT_REGISTRY") or "registry")


def root_problem(root: Path) -> str | None:
    """Why no delta could be saved below `root`, or None; it need not exist yet."""
    existing = nearest_existing(root)
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable"
    return None


def nearest_existing(path: Path) -> Path:
    """The path itself or the closest parent that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
