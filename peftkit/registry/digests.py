"""Files and what they hash to.

Called by the store, which verifies with it every byte that it hands on.
"""

import errno
import hashlib
import os
import stat
from io import FileIO
from pathlib import Path

from pydantic import Field

from peftkit.errors import RegistryError
from peftkit.schema import Section

_CHUNK_BYTES = 1 << 20
RESTORE = "restore this version from a copy or save the delta again"


class FileDigest(Section):
    """Size in bytes and hex SHA-256 of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    def __str__(self) -> str:
        return f"sha256:{self.sha256} ({self.size} bytes)"

    @classmethod
    def of(cls, data: bytes) -> "FileDigest":
        """Digest of bytes in memory."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def checked_file(path: Path, expected: FileDigest | None, *, keep: bool = True) -> bytes:
    """The bytes of a file that is as `expected`, read once; empty bytes unless `keep`.

    Raises:
        RegistryError: another content than `expected`, which is None for a file that should not
            be there; or no regular file.
    """
    limit = expected.size if keep and expected else 0
    try:
        data, found = read_file(path, limit)
    except FileNotFoundError as error:
        raise RegistryError(f"{path}: missing, expected {expected}; {RESTORE}") from error
    except OSError as error:
        wanted = f"expected {expected or 'no such file'}, found"
        raise RegistryError(f"{path}: {wanted} {_reason(error)}; {RESTORE}") from error
    if expected is None:
        raise RegistryError(f"{path}: stray, expected no such file, found {found}; remove it")
    if found != expected:
        raise RegistryError(f"{path}: changed, expected {expected}, found {found}; {RESTORE}")
    return data


def read_file(path: Path, limit: int) -> tuple[bytes, FileDigest]:
    """At most the first `limit` bytes of a regular file, and the digest of all of it.

    Raises:
        OSError: it cannot be read, is a symbolic link (ELOOP), or no file.
    """
    with _opened(path) as stream:
        # Bounded by the true size: a hostile limit would be allocated before it is read.
        data = _first(stream, min(limit, os.fstat(stream.fileno()).st_size))
        size, digest = len(data), hashlib.sha256(data)
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            digest.update(chunk)
    return data, FileDigest(size=size, sha256=digest.hexdigest())


def _first(stream: FileIO, size: int) -> bytes:
    """Up to `size` bytes in one piece of memory: a buffered stream would copy them together."""
    data = stream.read(size)
    while len(data) < size and (more := stream.read(size - len(data))):  # the kernel's 2 GB limit
        data += more
    return data


def _opened(path: Path) -> FileIO:
    # O_NONBLOCK: opening a named pipe would otherwise wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a symbolic link"
    return error.strerror or str(error)
