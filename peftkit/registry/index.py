"""What a store holds, quickly: `index.json` kept true, and a cache of one row a version.

Called by the store after each change and for listings; imports no tensor library.
The versions' folders are the truth, `index.json` repeats it for other OCI tools, and the SQLite
cache only saves reading ten thousand small files: it may be deleted at any time. A version never
changes, so a row is right for as long as its version is there.
"""

import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from peftkit.errors import RegistryError
from peftkit.registry.cache import (
    Row,
    cached,
    entries_of,
    keep,
    keep_rows,
    rows_of,
    rows_of_name,
    state,
)
from peftkit.registry.digests import FileDigest
from peftkit.registry.index_file import IndexFile, manifest_in
from peftkit.registry.layout import (
    add_to_index,
    encode_index,
    index_line,
)
from peftkit.registry.names import name_problem
from peftkit.registry.tags import Tags
from peftkit.registry.versions import Version, Versions, parse_version
from peftkit.staging import write_file

MAX_ROUNDS = 1000

Read = Callable[[Version], tuple[FileDigest, dict[str, Any]]]
"""Digest of a version's manifest, and the plain values that a listing shows."""


@dataclass(frozen=True)
class Listing:
    """What a look through the whole store found."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """By name, then by version number."""
    problems: list[str] = field(default_factory=list)
    """One line for each entry that is not a readable version."""


class _Seen(NamedTuple):
    """What lay in the store at one moment."""

    entries: set[str]
    """`name@vN`, unchecked."""
    tags: dict[str, Version]
    damaged: list[str]
    """A line for each damaged tag."""


class Index:
    """`index.json` and the cache of one store."""

    def __init__(self, root: Path, *, read: Read, restore: Callable[[Version, str], None]) -> None:
        """`restore` makes the folder of a version that only `index.json` still knows."""
        self.root = root
        self.document = IndexFile(root)
        self.file = self.document.path
        self.versions = Versions(root)
        self.tags = Tags(root, self.versions)
        self._read = read
        self._restore = restore

    def newest_number(self, name: str) -> tuple[int, bool]:
        """The newest version of a name that `index.json` lists, 0 if none is.

        And whether the cache said so, which was then in step with all of `index.json`.
        """
        known = cached(self.root, lambda cache: self._numbers(cache, name))
        if known is not None:
            return max(known, default=0), True
        return max(
            (version.number for version in self.document.versions_of(name)), default=0
        ), False

    def _numbers(self, cache: sqlite3.Connection, name: str) -> list[int] | None:
        if not self._in_step(cache):
            return None
        return [row.number for row in rows_of_name(cache, name)]

    def update(self) -> list[str]:
        """Make `index.json` say what is there, in whatever order other writers do the same.

        Whoever writes looks again afterwards: the last writer has seen every version that was
        there when it wrote, and whoever publishes a later one still has its own update to come.

        Returns:
            A line for each entry that is no readable version.

        Raises:
            OSError: the disk refuses.
        """
        return cached(self.root, self._update)

    def _update(self, cache: sqlite3.Connection) -> list[str]:
        for _ in range(MAX_ROUNDS):
            seen, problems = self._adopted(cache)
            added, bad = self._refresh(cache, seen.entries)
            if added is None or not self._append(cache, added, seen.tags):
                self._write(cache, seen.tags)
            if self._seen() == seen:
                break
        return problems + bad + seen.damaged

    def listing(self) -> Listing:
        """Every readable version and the problems of the others; writes only to the cache.

        Raises:
            RegistryError: the store cannot be listed.
        """
        return cached(self.root, self._listing)

    def _listing(self, cache: sqlite3.Connection) -> Listing:
        seen, problems = self._adopted(cache)
        _, bad = self._refresh(cache, seen.entries)
        known = [row.summary for row in rows_of(cache) if row.entry in seen.entries]
        rows = json.loads(f"[{','.join(known)}]")
        of: dict[str, list[str]] = {}
        for entry, version in seen.tags.items():
            of.setdefault(str(version), []).append(entry.partition("@")[2])
        folder = str(self.versions.folder)
        for row in rows:
            entry = f"{row['name']}@{row['version']}"
            row["tags"], row["path"] = of.get(entry, []), f"{folder}/{entry}"
        return Listing(rows, problems + bad + seen.damaged)

    def _seen(self) -> _Seen:
        return _Seen(self.versions.entries(), *self.tags.all())

    def _adopted(self, cache: sqlite3.Connection) -> tuple[_Seen, list[str]]:
        """What is there once versions that only `index.json` knows have their folders.

        Such a store was copied by another OCI tool. And a line for each that stays without.
        """
        seen = self._seen()
        if self._holds_all(cache, seen.entries):
            return seen, []
        problems = self._adopt(seen.entries | self.versions.gone())
        return self._seen(), problems

    def _adopt(self, known: set[str]) -> list[str]:
        """Give versions that only `index.json` knows their folders, and tags their files."""
        problems: list[str] = []
        try:
            recorded = self.document.entries()
        except RegistryError as error:
            if not known:
                raise
            return [f"{line}; the next save or tag writes it anew" for line in error.problems]
        lost = {e: v for e in recorded.keys() - known if (v := parse_version(e))}
        for entry, version in lost.items():
            try:
                self._restore(version, recorded[entry].sha256)
            except (OSError, RegistryError) as error:
                problems.append(f"{self.file}: {entry} has no folder and gets none ({error})")
        if not self.tags.folder.exists() and os.access(self.root, os.W_OK):
            self._adopt_tags(recorded)
        return problems

    def _holds_all(self, cache: sqlite3.Connection, entries: set[str]) -> bool:
        """Whether nothing was lost since `index.json` was last written."""
        tags_lost = state(cache, "tags") not in (None, "{}") and not self.tags.folder.exists()
        return self._in_step(cache) and not tags_lost and not self._lost(cache, entries)

    def _lost(self, cache: sqlite3.Connection, entries: set[str]) -> set[str]:
        """Entries that have a row, but no folder and no mark of removal."""
        missing = entries_of(cache) - entries
        return missing - self.versions.gone() if missing else missing

    def _in_step(self, cache: sqlite3.Connection) -> bool:
        """Whether `index.json` is the file that the cache was last brought up to date with."""
        return state(cache, "index") == self.document.identity() != ""

    def _adopt_tags(self, recorded: dict[str, FileDigest]) -> None:
        versions = {
            (version.name, recorded[entry].sha256): version
            for entry in recorded
            if (version := parse_version(entry))
        }
        for entry, manifest in recorded.items():
            name, _, tag = entry.partition("@")
            meant = versions.get((name, manifest.sha256))
            if meant and not name_problem(tag):
                self.tags.set(meant, tag)

    def _refresh(
        self, cache: sqlite3.Connection, entries: set[str]
    ) -> tuple[list[str] | None, list[str]]:
        """Bring the rows to `entries`.

        Returns:
            The new entries' lines, None if rows went as well; and a line for each entry that cannot
            be read.
        """
        known = entries_of(cache)
        if known == entries:
            return [], []
        problems: list[str] = []
        rows = []
        for entry in sorted(entries - known):
            try:
                rows.append(self._row(entry))
            except RegistryError as error:
                version = parse_version(entry)
                removed = version and self.versions.is_gone(version)  # since we looked
                problems.extend([] if removed else error.problems)
        missing = known - entries
        gone = missing & self.versions.gone() if missing else missing  # others were lost
        keep_rows(cache, rows)
        cache.executemany("DELETE FROM versions WHERE entry = ?", [(entry,) for entry in gone])
        known = (known | {row.entry for row in rows}) - gone
        keep(cache, "entries", "\n".join(known))
        return (None if gone else [row.line for row in rows]), problems

    def _row(self, entry: str) -> Row:
        version = parse_version(entry)
        if version is None:
            path = self.versions.folder / entry
            raise RegistryError(f"{path}: not a version such as 'name@v1'; remove it")
        manifest, summary = self._read(version)
        line = index_line(entry, manifest)
        return Row(entry, version.name, version.number, line, json.dumps(summary))

    def _append(
        self, cache: sqlite3.Connection, lines: list[str], tags: dict[str, Version]
    ) -> bool:
        """Add lines to an `index.json` that is known; False if it has to be written whole.

        Ten thousand lines cost more to gather than to copy.
        """
        known = state(cache, "index")
        if not known or known != self.document.identity() or state(cache, "tags") != repr(tags):
            return False
        data = self.file.read_bytes()
        try:
            longer = add_to_index(data, lines, self.file)
        except RegistryError:  # changed behind our back: written anew
            return False
        if longer is not None and lines:
            write_file(self.file, longer)
            keep(cache, "index", self.document.identity())
        return longer is not None

    def _write(self, cache: sqlite3.Connection, tags: dict[str, Version]) -> None:
        lines = {row.entry: row.line for row in rows_of(cache)}
        tagged = [
            index_line(entry, manifest_in(lines[str(version)]))
            for entry, version in tags.items()
            if str(version) in lines
        ]
        write_file(self.file, encode_index([*lines.values(), *tagged]))
        keep(cache, "index", self.document.identity())
        keep(cache, "tags", repr(tags))
