"""Folders and files that appear whole or not at all.

Used by the registry, the checkpoints and the run records; imports nothing of peftkit.
Every byte is fsynced before the rename that publishes it, and the parent folder after it.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING_PREFIX = ".staging-"


def fsync_path(path: Path) -> None:
    """Force a file or a folder entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; a reader sees the old bytes or the new."""
    temporary = path.with_name(f"{STAGING_PREFIX}{uuid.uuid4().hex}")
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
    staging = target.with_name(f"{STAGING_PREFIX}{uuid.uuid4().hex}")
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


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_files(folder: Path) -> dict[str, str]:
    """Relative path → hex digest for every file below `folder`, sorted."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}
