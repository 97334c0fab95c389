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
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peftkit.errors import RegistryError
from peftkit.registry.layout import INDEX_FILE, decode_index, encode_index, index_line
from peftkit.registry.names import name_problem
from peftkit.registry.tags import Tags
from peftkit.registry.tensors import FileDigest
from peftkit.registry.versions import Version, Versions, parse_version
from peftkit.staging import write_file

CACHE_FILE = "cache.sqlite"
CACHE_SCHEMA = 1
MAX_ROUNDS = 1000
_WAIT_SECONDS = 30.0

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_TABLES = """
CREATE TABLE IF NOT EXISTS versions (
    entry TEXT PRIMARY KEY, name TEXT, number INTEGER, line TEXT, summary TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""

_Result = TypeVar("_Result")
Read = Callable[[Version], tuple[FileDigest, dict[str, Any]]]
"""Digest of a version's manifest, and the plain values that a listing shows."""


@dataclass(frozen=True)
class Listing:
    """What a look through the whole store found."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """By name, then by version number."""
    problems: list[str] = field(default_factory=list)
    """One line for each entry that is not a readable version."""


class Index:
    """`index.json` and the cache of one store."""

    def __init__(self, root: Path, *, read: Read, restore: Callable[[Version, str], None]) -> None:
        """`restore` makes the folder of a version that only `index.json` still knows."""
        self.root = root
        self.file = root / INDEX_FILE
        self.versions = Versions(root)
        self.tags = Tags(root)
        self._read = read
        self._restore = restore

    def recorded(self) -> dict[str, FileDigest]:
        """Reference → digest of its manifest, as `index.json` says.

        Raises:
            RegistryError: it cannot be read.
        """
        try:
            return decode_index(self.file.read_bytes(), self.file)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RegistryError(f"{self.file}: cannot be read ({error.strerror})") from error

    def update(self) -> list[str]:
        """Make `index.json` say what is there, in whatever order other writers do the same.

        Whoever writes looks again afterwards: the last writer has seen every version that was
        there when it wrote, and whoever publishes a later one still has its own update to come.

        Returns:
            A line for each entry that is no readable version.

        Raises:
            OSError: the disk refuses.
        """
        return self._cached(self._update)

    def _update(self, cache: sqlite3.Connection) -> list[str]:
        for _ in range(MAX_ROUNDS):
            problems = self._adopt(cache)
            entries, tags = seen = self._seen()
            problems += self._refresh(cache, entries)
            self._write(cache, tags)
            if self._seen() == seen:
                break
        return problems

    def listing(self) -> Listing:
        """Every readable version and the problems of the others; writes only to the cache.

        Raises:
            RegistryError: the store cannot be listed.
        """
        return self._cached(self._listing)

    def _listing(self, cache: sqlite3.Connection) -> Listing:
        problems = self._adopt(cache)
        entries, tags = self._seen()
        problems += self._refresh(cache, entries)
        found = cache.execute("SELECT summary FROM versions ORDER BY name, number")
        rows = [json.loads(summary) for (summary,) in found]
        of: dict[str, list[str]] = {}
        for entry, version in tags.items():
            of.setdefault(str(version), []).append(entry.partition("@")[2])
        for row in rows:
            entry = f"{row['name']}@{row['version']}"
            row |= {"tags": of.get(entry, []), "path": str(self.versions.folder / entry)}
        return Listing(rows, problems)

    def _seen(self) -> tuple[set[str], dict[str, Version]]:
        return self.versions.entries(), self.tags.all()

    def _adopt(self, cache: sqlite3.Connection) -> list[str]:
        """Give versions that only `index.json` knows their folders, and tags their files.

        Such a store was copied by another OCI tool. Returns a line for each that stays without.
        """
        if _state(cache, "index") == self._identity():
            return []
        recorded, problems = self.recorded(), []
        known = self.versions.entries() | self.versions.gone()
        lost = {e: v for e in recorded.keys() - known if (v := parse_version(e))}
        for entry, version in lost.items():
            try:
                self._restore(version, recorded[entry].sha256)
            except (OSError, RegistryError) as error:
                problems.append(f"{self.file}: {entry} has no folder and gets none ({error})")
        if not self.tags.folder.exists() and os.access(self.root, os.W_OK):
            self._adopt_tags(recorded)
        return problems

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

    def _refresh(self, cache: sqlite3.Connection, entries: set[str]) -> list[str]:
        """Bring the rows to `entries`; a line for each that cannot be read."""
        known = {entry for (entry,) in cache.execute("SELECT entry FROM versions")}
        problems: list[str] = []
        rows = []
        for entry in sorted(entries - known):
            try:
                rows.append(self._row(entry))
            except RegistryError as error:
                problems.extend(error.problems)
        cache.executemany("INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?)", rows)
        cache.executemany("DELETE FROM versions WHERE entry = ?", [(e,) for e in known - entries])
        return problems

    def _row(self, entry: str) -> tuple[str, str, int, str, str]:
        version = parse_version(entry)
        if version is None:
            path = self.versions.folder / entry
            raise RegistryError(f"{path}: not a version such as 'name@v1'; remove it")
        manifest, summary = self._read(version)
        line = index_line(entry, manifest)
        return entry, version.name, version.number, line, json.dumps(summary)

    def _write(self, cache: sqlite3.Connection, tags: dict[str, Version]) -> None:
        found = cache.execute("SELECT entry, line FROM versions ORDER BY name, number")
        lines = dict(found.fetchall())
        tagged = [
            index_line(entry, _manifest_in(lines[str(version)]))
            for entry, version in tags.items()
            if str(version) in lines
        ]
        write_file(self.file, encode_index([*lines.values(), *tagged]))
        cache.execute("INSERT OR REPLACE INTO state VALUES ('index', ?)", [self._identity()])

    def _identity(self) -> str:
        """Says whether `index.json` is still the file that was last read or written."""
        try:
            found = os.stat(self.file)
        except OSError:
            return ""
        return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"

    def _cached(self, action: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Run `action` over the cache; over one in memory where the file cannot be used.

        A damaged file is deleted, so that the next caller makes it anew.
        """
        path = self.root / CACHE_FILE
        if os.access(self.root, os.W_OK):
            try:
                with closing(sqlite3.connect(path, timeout=_WAIT_SECONDS)) as cache, cache:
                    cache.execute("PRAGMA synchronous = OFF")
                    _prepare(cache)
                    return action(cache)
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) in _DAMAGED:
                    path.unlink(missing_ok=True)
        with closing(_in_memory(path)) as cache:
            return action(cache)


def _in_memory(path: Path) -> sqlite3.Connection:
    cache = sqlite3.connect(":memory:")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as stored:
            stored.backup(cache)
        _prepare(cache)
    except sqlite3.Error:
        cache = sqlite3.connect(":memory:")
        _prepare(cache)
    return cache


def _prepare(cache: sqlite3.Connection) -> None:
    (schema,) = cache.execute("PRAGMA user_version").fetchone()
    if schema not in (0, CACHE_SCHEMA):
        raise sqlite3.DatabaseError("another schema")
    cache.executescript(_TABLES)
    cache.execute(f"PRAGMA user_version = {CACHE_SCHEMA}")


def _state(cache: sqlite3.Connection, key: str) -> str | None:
    found = cache.execute("SELECT value FROM state WHERE key = ?", [key]).fetchone()
    return found[0] if found else None


def _manifest_in(line: str) -> FileDigest:
    entry = json.loads(line)
    return FileDigest(size=entry["size"], sha256=entry["digest"].removeprefix("sha256:"))
