"""Files that are hashed as they are written, and forced to disk while the next ones are.

Called by the checkpoints. XXH3 finds damage at the speed of memory; it is no defence against a
person, and need not be.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

import xxhash

from peftkit.staging import fsync_path

ALGORITHM = "xxh3_128"


def file_digest(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


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
            stream = _HashedStream(file)
            yield cast(IO[bytes], stream)
        self._digests[name] = self._pool.submit(_settled, self.folder / name, stream.hexdigest())

    def digests(self) -> dict[str, str]:
        """Hex digest by file name, once all are on disk.

        Raises:
            OSError: a file cannot be read, or not be forced to disk.
        """
        return {name: digest.result() for name, digest in sorted(self._digests.items())}


class _HashedStream:
    """What `torch.save` asks of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, xxhash.xxh3_128()

    def write(self, data: memoryview) -> int:
        """Hash and write."""
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Of all that was written."""
        return self._hash.hexdigest()


def _settled(path: Path, digest: str | None = None) -> str:
    """The digest of a file that is on disk."""
    fsync_path(path)
    return digest or file_digest(path)
