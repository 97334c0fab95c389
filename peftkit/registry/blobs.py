"""Bytes under their own digest: `blobs/sha256/<hex>`, each stored once and read-only.

Called by the store, by its index and by the remotes; imports no tensor library.
Damage is found on reading, and by whoever would store the same bytes again.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from peftkit.errors import RegistryError
from peftkit.registry.digests import RESTORE, FileDigest, checked_file, read_file
from peftkit.staging import fsync_path, make_folder, staging_name

SET_ASIDE = ".gc-"
"""What precedes the digest of a blob while `gc` decides about it."""

READ_ONLY = 0o444

_Result = TypeVar("_Result")


class Blobs:
    """The blobs of one OCI layout."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "blobs" / "sha256"

    def path(self, sha256: str) -> Path:
        """Where the bytes of this hex digest lie, or would."""
        return self.folder / sha256

    def has(self, digest: FileDigest) -> bool:
        """Whether there is a blob of that name; it is not read."""
        return self.path(digest.sha256).exists()

    def put(self, contents: Mapping[FileDigest, bytes]) -> None:
        """Store each of `contents` whole and on disk, or not at all; what is there is kept.

        Raises:
            OSError: the disk refuses.
        """
        make_folder(self.folder)
        wrote = [self._put_one(digest, data) for digest, data in contents.items()]
        if any(wrote):
            fsync_path(self.folder)

    def read(self, expected: FileDigest, *, keep: bool = True) -> bytes:
        """The bytes of a blob, read once; empty bytes unless `keep`.

        Raises:
            RegistryError: missing, or other bytes than its name says.
        """
        return self._read(expected.sha256, lambda path: checked_file(path, expected, keep=keep))

    def read_small(self, sha256: str, *, limit: int) -> bytes:
        """The bytes of a blob whose size is not known, of at most `limit` bytes.

        Raises:
            RegistryError: missing, too large, or other bytes than its name says.
        """
        path = self.path(sha256)
        try:
            data, found = self._read(sha256, lambda path: read_file(path, limit))
        except OSError as error:
            raise RegistryError(
                f"{path}: expected sha256:{sha256}, found {error.strerror}; {RESTORE}"
            ) from error
        if found.sha256 != sha256:
            raise RegistryError(
                f"{path}: changed, expected sha256:{sha256}, found {found}; {RESTORE}"
            )
        if found.size > limit:
            raise RegistryError(f"{path}: {found.size} bytes, at most {limit} are allowed")
        return data

    def _put_one(self, digest: FileDigest, data: bytes) -> bool:
        """Whether anything had to be written."""
        path = self.path(digest.sha256)
        if self._holds(path, digest):
            return False
        temporary = self.folder / staging_name()
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fchmod(stream.fileno(), READ_ONLY)
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:  # also Ctrl-C: nothing half-written stays
            temporary.unlink(missing_ok=True)
            raise
        return True

    def _holds(self, path: Path, digest: FileDigest) -> bool:
        try:
            return path.lstat().st_size == digest.size and read_file(path, 0)[1] == digest
        except OSError:
            return False

    def _read(self, sha256: str, read: Callable[[Path], _Result]) -> _Result:
        """Read a blob; twice if `gc` set it aside just then, or was killed before it decided."""
        path = self.path(sha256)
        try:
            return read(path)
        except (OSError, RegistryError):
            if not path.exists():
                with suppress(OSError):  # there is none, or another process was faster
                    os.rename(self.folder / f"{SET_ASIDE}{sha256}", path)
            return read(path)
