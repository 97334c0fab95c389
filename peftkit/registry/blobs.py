"""Bytes under their own digest: `blobs/sha256/<hex>`, each stored once and read-only.

Called by the store, by its index and by the remotes; imports no tensor library.
Damage is found on reading, and by whoever would store the same bytes again.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest, checked_file, read_file
from peftkit.staging import fsync_path, staging_name

SET_ASIDE = ".gc-"
"""What precedes the digest of a blob while `gc` decides about it."""

READ_ONLY = 0o444


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
        wrote = [self._put_one(digest, data) for digest, data in contents.items()]
        if any(wrote):
            fsync_path(self.folder)

    def read(self, expected: FileDigest, *, keep: bool = True) -> bytes:
        """The bytes of a blob, read once; empty bytes unless `keep`.

        Raises:
            RegistryError: missing, or other bytes than its name says.
        """
        path = self.path(expected.sha256)
        if not path.exists():
            self._bring_back(expected.sha256)
        return checked_file(path, expected, keep=keep)

    def read_small(self, sha256: str, *, limit: int) -> bytes:
        """The bytes of a blob whose size is not known, of at most `limit` bytes.

        Raises:
            RegistryError: missing, too large, or other bytes than its name says.
        """
        path = self.path(sha256)
        if not path.exists():
            self._bring_back(sha256)
        try:
            data, found = read_file(path, limit)
        except OSError as error:
            raise RegistryError(f"{path}: unreadable ({error.strerror})") from error
        if found.sha256 != sha256:
            raise RegistryError(f"{path}: changed, expected sha256:{sha256}, found {found}")
        if found.size > limit:
            raise RegistryError(f"{path}: {found.size} bytes, at most {limit} are allowed")
        return data

    def _put_one(self, digest: FileDigest, data: bytes) -> bool:
        """Whether anything had to be written."""
        path = self.path(digest.sha256)
        if self._holds(path, digest):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
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

    def _bring_back(self, sha256: str) -> None:
        """Undo the first half of a `gc` that was killed before its second."""
        aside = self.folder / f"{SET_ASIDE}{sha256}"
        if aside.exists():
            os.rename(aside, self.path(sha256))
