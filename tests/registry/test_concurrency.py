"""Many writers of one name, a reader, `gc` and a tag that moves, all at once and without locks.

Also where locks lie: `fcntl.flock` does nothing, and SQLite opens its cache without any lock, as on
a network disk that only pretends.
"""

import fcntl
import itertools
import os
import shutil
import sqlite3
from pathlib import Path

import faults
import pytest
from small_store import indexed, info, state_of, weights

from peftkit.errors import RegistryError
from peftkit.registry import Registry
from peftkit.registry import cache as cache_module
from peftkit.registry import collect as collect_module
from peftkit.registry import index as index_module
from peftkit.registry.versions import Version, Versions

WRITERS, SAVES = 8, 50


def write(root: Path, number: int, saves: int) -> str:
    """Save values of its own, in turn."""
    for value in range(number * saves, (number + 1) * saves):
        Registry(root).save("reviews", weights(value), info())
    return "done"


def read(root: Path, end: Path) -> str:
    """Load the newest version, a tag and a version of before, and list, until `end` is there."""
    seen: dict[str, float] = {}
    newest, rounds = 0, 0
    while not end.exists() or not rounds:
        registry, rounds = Registry(root), rounds + 1
        listing = registry.ls()
        assert listing.problems == [], listing.problems
        names = [f"reviews@{row['version']}" for row in listing.rows if row["name"] == "reviews"]
        assert len(names) >= newest, "a version is gone"
        tags = ["reviews@best"] if registry.tags.has("reviews", "best") else []
        for reference in (*names[-1:], *names[rounds % max(len(names), 1) :][:1], *tags):
            stored = registry.find(reference)
            registry.verify(stored)
            value = registry.read_delta(stored).tensors["head.weight"][0, 0].item()
            assert seen.setdefault(str(stored), value) == value
        newest = len(names)
    return f"{rounds} rounds"


def disturb(root: Path, end: Path) -> str:
    """Save and remove the same bytes under another name, collect garbage, move a tag."""
    for value in itertools.count():
        registry = Registry(root)
        registry.save("other", weights(value % (WRITERS * SAVES)), info())
        registry.rm("other")
        registry.gc()
        if registry.versions.of("reviews"):
            registry.tag("reviews", "best", move=True)
        if end.exists():
            return f"{value} rounds"
    return ""


def at_once(root: Path, saves: int) -> list[str]:
    """What writers, reader and disturber end with."""
    end = root.with_name("end")
    others = [faults.started(lambda: read(root, end)), faults.started(lambda: disturb(root, end))]
    writers = [faults.started(lambda n=n: write(root, n, saves)) for n in range(WRITERS)]
    replies = [ended().reply or "" for ended in writers]
    end.touch()
    return replies + [ended().reply or "" for ended in others]


def locks_as_they_are(monkeypatch):
    pass


def no_flock(monkeypatch):
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, lambda *arguments: None)


def no_lock_of_sqlite(monkeypatch):
    real = sqlite3.connect

    def connect(place, **options):
        if place == ":memory:":
            return real(place)
        address = str(place) if str(place).startswith("file:") else Path(place).absolute().as_uri()
        mark = "&" if "?" in address else "?"
        return real(f"{address}{mark}vfs=unix-none", **options | {"uri": True})

    monkeypatch.setattr(sqlite3, "connect", connect)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locks", "saves"), [(locks_as_they_are, SAVES), (no_flock, SAVES), (no_lock_of_sqlite, 10)]
)
def test_every_version_of_every_writer_is_there(locks, saves, fast_factory, monkeypatch):
    locks(monkeypatch)
    root = fast_factory() / "store"
    *written, read_, disturbed = at_once(root, saves)
    assert written == ["done"] * WRITERS
    assert (read_.endswith(" rounds"), disturbed.endswith(" rounds")) == (True, True), (
        read_, disturbed,
    )  # fmt: skip
    Registry(root).tag("reviews", "last")
    state = state_of(root)
    versions = {name: value for name, value in state.items() if name.startswith("reviews@v")}
    assert versions.keys() == {f"reviews@v{n}" for n in range(1, WRITERS * saves + 1)}
    assert sorted(versions.values()) == list(range(WRITERS * saves))
    assert set(indexed(Registry(root))) == state.keys()
    assert len(indexed(Registry(root))) == len(state)
    assert Registry(root).gc().leftovers == []
    assert state_of(root) == state


def test_a_writer_that_takes_a_taken_number_loses_a_version(fast_factory, monkeypatch):
    """The planted fault: what a writer does that looks for a number and then takes it."""
    registry, real = Registry(fast_factory() / "store"), Versions.place
    other = [Registry(registry.root)]

    def place(self, staging, version):
        if other:
            other.pop().save("reviews", weights(2), info())
        shutil.rmtree(self.path(version), ignore_errors=True)
        return real(self, staging, version)

    monkeypatch.setattr(Versions, "place", place)
    registry.save("reviews", weights(1), info())
    assert registry.versions.of("reviews") == [Version("reviews", 1)]
    with pytest.raises(RegistryError, match="remove the one that is wrong"):
        state_of(registry.root)


def test_a_save_that_is_published_while_gc_looks_keeps_its_blobs(fast_factory, monkeypatch):
    registry = Registry(fast_factory() / "store")
    links = registry.versions.links(registry.save("gone", weights(1), info()).path)
    registry.rm("gone")
    real_replace, real_staged = os.replace, Versions.staged
    staged: list[Path] = []

    def replace(source, target):  # `gc` has looked once, and now sets the first blob aside
        if not staged:
            staged.append(registry.versions.stage(links))
        real_replace(source, target)

    def published_first(self):
        if staged and staged[0].exists():
            assert registry.versions.place(staged[0], Version("reviews", 1))
        return real_staged(self)

    monkeypatch.setattr(collect_module.os, "replace", replace)
    monkeypatch.setattr(Versions, "staged", published_first)
    registry.gc()
    monkeypatch.undo()
    assert state_of(registry.root) == {"reviews@v1": 1.0}


def test_a_save_that_is_published_while_gc_reads_its_links_is_kept(fast_factory, monkeypatch):
    registry = Registry(fast_factory() / "store")
    links = registry.versions.links(registry.save("gone", weights(1), info()).path)
    registry.rm("gone")
    staged, real = registry.versions.stage(links), os.readlink

    def readlink(path):
        if staged.exists():
            registry.versions.place(staged, Version("reviews", 1))
        return real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    registry.gc()
    assert state_of(registry.root) == {"reviews@v1": 1.0}


def test_an_index_written_meanwhile_by_another_is_written_again(fast_factory, monkeypatch):
    """Two writers: the second one's version is published while the first writes `index.json`."""
    root = fast_factory() / "store"
    real, inner = index_module.write_file, Registry(root)
    waiting = [lambda: inner.save("reviews", weights(2), info())]

    def write_file(path, data):
        real(path, data)
        if waiting:  # the other's list, made before ours, comes last
            waiting.pop()()
            real(path, data)

    monkeypatch.setattr(index_module, "write_file", write_file)
    monkeypatch.setattr(cache_module, "_WAIT_SECONDS", 0.1)  # both are this process
    Registry(root).save("reviews", weights(1), info())
    assert indexed(inner) == ["reviews@v1", "reviews@v2"]


def test_a_blob_that_is_set_aside_while_it_is_read_is_found(fast_factory, monkeypatch):
    registry = Registry(fast_factory() / "store")
    stored = registry.save("reviews", weights(1), info())
    blob = registry.blobs.path(stored.files["weights.safetensors"].sha256)
    real, times = os.open, iter([True])

    def opened(path, *arguments, **options):
        if str(path) == str(blob) and next(times, False):
            os.rename(blob, blob.with_name(f".gc-{blob.name}"))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", opened)
    registry.verify(stored)
    blob.unlink()
    with pytest.raises(RegistryError, match="missing"):
        registry.verify(stored)
