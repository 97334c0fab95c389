"""The SQLite cache of a store: one row a version, and a few remembered values.

Called by the index. It only saves reading ten thousand small files; whatever is wrong with it, a
store without it is as good.
"""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

CACHE_FILE = "cache.sqlite"
CACHE_SCHEMA = 1
_WAIT_SECONDS = 30.0
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_TABLES = """
CREATE TABLE IF NOT EXISTS versions (
    entry TEXT PRIMARY KEY, name TEXT, number INTEGER, line TEXT, summary TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""


_Result = TypeVar("_Result")


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


def state(cache: sqlite3.Connection, key: str) -> str | None:
    """A remembered value."""
    found = cache.execute("SELECT value FROM state WHERE key = ?", [key]).fetchone()
    return found[0] if found else None


def keep(cache: sqlite3.Connection, key: str, value: str) -> None:
    """Remember a value."""
    cache.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", [key, value])
