"""The SQLite cache of a store: one row a version, and a few remembered values.

Called by the index. It only saves reading ten thousand small files; whatever is wrong with it, a
store without it is as good. SQLite does not notice a changed byte in a value, so every value
carries a checksum.
"""

import os
import sqlite3
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

CACHE_FILE = "cache.sqlite"
CACHE_SCHEMA = 3
_WAIT_SECONDS = 30.0
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_TABLES = """
CREATE TABLE IF NOT EXISTS versions (
    entry TEXT PRIMARY KEY, name TEXT, number INTEGER, line TEXT, summary TEXT, checksum INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (
    key TEXT PRIMARY KEY, value TEXT, checksum INTEGER
) WITHOUT ROWID;
"""


_Result = TypeVar("_Result")


class Row(NamedTuple):
    """What is kept of a version: its line in `index.json`, and the JSON that a listing shows."""

    entry: str
    name: str
    number: int
    line: str
    summary: str


def cached(root: Path, action: Callable[[sqlite3.Connection], _Result]) -> _Result:
    """Run `action` over the cache; over one in memory where the file cannot be used.

    A damaged file is deleted, so that the next caller makes it anew.
    """
    path = root / CACHE_FILE
    if os.access(root, os.W_OK):
        try:
            with closing(sqlite3.connect(path, timeout=_WAIT_SECONDS)) as cache, cache:
                cache.execute("PRAGMA synchronous = OFF")
                _prepare(cache)
                return action(cache)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) in _DAMAGED:
                path.unlink(missing_ok=True)
    with closing(sqlite3.connect(":memory:")) as cache:
        try:
            _copy(path, cache)
            return action(cache)
        except sqlite3.Error:
            pass  # not even to be read
    with closing(sqlite3.connect(":memory:")) as cache:
        _prepare(cache)
        return action(cache)


def _copy(path: Path, cache: sqlite3.Connection) -> None:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as stored:
        stored.backup(cache)
    _prepare(cache)


def _prepare(cache: sqlite3.Connection) -> None:
    (schema,) = cache.execute("PRAGMA user_version").fetchone()
    if schema not in (0, CACHE_SCHEMA):
        raise sqlite3.DatabaseError("another schema")
    cache.executescript(_TABLES)
    cache.execute(f"PRAGMA user_version = {CACHE_SCHEMA}")


def state(cache: sqlite3.Connection, key: str) -> str | None:
    """A remembered value."""
    found = cache.execute("SELECT * FROM state WHERE key = ?", [key]).fetchone()
    return _checked(found)[1] if found else None


def keep(cache: sqlite3.Connection, key: str, value: str) -> None:
    """Remember a value."""
    cache.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", _sealed((key, value)))


def rows_of(cache: sqlite3.Connection) -> list[Row]:
    """Every row, by name and number.

    Raises:
        sqlite3.DatabaseError: they are not those of the entries that are remembered.
    """
    found = cache.execute("SELECT * FROM versions ORDER BY name, number")
    rows = [Row._make(_checked(row)) for row in found]
    if {row.entry for row in rows} != entries_of(cache):
        raise sqlite3.DatabaseError("rows are missing")
    return rows


def rows_of_name(cache: sqlite3.Connection, name: str) -> list[Row]:
    """The rows of one name, in no order."""
    after = chr(ord("@") + 1)
    found = cache.execute(
        "SELECT * FROM versions WHERE entry > ? AND entry < ?", [f"{name}@", f"{name}{after}"]
    )
    return [Row._make(_checked(row)) for row in found]


def entries_of(cache: sqlite3.Connection) -> set[str]:
    """`name@v1` of every version that has a row."""
    return set((state(cache, "entries") or "").split("\n")) - {""}


def keep_rows(cache: sqlite3.Connection, rows: list[Row]) -> None:
    """Add rows, or replace them."""
    cache.executemany(
        "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?)", map(_sealed, rows)
    )


def _sealed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return *values, _checksum(values)


def _checked(found: tuple[Any, ...]) -> tuple[Any, ...]:
    values = found[:-1]
    if _checksum(values) != found[-1]:
        raise sqlite3.DatabaseError("a value was changed")
    return values


def _checksum(values: tuple[Any, ...]) -> int:
    return zlib.crc32(("%s\0" * len(values) % values).encode())
