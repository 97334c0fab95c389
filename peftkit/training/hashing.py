"""Files that are hashed and forced to disk while the next ones are being written.

Called by the checkpoints. Hashing lets go of the interpreter and forcing to disk waits, so threads
do both beside the writing: together they take little more than a copy of the same bytes.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from peftkit.staging import fsync_path, sha256_file

_LARGE = 1 << 20
"""Bytes from which on another thread is worth its while."""


class HashedFolder:
    """Collects the digests of the files of `folder`; to be entered before they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, Future[str]] = {}
        self._pool = ThreadPoolExecutor(max_workers=4)

    def __enter__(self) -> "HashedFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, name: str) -> None:
        """Take in a file that has been written."""
        self._digests[name] = self._pool.submit(_settled, self.folder / name)

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """A new file, hashed as it is written; it takes `write` and `flush`."""
        with (self.folder / name).open("wb") as file:
            stream = _HashedStream(file, self._pool)
            yield cast(IO[bytes], stream)
        digest = stream.hexdigest()
        self._digests[name] = self._pool.submit(_settled, self.folder / name, digest)

    def digests(self) -> dict[str, str]:
        """Hex digest by file name, once all are on disk.

        Raises:
            OSError: a file cannot be read, or not be forced to disk.
        """
        return {name: digest.result() for name, digest in sorted(self._digests.items())}


class _HashedStream:
    """What `torch.save` asks of a file."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._file, self._pool = file, pool
        self._hash = hashlib.sha256()

    def write(self, data: memoryview) -> int:
        """Write and hash at once; `data` is not needed afterwards."""
        if len(data) < _LARGE:
            self._hash.update(data)
            return self._file.write(data)
        hashing = self._pool.submit(self._hash.update, data)
        try:
            return self._file.write(data)
        finally:
            hashing.result()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Of all that was written."""
        return self._hash.hexdigest()


def _settled(path: Path, digest: str | None = None) -> str:
    """The digest of a file that is on disk."""
    fsync_path(path)
    return digest or sha256_file(path)
