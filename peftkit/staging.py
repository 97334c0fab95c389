"""Folders and files that appear whole or not at all.

Used by the registry, the checkpoints and the run records; imports nothing of peftkit.
Every byte is fsynced before the rename that publishes it, and the parent folder after it.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING_PREFIX = ".staging-"
ABANDONED_AFTER_SECONDS = 24 * 3600
"""How long an entry that another host wrote counts as still in work."""

_ENTRY = re.compile(rf"{re.escape(STAGING_PREFIX)}(.+)-([0-9]+)-[0-9a-f]{{32}}")


def staging_name() -> str:
    """A fresh hidden name that says which process works under it."""
    return f"{STAGING_PREFIX}{_host()}-{os.getpid()}-{uuid.uuid4().hex}"


def is_abandoned(entry: Path) -> bool:
    """Whether the process that made a staging entry is gone: a leftover of a crash.

    Process numbers mean nothing on another host; there the entry's age decides.
    """
    made_by = _ENTRY.fullmatch(entry.name)
    if made_by and made_by[1] == _host():
        return not _is_alive(int(made_by[2]))
    try:
        return time.time() - entry.lstat().st_mtime > ABANDONED_AFTER_SECONDS
    except FileNotFoundError:
        return False


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def fsync_path(path: Path) -> None:
    """Force a file or a folder entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, each entry fsynced."""
    for path in [*reversed(folder.parents), folder]:
        if not path.exists():
            path.mkdir(exist_ok=True)
            fsync_path(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file lies in the folder's place")


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; a reader sees the old bytes or the new."""
    temporary = path.with_name(staging_name())
    try:
        temporary.write_bytes(data)
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:  # also Ctrl-C: nothing half-written stays
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on a clean exit it becomes `target`.

    Raises:
        FileExistsError: `target` exists when the folder is to be published.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(staging_name())
    staging.mkdir()
    try:
        yield staging
        for path in sorted(staging.rglob("*")):
            fsync_path(path)
        fsync_path(staging)
        if target.exists():
            raise FileExistsError(target)
        os.rename(staging, target)
    except BaseException:  # also Ctrl-C: nothing half-written stays
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_path(target.parent)


def discard(path: Path) -> None:
    """Delete a file, a link or a whole folder; what is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
