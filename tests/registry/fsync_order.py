"""Reads from a log of calls whether a power cut could undo or tear what was published.

A rename publishes. What it publishes must be on disk before it, and the folder's new entry after.
"""

import re
from collections import defaultdict
from pathlib import PurePosixPath as Path

_CALL = re.compile(r"(\w+)\((.*)\) += (?!-1)")
_OPENED = re.compile(r'"([^"]*)", ([A-Z_|]+)')
_QUOTED = re.compile(r'"([^"]*)"')
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")
_VERSION = re.compile(r"[^/]+@v[0-9]+")


class Disk:
    """What would be lost if the power went now."""

    def __init__(self) -> None:
        self.unwritten: set[Path] = set()
        """Files whose bytes are not on disk."""
        self.entries: dict[Path, set[str]] = defaultdict(set)
        """Folder → entries made, or taken away, since its last fsync."""
        self.problems: list[str] = []

    def take(self, call: str, rest: str) -> None:
        """One call that succeeded."""
        names = [Path(name) for name in _QUOTED.findall(rest)]
        descriptor = _DESCRIPTOR.match(rest)
        if call == "openat" and "O_CREAT" in rest:
            self._entry(Path(_OPENED.findall(rest)[0][0]))
        elif call in ("write", "pwrite64") and descriptor:
            self.unwritten.add(Path(descriptor[1]))
        elif call in ("fsync", "fdatasync") and descriptor:
            self.unwritten.discard(Path(descriptor[1]))
            self.entries.pop(Path(descriptor[1]), None)
        elif call in ("mkdir", "symlink", "unlink"):
            self._entry(names[-1])
        elif call == "rename":
            self._rename(*names)

    def left(self) -> list[str]:
        """Entries that matter and are not on disk."""
        return sorted(
            f"{folder.name}/{name}"
            for folder, names in self.entries.items()
            for name in names
            if not name.startswith((".", "cache.sqlite")) and not folder.name.startswith(".")
        )

    def _entry(self, path: Path) -> None:
        self.entries[path.parent].add(path.name)

    def _rename(self, source: Path, target: Path) -> None:
        if target.name.startswith("."):
            return  # set aside: what is lost by a power cut is not needed
        if source in self.unwritten or self.entries.get(source):
            self.problems.append(f"{target.name}: renamed before its fsync")
        self.entries[source.parent].discard(source.name)
        if _VERSION.fullmatch(target.name):
            self.problems += [f"{target.name}: published before {name}" for name in self.left()]
        self._entry(target)


def order_problems(calls: list[str]) -> list[str]:
    """One line for each rename that came too early, and each entry that is left to chance."""
    disk = Disk()
    for line in calls:
        if match := _CALL.match(line):
            disk.take(match[1], match[2])
    return disk.problems + [f"{name}: its folder has no fsync after it" for name in disk.left()]
