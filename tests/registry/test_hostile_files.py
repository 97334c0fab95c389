"""Files from strangers: bounded headers, archives and names that stay inside.

`test_canaries.py` shows that nothing in them runs.
"""

import gzip
import io
import json
import random
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
from small_store import adapter, info, state_of

from peftkit.cli import main
from peftkit.errors import RegistryError
from peftkit.registry import Registry
from peftkit.registry.archive import export_archive, import_archive
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import (
    encode_index,
    encode_layout,
    encode_manifest,
    index_line,
)
from peftkit.registry.manifest import encode_info
from peftkit.registry.tensors import delta_to_files

HEADERS = Path(__file__).with_name("hostile_headers.py")


def read_headers(count: int, *options: str) -> dict:
    """What reading `count` mutated headers, and the crafted ones, came to."""
    command = [sys.executable, str(HEADERS), str(count), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_twenty_thousand_mutated_headers_are_read_or_refused_quickly_in_little_memory():
    found = read_headers(20_000)
    assert found["bad"] == []
    assert found["refused"] > 15_000
    assert found["read"] > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "said"), [("bounds", "bomb 3: "), ("duplicates", "twice: was read")]
)
def test_without_its_guard_a_header_does_harm(guard, said):
    assert said in " ".join(read_headers(400, "--without", guard)["bad"])


BAD_NAMES = [
    "../up",
    "/abs",
    "a/b",
    "a\\b",
    "..",
    ".",
    "a\0b",
    "A",
    "a\n",
    "con",
    "a@v1/../..",
    "é",
    "",
]


def below(folder: Path) -> dict[str, bytes | str]:
    """All that lies below a folder, and what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with a file in it that must stay as it is, and a store deep within."""
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "up@v1").write_text("keep")
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(tmp_path / "in" / "store"))
    Registry(tmp_path / "in" / "store").save("reviews", adapter(1), info("adapter"))
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_reaches_no_file(name, outside):
    registry = Registry(outside / "in" / "store")
    before = below(outside)
    actions = [
        lambda: registry.save(name, adapter(2), info("adapter")),
        lambda: registry.receive(name, {}, info=b"", manifest=b""),
        lambda: registry.find(name),
        lambda: registry.find(f"{name}@v1"),
        lambda: registry.rm(name),
        lambda: registry.rm(f"{name}@v1"),
        lambda: registry.tag("reviews", name),
        lambda: registry.tag(name, "best"),
        lambda: registry.untag("reviews", name),
        lambda: registry.untag(name, "v1"),
        lambda: registry.untag(f"../{name}", "v1"),
        lambda: export_archive(registry, [name], outside / "out.tar"),
    ]
    for number, action in enumerate(actions):
        with pytest.raises(RegistryError):
            action()
        assert below(outside) == before, number


def test_without_the_grammar_a_name_would_escape(outside, monkeypatch):
    """The planted fault."""
    monkeypatch.setattr("peftkit.registry.names.name_problem", lambda name: None)
    Registry(outside / "in" / "store").save("../../../out", adapter(2), info("adapter"))
    assert (outside / "out@v1").exists()


def test_a_tag_that_is_taken_away_takes_no_file_outside(outside, capsys):
    """What the name's check is there for: `tags/../../../up@v1` is the file of another."""
    assert main(["adapters", "tag", "../../../up", "v1", "--delete"]) == 1
    assert (outside / "up@v1").read_text() == "keep"


def member(name: str, data: bytes = b"", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for key, value in changes.items():
        setattr(entry, key, value)
    return entry, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry, data in members:
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def parts(reference="reviews@v1", *, title=None, about=None, lie=None) -> dict[str, bytes]:
    """Name → bytes of the members of a good archive, but for what is asked for."""
    files = delta_to_files(adapter(3))
    told = about or encode_info(info("adapter"))
    digests = {name: FileDigest.of(data) for name, data in files.items()}
    manifest = encode_manifest(FileDigest.of(told), digests)
    if title:
        manifest = manifest.replace(b"adapter_config.json", title)
    if lie:
        manifest = manifest.replace(b'"size": %d' % len(told), b'"size": %d' % lie)
    line = index_line(reference, FileDigest.of(manifest))
    blobs = {
        f"blobs/sha256/{FileDigest.of(d).sha256}": d for d in (*files.values(), told, manifest)
    }
    return {"oci-layout": encode_layout(), "index.json": encode_index([line]), **blobs}


GOOD = parts()
BLOB = next(name for name in GOOD if name.startswith("blobs/"))


def with_members(*more: tuple[tarfile.TarInfo, bytes], **changed: object) -> bytes:
    return tar_of(*(member(name, data) for name, data in parts(**changed).items()), *more)


def chained(kind: bytes, count: int) -> bytes:
    """Extended headers one after another, each of which tarfile reads within the one before."""
    data = b"20 comment=nonsense\n" if kind in (b"x", b"g") else b"name\0"
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = kind, len(data)
    header = entry.tobuf(tarfile.GNU_FORMAT)
    return (header + data.ljust(512, b"\0")) * count + with_members()


def sized(size: int) -> bytes:
    entry, _ = member("blobs/sha256/" + "0" * 64)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT) + b"x" * 512


def sparse() -> bytes:
    """A member of a few bytes that says it is one TiB."""
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": BLOB}
    headers["GNU.sparse.realsize"] = str(1 << 40)
    return tar_of(member("GNUSparseFile.0/x", b"0\n".ljust(512, b"\0"), pax_headers=headers))


def old_sparse() -> bytes:
    entry, _ = member(BLOB, b"", type=tarfile.GNUTYPE_SPARSE)
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


EVIL = b"evil"
NEW = "blobs/sha256/" + "1" * 64
MANY = [index_line(f"a@v{number}", FileDigest.of(b"")) for number in range(1, 9000)]


def link(kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return member(NEW, type=kind, linkname="/etc/passwd")


HOSTILE = {
    "up": lambda: with_members(member("../precious", EVIL)),
    "absolute": lambda: with_members(member("/tmp/peftkit-escaped", EVIL)),
    "up-below-blobs": lambda: with_members(member(f"blobs/sha256/../../{BLOB}", EVIL)),
    "dotted": lambda: with_members(member(f"./{BLOB}", EVIL)),
    "nul": lambda: with_members(member("x", EVIL, pax_headers={"path": f"{BLOB}\0/../../x"})),
    "twin-of-blobs": lambda: with_members(member(BLOB.replace("blobs", "Blobs"), EVIL)),
    "twin-of-index": lambda: with_members(member("INDEX.JSON", EVIL)),
    "twice": lambda: with_members(member(BLOB, GOOD[BLOB])),
    "symlink": lambda: with_members(link(tarfile.SYMTYPE)),
    "hard-link": lambda: with_members(link(tarfile.LNKTYPE)),
    "link-to-blobs": lambda: tar_of(member("blobs", type=tarfile.SYMTYPE, linkname="..")),
    "pipe": lambda: with_members(member(NEW, type=tarfile.FIFOTYPE)),
    "device": lambda: with_members(member(NEW, type=tarfile.CHRTYPE)),
    "folder": lambda: with_members(member("deltas", type=tarfile.DIRTYPE)),
    "other-digest": lambda: with_members(member(NEW, EVIL)),
    "stray": lambda: with_members(member("README", EVIL)),
    "sparse": sparse,
    "old-sparse": old_sparse,
    "huge": lambda: sized(1 << 40),
    "negative": lambda: sized(-(1 << 40)),
    "many": lambda: tar_of(*(member("blobs", type=tarfile.DIRTYPE) for _ in range(10_001))),
    "gzip-bomb": lambda: gzip.compress(bytes(1 << 26)),
    "gzip": lambda: gzip.compress(with_members()),
    "pax-chain": lambda: chained(b"x", 20_000),
    "global-chain": lambda: chained(b"g", 20_000),
    "name-chain": lambda: chained(b"L", 20_000),
    "name-of-reference-up": lambda: with_members(reference="../../up@v1"),
    "name-of-reference-absolute": lambda: with_members(reference="/up@v1"),
    "name-of-reference-nul": lambda: with_members(reference="a\0b@v1"),
    "name-of-reference-capital": lambda: with_members(reference="Reviews@v1"),
    "title-up": lambda: with_members(title=b"../../../precious"),
    "title-absolute": lambda: with_members(title=b"/tmp/peftkit-escaped"),
    "title-of-a-link": lambda: with_members(title=b"oci-manifest.json"),
    "size-lie": lambda: with_members(lie=1 << 60),
    "info-of-other-kind": lambda: with_members(about=encode_info(info("weights"))),
    "info-deep": lambda: with_members(about=b"[" * 100_000),
    "index-deep": lambda: tar_of(member("index.json", b"[" * 1_000_000)),
    "index-large": lambda: tar_of(member("index.json", b" " * ((4 << 20) + 1))),
    "index-many": lambda: tar_of(member("index.json", encode_index(MANY))),
    "empty": lambda: b"",
    "zeros": lambda: bytes(1 << 20),
    "cut": lambda: with_members()[:3000],
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_archive_is_refused_and_writes_nothing(attack, outside, capsys):
    source = outside / "in" / "hostile.tar"
    source.write_bytes(HOSTILE[attack]())
    before = below(outside)
    tracemalloc.start()
    started = time.process_time()
    assert main(["adapters", "import", str(source)]) == 1
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (line,) = capsys.readouterr().err.splitlines()
    assert "(unexpected;" not in line
    assert (below(outside), Path("/tmp/peftkit-escaped").exists()) == (before, False)
    assert peak < source.stat().st_size * 8 + (64 << 20)
    assert seconds < 20


def test_the_archive_without_an_attack_is_taken(outside, capsys):
    source = outside / "in" / "good.tar"
    source.write_bytes(with_members())
    assert main(["adapters", "import", str(source)]) == 0
    assert state_of(outside / "in" / "store") == {"reviews@v1": 1.0, "reviews@v2": 3.0}


@pytest.mark.slow
def test_mutated_archives_are_taken_as_they_were_or_refused(outside):
    whole, draw = with_members(), random.Random(0)
    source, store = outside / "in" / "hostile.tar", outside / "in" / "store"
    before, taken = below(outside), 0
    for _ in range(3000):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):  # headers are one block in about two
            changed[draw.randrange(len(whole) - 5120)] = draw.randrange(256)
        source.write_bytes(changed)
        try:
            import_archive(Registry(store), source, save_as="taken")
        except RegistryError:
            continue
        taken += 1
    state = state_of(store)
    assert {value for name, value in state.items() if name.startswith("taken")} <= {3.0}
    assert taken > 0
    now = below(outside)
    assert {n for n in now.keys() | before.keys() if now.get(n) != before.get(n)} <= {
        n for n in now if n.startswith("in/")
    }
