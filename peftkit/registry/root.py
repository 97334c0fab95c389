"""Where the registry lies, whether it can be written, and what is said when the disk refuses.

Called by the store, by the experiment before anything is loaded, and by `doctor`.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peftkit.errors import RegistryError

_SPACE = "free some space or point PEFTKIT_REGISTRY at another disk"
_WRITABLE = "make it writable or point PEFTKIT_REGISTRY at a folder that is"
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
}


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


@contextmanager
def disk_refusal(
    root: Path, what: str, *, done: str = "", is_done: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn a disk's refusal into one line with a hint.

    It says `what`, such as "'a@v1' not removed"; or `done`, such as "'a@v1' is removed", where only
    the last fsync was refused.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if is_done():
            raise RegistryError(
                f"{root}: {done}, but a power cut may still undo it ({reason}); "
                "check the disk, then look again"
            ) from error
        raise RegistryError(f"{root}: {what} ({reason}); {disk_hint(error)}") from error


def unreadable(path: Path, what: str, error: OSError) -> RegistryError:
    """One line for a path that cannot be `what`, such as "listed"."""
    return RegistryError(f"{path}: cannot be {what} ({error.strerror}); {disk_hint(error)}")


def disk_hint(error: OSError) -> str:
    """What to do about it."""
    return _HINTS.get(error.errno or 0, "check the disk, then try again")
