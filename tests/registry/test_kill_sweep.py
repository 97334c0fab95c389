"""A process that dies at any system call leaves the old store or the new one, and nothing between.

Every call of every kind that a recorded run makes is killed in turn, one kind at a time. Points
after which the disk is as it was after an earlier point are not looked at twice.
"""

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import faults
import pytest
from fsync_order import order_problems
from small_store import adapter, indexed, info, state_of, weights

from peftkit import staging as staging_module
from peftkit.registry import Registry
from peftkit.registry import blobs as blobs_module
from peftkit.registry import versions as versions_module
from peftkit.registry.blobs import Blobs
from peftkit.registry.tags import Tags
from peftkit.registry.versions import Versions

pytestmark = pytest.mark.slow

STAGED = re.compile(r"\.staging-[^/]*")


def first_save(root):
    Registry(root).save("reviews", adapter(1), info("adapter"))


def save(root):
    Registry(root).save("reviews", adapter(3), info("adapter"))


def tag(root):
    Registry(root).tag("reviews@v1", "good")


def move_tag(root):
    Registry(root).tag("reviews@v1", "best", move=True)


def untag(root):
    Registry(root).untag("reviews", "best")


def rm(root):
    Registry(root).rm("reviews@v2")


def gc(root):
    Registry(root).gc()


VERBS = {verb.__name__: verb for verb in (first_save, save, tag, move_tag, untag, rm, gc)}


@pytest.fixture(scope="module")
def filled(fast_factory):
    """Two versions, the second with two tags, one of another name, and what `gc` may take."""
    root = fast_factory() / "store"
    registry = Registry(root)
    registry.save("reviews", adapter(1), info("adapter"))
    registry.save("reviews", adapter(2), info("adapter"))
    registry.save("other", weights(1), info())
    registry.save("gone", weights(9), info())
    registry.rm("gone")
    registry.tag("reviews@v2", "best")
    registry.tag("reviews@v2", "also")
    return root


def prepared(verb: str, filled: Path, folder: Path) -> Path:
    """A fresh store for one point."""
    root = folder / "store"
    shutil.rmtree(root, ignore_errors=True)
    if verb != "first_save":
        shutil.copytree(filled, root, symlinks=True)
    return root


def tree(root: Path) -> str:
    """A digest of all that lies below `root`, without the names that processes make up."""
    found = []
    for path in sorted(root.rglob("*"), key=lambda p: STAGED.sub("staged", str(p))):
        name = STAGED.sub("staged", str(path.relative_to(root)))
        what = os.readlink(path) if path.is_symlink() else ""
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.append((name, what, hashlib.sha256(data).hexdigest()))
    return repr(found)


def leftovers(root: Path) -> list[str]:
    return [str(p) for p in root.rglob(".*") if p.name.startswith((".staging-", ".gc-"))]


def check(root: Path, allowed: list[dict[str, float]]) -> None:
    """One of the allowed states, whose leftovers `gc` lists and removes, and that goes on."""
    state = state_of(root)
    assert state in allowed
    registry = Registry(root)
    would = registry.gc(dry_run=True)
    listed = {str(path) for path in would.leftovers} | {f".gc-{blob}" for blob in would.blobs}
    assert {p for p in leftovers(root) if p not in listed and Path(p).name not in listed} == set()
    found = registry.gc()
    assert (found.blobs, found.leftovers) == (would.blobs, would.leftovers)
    again = registry.gc(dry_run=True)
    assert (leftovers(root), again.blobs, again.leftovers) == ([], [], [])
    registry.save("after", weights(7), info())
    assert state_of(root) == state | {"after@v1": 7.0}
    assert set(indexed(registry)) == state_of(root).keys()


def points(verb: str, filled: Path, folder: Path) -> Iterator[tuple[str, int, Path]]:
    """Every place where the verb can die, and the store that it left."""
    if not faults.can_trace():
        yield from patched_points(verb, filled, folder)
        return
    root = prepared(verb, filled, folder)
    action = partial(VERBS[verb], root)
    for kind in faults.kinds(faults.recorded(action, folder)):
        for number in itertools.count(1):
            prepared(verb, filled, folder)
            if faults.run(action, *faults.killing(kind, number)).reply:
                break
            yield kind, number, root


def patched_points(verb: str, filled: Path, folder: Path) -> Iterator[tuple[str, int, Path]]:
    """The same by Python's own functions, without SQLite's calls."""
    for number in itertools.count(1):
        root = prepared(verb, filled, folder)
        if faults.dying(partial(VERBS[verb], root), number).reply:
            break
        yield "call", number, root


def states(verb: str, filled: Path, folder: Path) -> list[dict[str, float]]:
    """The old one and the new one; what `gc` does is not seen."""
    root = prepared(verb, filled, folder)
    old = state_of(root)
    VERBS[verb](root)
    new = state_of(root)
    assert (new == old) == (verb == "gc")
    return [old, new]


def sweep(verb, filled, folder, places) -> tuple[int, list[str]]:
    """How many points there were, and what was wrong after each that left another disk."""
    allowed = states(verb, filled, folder)
    seen, bad, count = set(), [], 0
    for kind, number, root in places(verb, filled, folder):
        count += 1
        found = tree(root)
        if found in seen:
            continue
        seen.add(found)
        try:
            check(root, allowed)
        except (AssertionError, Exception) as error:  # all bad states are told, not the first
            bad.append(f"{kind} {number}: {' '.join(str(error).split())[:300]}")
    return count, bad


@pytest.mark.parametrize("verb", VERBS)
def test_dying_at_any_call_leaves_the_old_store_or_the_new(verb, filled, fast_factory):
    count, bad = sweep(verb, filled, fast_factory(), points)
    assert count > (150 if faults.can_trace() else 5)
    assert bad == []


@pytest.mark.parametrize("verb", VERBS)
def test_dying_at_any_function_of_python_is_the_same(verb, filled, fast_factory):
    count, bad = sweep(verb, filled, fast_factory(), patched_points)
    assert count > 5
    assert bad == []


def publish_before_blobs(monkeypatch):
    real = Blobs.put

    def put(self, contents):
        if not Versions(self.folder.parents[1]).staged():  # what `save` does after publishing
            real(self, contents)

    monkeypatch.setattr(Blobs, "put", put)


def publish_in_place(monkeypatch):
    def place(self, staging, version):
        self.path(version).mkdir()
        for link in staging.iterdir():
            self.path(version).joinpath(link.name).symlink_to(os.readlink(link))
        shutil.rmtree(staging)
        return True

    monkeypatch.setattr(Versions, "place", place)


def tags_before_the_mark(monkeypatch):
    real = Versions.remove

    def remove(self, version):
        tags = Tags(self.folder.parent, self)
        for tag in tags.of(version.name):
            tags.remove(version.name, tag)
        real(self, version)

    monkeypatch.setattr(Versions, "remove", remove)


@pytest.mark.parametrize(
    ("verb", "plant"),
    [("save", publish_before_blobs), ("save", publish_in_place), ("rm", tags_before_the_mark)],
)
def test_the_sweep_finds_a_planted_state_between(verb, plant, filled, fast_factory, monkeypatch):
    plant(monkeypatch)
    assert sweep(verb, filled, fast_factory(), patched_points)[1] != []


def order_of(verb, filled, folder) -> list[str]:
    if not faults.can_trace():
        pytest.skip("strace is not there, or may not attach")
    root = prepared(verb, filled, folder)
    return order_problems(faults.recorded(partial(VERBS[verb], root), folder))


@pytest.mark.parametrize("verb", VERBS)
def test_a_power_cut_could_tear_nothing(verb, filled, fast_factory):
    assert order_of(verb, filled, fast_factory()) == []


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (os, "fsync", "renamed before its fsync"),
        (versions_module, "fsync_path", "reviews@v3: renamed before its fsync"),
        (versions_module, "fsync_path", "deltas/reviews@v3: its folder has no fsync after it"),
        (blobs_module, "fsync_path", "reviews@v3: published before sha256/"),
        (staging_module, "fsync_path", "index.json: renamed before its fsync"),
    ],
)
def test_a_missing_fsync_is_told(module, name, said, filled, fast_factory, monkeypatch):
    monkeypatch.setattr(module, name, lambda place: None)
    assert said in " ".join(order_of("save", filled, fast_factory()))
