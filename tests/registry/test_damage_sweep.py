"""Whatever is damaged in a store, no wrong value is ever loaded, and nothing passes unnoticed.

What is damaged is refused, but for what only repeats what other files say: `cache.sqlite`, a
missing `index.json` and missing folders are made anew; a changed `index.json` is refused by loading
and made anew by the next change. Of a file about `POINTS` bytes are changed, each alone.
"""

import inspect
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from small_store import adapter, indexed, info, state_of, weights

from peftkit.errors import RegistryError
from peftkit.registry import Registry, digests
from peftkit.registry import blobs as blobs_module
from peftkit.registry import cache as cache_module
from peftkit.registry import index_file as index_file_module
from peftkit.registry import layout as layout_module
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import encode_layout
from peftkit.registry.tags import Tags

pytestmark = pytest.mark.slow

POINTS = 100
REFERENCES = ["reviews", *(f"reviews@v{n}" for n in (1, 2, 3)), "reviews@best", "other"]
MEANS = {"reviews": "reviews@v3", "reviews@best": "reviews@v1", "other": "other@v1"}


@pytest.fixture(scope="module")
def filled(fast_factory):
    root = fast_factory() / "store"
    registry = Registry(root)
    for value in (1, 2, 3):
        registry.save("reviews", adapter(value), info("adapter"))
    registry.save("other", weights(5), info())
    registry.save("gone", weights(6), info())
    registry.rm("gone")
    registry.gc()
    registry.tag("reviews@v1", "best")
    return root


@pytest.fixture
def copied(filled, fast_factory):
    """Makes a fresh copy, whose cache knows its `index.json`."""
    root = fast_factory() / "store"

    def copy() -> Path:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(filled, root, symlinks=True)
        Registry(root).untag("reviews", "best")
        Registry(root).tag("reviews@v1", "best")
        return root

    return copy


def loaded(root: Path, reference: str) -> object:
    """All that loading gives: values, settings and info; or the problems."""
    registry = Registry(root)
    try:
        stored = registry.find(reference)
        registry.verify(stored)
        delta = registry.read_delta(stored)
    except RegistryError as error:
        return error.problems
    values = {name: tensor.tolist() for name, tensor in delta.tensors.items()}
    return str(stored), values, delta.adapter_config, stored.info


def listing(root: Path) -> tuple[list[dict], list[str]]:
    """Rows of `ls`, without the place, and its problems."""
    try:
        found = Registry(root).ls()
    except RegistryError as error:
        return [], error.problems
    return [{k: v for k, v in row.items() if k != "path"} for row in found.rows], found.problems


@pytest.fixture(scope="module")
def truth(filled):
    found = {reference: loaded(filled, reference) for reference in REFERENCES}
    assert not [reference for reference, value in found.items() if isinstance(value, list)]
    return found


def refused(root: Path, truth: dict[str, object]) -> dict[str, list[str]]:
    """Reference → problems of what is refused; all else is as it was."""
    found = {reference: loaded(root, reference) for reference in REFERENCES}
    problems = {r: value for r, value in found.items() if isinstance(value, list)}
    wrong = {r: value for r, value in found.items() if r not in problems and value != truth[r]}
    assert wrong == {}
    assert all("\n" not in line for lines in problems.values() for line in lines)
    return problems


def flips(path: Path) -> list[Callable[[bytes], bytes]]:
    """Every way in which the bytes of a file are damaged."""

    def flip(place: int, data: bytes) -> bytes:
        return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]

    size = path.stat().st_size
    ways = [partial(flip, place) for place in range(0, size, max(1, size // POINTS))]
    ways += [partial(lambda end, data: data[:end], end) for end in {0, 1, size // 2, size - 1}]
    return ways + [partial(lambda more, data: data + more, more) for more in (b"\0", b" ", b"\n{}")]


def damage(path: Path, way: Callable[[bytes], bytes]) -> bool:
    """Change a file as a disk does that loses a bit: its inode and times stay."""
    found, data = path.stat(), path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(way(data))
    path.chmod(found.st_mode)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    return way(data) != data


def each_damage(path: Path) -> Iterator[str]:
    """Damage a file in every way, one after another; it is whole again in between."""
    whole = path.read_bytes()
    for number, way in enumerate(flips(path)):
        if damage(path, way):
            yield f"{path}: damage {number}"
            damage(path, lambda data: whole)


def files(root: Path) -> list[str]:
    found = (p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    return sorted(str(p.relative_to(root)) for p in found)


def users(root: Path, blob: str) -> set[str]:
    """The versions whose folder links to a blob."""
    links = root.glob("deltas/*/*")
    return {link.parent.name for link in links if os.readlink(link).endswith(blob)}


def meaning(versions: set[str]) -> set[str]:
    """The references that mean one of some versions."""
    return {reference for reference in REFERENCES if MEANS.get(reference, reference) in versions}


def pairs(names):
    return itertools.combinations(names, 2)


def swapped(root: Path, first: str, second: str) -> None:
    for source, target in ((first, "aside"), (second, first), ("aside", second)):
        os.rename(root / source, root / target)


def test_a_changed_blob_is_refused_with_file_and_digests(copied, truth):
    root, count = copied(), 0
    for path in sorted(root.glob("blobs/sha256/*")):
        for where in each_damage(path):
            problems = refused(root, truth)
            assert problems.keys() == meaning(users(root, path.name)), where
            for lines in problems.values():
                said = next(line for line in lines if str(path) in line)
                assert f"changed, expected sha256:{path.name}" in said
                assert "found sha256:" in said
            count += 1
    assert count > 1000
    assert refused(root, truth) == {}


def test_a_changed_index_is_refused_by_loading_and_made_anew_by_a_change(filled, copied, truth):
    refusals = 0
    for way in flips(filled / "index.json"):
        root = copied()
        whole = (root / "index.json").read_bytes()
        damage(root / "index.json", way)
        problems = refused(root, truth)
        refusals += bool(problems)  # not if only the end is changed, which closes it
        assert all(str(root / "index.json") in line for p in problems.values() for line in p)
        assert len(listing(root)[0]) == len(listing(filled)[0])
        Registry(root).untag("reviews", "best")
        Registry(root).tag("reviews@v1", "best")
        assert (root / "index.json").read_bytes() == whole
        assert refused(root, truth) == {}
    assert refusals > POINTS * 0.8


def test_a_changed_marker_is_refused_by_everything(copied, truth):
    root, count = copied(), 0
    for where in each_damage(root / "oci-layout"):
        try:
            same = json.loads((root / "oci-layout").read_bytes()) == json.loads(encode_layout())
        except ValueError:
            same = False
        assert refused(root, truth).keys() == (set() if same else truth.keys()), where
        count += not same
    assert count > 50


def test_a_changed_tag_is_refused_and_can_be_set_again(copied, truth):
    root = copied()
    path = root / "tags/reviews@best"
    whole, count = path.read_bytes(), 0
    for way in flips(path):
        damage(path, way)
        count += path.read_bytes() != whole
        assert refused(root, truth).keys() == {"reviews@best"}
        rows, said = listing(root)
        assert (len(rows), len(said)) == (4, 1)
        assert str(path) in said[0]
        Registry(root).tag("other", "good")  # others' tags and saves go on
        Registry(root).untag("other", "good")
        Registry(root).tag("reviews@v1", "best", move=True)
        assert refused(root, truth) == {}
    assert count > 70


def test_a_changed_cache_changes_nothing(filled, copied, truth):
    before, references = listing(filled), indexed(Registry(filled))
    for way in flips(filled / "cache.sqlite"):
        root = copied()
        damage(root / "cache.sqlite", way)
        assert listing(root) == before
        assert refused(root, truth) == {}
        Registry(root).tag("other", "x")
        assert set(indexed(Registry(root))) == {*references, "other@x"}


def test_a_changed_mark_of_a_removed_version_says_what_it_said(copied, truth):
    root = copied()
    damage(root / "removed/gone@v1", lambda data: data + b"x")
    assert refused(root, truth) == {}
    assert Registry(root).save("gone", weights(6), info()).version == "v2"


def test_a_changed_link_is_refused_and_its_blob_is_not_taken_for_garbage(copied, truth):
    root = copied()
    for link in sorted(root.glob("deltas/*/*")):
        target = os.readlink(link)
        for place in range(0, len(target), 9):
            link.unlink()
            link.symlink_to(target[:place] + chr(ord(target[place]) ^ 1) + target[place + 1 :])
            problems = refused(root, truth)
            assert problems.keys() == meaning({link.parent.name})
            assert all(lines for lines in problems.values())
            with pytest.raises(RegistryError, match="nothing is removed"):
                Registry(root).gc()
        link.unlink()
        link.symlink_to(target)
    assert refused(root, truth) == {}


def test_what_is_swapped_is_refused(copied, truth):
    root, count = copied(), 0
    folders = [f"deltas/{name}" for name in sorted(os.listdir(root / "deltas"))]
    links = sorted(str(p.relative_to(root)) for p in root.glob("deltas/*/*"))
    blobs = [name for name in files(root) if name.startswith("blobs/")]
    for first, second in (*pairs(folders), *pairs(links), *pairs(blobs)):
        if (root / first).resolve() == (root / second).resolve():
            continue  # both have the same bytes
        swapped(root, first, second)
        assert refused(root, truth), (first, second)
        count += 1
        swapped(root, first, second)
    assert refused(root, truth) == {}
    assert count > 150


def test_two_tags_swapped_mean_each_what_they_say(copied, truth):
    root = copied()
    Registry(root).tag("other", "best")
    swapped(root, "tags/reviews@best", "tags/other@best")
    assert refused(root, truth).keys() == {"reviews@best"}


def test_an_older_index_put_back_is_not_believed(copied, truth):
    root = copied()
    older = (root / "index.json").read_bytes()
    Registry(root).save("reviews", adapter(4), info("adapter"))
    Registry(root).rm("reviews@v4")
    Registry(root).rm("other@v1")
    (root / "index.json").write_bytes(older)
    assert "other@v1" not in state_of(root)
    assert refused(root, truth).keys() == {"other"}


def test_what_is_deleted_is_refused_or_made_anew(filled, copied, truth):
    state = state_of(filled)
    for path in sorted(filled.rglob("*")):
        root, name = copied(), str(path.relative_to(filled))
        whole = path.is_dir() and not path.is_symlink()
        shutil.rmtree(root / name) if whole else (root / name).unlink()
        problems = refused(root, truth)
        if name.startswith("blobs") or name.count("/") == 2:  # a blob, or a link of a version
            assert problems != {}, name
        elif name == "tags/reviews@best":
            assert problems.keys() == {"reviews@best"}
        else:
            assert state_of(root) == state, name  # listing made it anew
            assert refused(root, truth) == {}


@pytest.mark.parametrize("documents", [True, False])
def test_the_number_of_a_lost_version_is_not_used_again(copied, documents):
    root = copied()
    stored = Registry(root).find("reviews@v3")
    if documents:  # it cannot be made anew
        Registry(root).blobs.path(stored.digest.removeprefix("sha256:")).unlink()
    shutil.rmtree(stored.path)
    assert Registry(root).save("reviews", adapter(4), info("adapter")).version == "v4"
    if documents:
        with pytest.raises(RegistryError, match="expected a link to a blob"):
            Registry(root).find("reviews@v3")
    else:
        assert Registry(root).find("reviews@v3") == stored


STRAYS = {
    "deltas/reviews@v1/stray": "stray; remove it",
    "deltas/stray": "not a version such as 'name@v1'; remove it",
    "deltas/reviews@v9": "expected a link to a blob",
    "tags/stray": "expected a version and its digest",
}


@pytest.mark.parametrize("where", STRAYS)
def test_a_stray_file_is_named(where, copied, truth):
    root = copied()
    (root / where).write_bytes(b"stray")
    problems = refused(root, truth)
    said = [*itertools.chain(*problems.values()), *listing(root)[1]]
    assert any((STRAYS[where] in line and "stray" in line) or "@v9" in line for line in said), said
    assert bool(problems) == where.startswith("deltas/reviews")


@pytest.mark.parametrize("where", ["stray", "removed/stray", "blobs/stray", "staging/stray"])
def test_a_stray_file_that_nothing_reads_changes_nothing(where, copied, truth):
    root = copied()
    (root / where).write_bytes(b"stray")
    assert refused(root, truth) == {}
    assert listing(root)[1] == []


def test_a_stray_blob_is_garbage(copied, truth):
    root = copied()
    (root / "blobs/sha256" / ("0" * 64)).write_bytes(b"stray")
    assert refused(root, truth) == {}
    assert "0" * 64 in Registry(root).gc().blobs
    assert refused(root, truth) == {}


def believe_bytes(monkeypatch):
    real = digests.read_file

    def read_file(path, limit):
        data, found = real(path, limit)
        return data, FileDigest(size=found.size, sha256=path.name)

    monkeypatch.setattr(digests, "read_file", read_file)
    monkeypatch.setattr(blobs_module, "read_file", read_file)


def believe_tags(monkeypatch):
    monkeypatch.setattr(Tags, "_checked", lambda self, path, version, expected: version)


def believe_the_index(monkeypatch):
    for module in (layout_module, index_file_module):
        monkeypatch.setattr(module, "check_index", lambda data, where: None)


def believe_the_cache(monkeypatch):
    monkeypatch.setattr(cache_module, "_checked", lambda found: found[:-1])


def trust_links(monkeypatch):
    monkeypatch.setattr("peftkit.registry.collect._check_links", lambda versions, blobs: None)


@pytest.mark.parametrize(
    ("plant", "test"),
    [
        (believe_bytes, test_a_changed_blob_is_refused_with_file_and_digests),
        (believe_tags, test_a_changed_tag_is_refused_and_can_be_set_again),
        (believe_the_index, test_a_changed_index_is_refused_by_loading_and_made_anew_by_a_change),
        (believe_the_cache, test_a_changed_cache_changes_nothing),
        (trust_links, test_a_changed_link_is_refused_and_its_blob_is_not_taken_for_garbage),
    ],
)
def test_without_its_check_the_damage_passes(plant, test, filled, copied, truth, monkeypatch):
    plant(monkeypatch)
    given = {"filled": filled, "copied": copied, "truth": truth}
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(**{name: given[name] for name in inspect.signature(test).parameters})
