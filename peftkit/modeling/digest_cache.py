"""Digests of a file's tensors, remembered so that a large base is hashed once.

Called by `identity`. An entry belongs to one file as it is: to the SHA-256 under which the Hub's
cache keeps it, else to its device, inode, size and times, which change with every write.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from peftkit.staging import write_file

SETTLED_NANOSECONDS = 2_000_000_000
"""A file changed more recently could change again within one tick of its clock, unseen."""

_VERSION = 1
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")

Lines = dict[str, str]
"""Tensor name → its canonical line."""


def cached_lines(path: Path, compute: Callable[[Path], Lines]) -> Lines:
    """What `compute` says of a file, from the cache where it was asked before.

    A cache that cannot be read or written is as good as none.
    """
    entry = _folder() / f"{_key(path)}.json"
    try:
        found = json.loads(entry.read_bytes())
        if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
            return found
    except (OSError, RecursionError, ValueError):
        pass
    started = time.time_ns()
    lines = compute(path)
    if entry.stem == _key(path) and started - path.stat().st_ctime_ns > SETTLED_NANOSECONDS:
        _keep(entry, lines)
    return lines


def _keep(entry: Path, lines: Lines) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_file(entry, json.dumps(lines).encode())
    except OSError:
        pass


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "peftkit" / "base-digests"


def _key(path: Path) -> str:
    real = path.resolve()
    found = real.stat()
    if real.parent.name == "blobs" and _HUB_BLOB.fullmatch(real.name):
        identity = [real.name, found.st_size]
    else:
        times = (found.st_mtime_ns, found.st_ctime_ns)
        identity = [str(real), found.st_dev, found.st_ino, found.st_size, *times]
    return hashlib.sha256(json.dumps([_VERSION, *identity]).encode()).hexdigest()
