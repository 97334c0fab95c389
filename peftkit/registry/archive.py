"""One file that carries versions of deltas: an OCI image layout in a plain tar (`oci-archive`).

Called by the CLI and tests. Safe to receive from a stranger: nothing is unpacked to disk, only
plain files of known names are read, each is bounded and hashed, and no code runs.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import (
    INDEX_FILE,
    LAYOUT_FILE,
    MAX_DOCUMENT_BYTES,
    decode_index,
    decode_manifest,
    encode_index,
    encode_layout,
    index_line,
)
from peftkit.registry.names import parse_reference
from peftkit.registry.reading import StoredDelta
from peftkit.registry.root import unreadable
from peftkit.registry.store import Registry
from peftkit.staging import fsync_path, staging_name

MAX_MEMBERS = 10_000

_DAMAGE = (EOFError, MemoryError, OverflowError, RecursionError, ValueError, tarfile.TarError)
"""What tarfile raises on hostile headers: a size of a TiB, a chain of a thousand extensions."""
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


def export_archive(registry: Registry, references: list[str], target: Path) -> list[StoredDelta]:
    """Write verified versions to one new file, the same bytes each time.

    Raises:
        RegistryError: an unknown or damaged version, a target that exists, a disk that refuses.
    """
    if target.exists():
        raise RegistryError(f"{target}: exists; take another name or remove it")
    chosen = [registry.find(reference) for reference in references]
    for stored in chosen:
        registry.verify(stored)
    temporary = target.with_name(staging_name())
    try:
        with tarfile.open(temporary, "x:", format=tarfile.PAX_FORMAT) as archive:
            for name, data in _members(registry, chosen):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        fsync_path(temporary)
        temporary.rename(target)
        fsync_path(target.parent)
    except OSError as error:
        raise RegistryError(f"{target}: not written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return chosen


def _members(registry: Registry, chosen: list[StoredDelta]) -> Iterator[tuple[str, bytes]]:
    lines: list[str] = []
    blobs: dict[str, bytes] = {}
    for stored in chosen:
        contents = registry.contents(stored)
        lines.append(index_line(str(stored), contents.manifest_digest))
        blobs |= contents.by_digest()
    yield LAYOUT_FILE, encode_layout()
    yield INDEX_FILE, encode_index(lines)
    for sha256, data in sorted(blobs.items()):
        yield f"blobs/sha256/{sha256}", data


def import_archive(
    registry: Registry, source: Path, *, save_as: str | None = None
) -> list[StoredDelta]:
    """Store every version that an archive holds as the next version of its name.

    `save_as` takes the place of the name, for an archive of one version. What the registry holds
    already under that name is not stored again.

    Raises:
        RegistryError: no such archive, one with anything else in it, damage, or a bad name.
    """
    documents, blobs = _read(source)
    if INDEX_FILE not in documents:
        raise RegistryError(f"{source}: no {INDEX_FILE}; not an archive of deltas")
    recorded = decode_index(documents[INDEX_FILE], source)
    names = {reference: parse_reference(reference).name for reference in recorded}
    if not names or (save_as and len(names) > 1):
        raise RegistryError(f"{source}: holds {len(names)} deltas, expected one to save under")
    found = []
    for reference, manifest in recorded.items():
        data = _blob(blobs, manifest, source)
        decoded = decode_manifest(data, source)
        files = {name: _blob(blobs, file, source) for name, file in decoded.files.items()}
        info = _blob(blobs, decoded.info, source)
        found.append((save_as or names[reference], files, info, data))
    return [registry.receive(name, files, info=i, manifest=m) for name, files, i, m in found]


def _read(source: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The documents by name and the blobs by hex digest, each hashed."""
    documents: dict[str, bytes] = {}
    blobs: dict[str, bytes] = {}
    try:
        with tarfile.open(source, "r:") as archive:
            for count, member in enumerate(archive):
                if count >= MAX_MEMBERS:
                    raise RegistryError(f"more than {MAX_MEMBERS} members")
                _take(archive, member, documents, blobs)
    except RegistryError as error:
        raise RegistryError(f"{source}: {problem}" for problem in error.problems) from error
    except OSError as error:
        raise unreadable(source, "read", error) from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RegistryError(f"{source}: cannot be read as an archive ({reason})") from error
    return documents, blobs


def _take(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    documents: dict[str, bytes],
    blobs: dict[str, bytes],
) -> None:
    """Read one member into one of the two, in place."""
    where = f"member {member.name[:100]!r}"
    if member.isdir() and member.name.rstrip("/") in ("blobs", "blobs/sha256"):
        return
    blob = _BLOB.fullmatch(member.name)
    # Sparse members would grow when read; REGTYPE and AREGTYPE do not.
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise RegistryError(f"{where}: not a plain file; the archive is refused")
    if not blob and member.name not in (LAYOUT_FILE, INDEX_FILE):
        raise RegistryError(f"{where}: no part of an OCI layout; the archive is refused")
    if not blob and member.size > MAX_DOCUMENT_BYTES:
        raise RegistryError(f"{where}: {member.size} bytes, at most {MAX_DOCUMENT_BYTES}")
    key, place = (blob[1], blobs) if blob else (member.name, documents)
    if key in place:
        raise RegistryError(f"{where}: is there twice; the archive is refused")
    stream = archive.extractfile(member)
    data = stream.read() if stream else b""
    if len(data) != member.size:
        raise RegistryError(f"{where}: cut short, expected {member.size} bytes, found {len(data)}")
    found = FileDigest.of(data)
    if blob and found.sha256 != key:
        raise RegistryError(f"{where}: changed, expected sha256:{key}, found {found}")
    place[key] = data


def _blob(blobs: dict[str, bytes], expected: FileDigest, source: Path) -> bytes:
    data = blobs.get(expected.sha256)
    if data is None or len(data) != expected.size:
        raise RegistryError(f"{source}: {expected} is missing")
    return data
