"""The OCI documents of a store: the manifest of a version, its line in `index.json`, `oci-layout`.

Called by the store, its index and the remotes; imports no tensor library.
A version is an OCI image manifest whose config is the delta's info and whose layers are its files,
so that any OCI tool lists, copies and serves it.
Source: OCI image spec 1.1, image-layout.md and manifest.md.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest
from peftkit.registry.root import unreadable
from peftkit.registry.tensors import DELTA_FILES
from peftkit.schema import Section

ARTIFACT_TYPE = "application/vnd.peftkit.delta.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
TITLE = "org.opencontainers.image.title"
REFERENCE = "org.opencontainers.image.ref.name"
LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
STORE_KEY = "vnd.peftkit.store"
CHECK_KEY = "vnd.peftkit.sha256"
"""Annotation of `index.json` with the digest of all that stands before it."""
STORE_SCHEMA = 1
MAX_DOCUMENT_BYTES = 4 << 20

_INDEX_END = re.compile(
    rb'\n\], "annotations": \{"%s": "([0-9a-f]{64})"\}\}\n\Z' % CHECK_KEY.encode()
)
_INDEX_END_BYTES = 200
_FILE_TYPES = {".json": "application/json"}
_KNOWN_FILES = frozenset().union(*DELTA_FILES.values())


@dataclass(frozen=True)
class VersionManifest:
    """What an OCI manifest says: the digest of the delta's info, and of each file."""

    info: FileDigest
    files: dict[str, FileDigest]


class _Lenient(Section):
    """OCI readers pass over keys that they do not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Descriptor(_Lenient):
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    size: int = Field(ge=0)
    annotations: dict[str, str] = {}

    @property
    def file(self) -> FileDigest:
        return FileDigest(size=self.size, sha256=self.digest.removeprefix("sha256:"))


class _Artifact(_Lenient):
    artifactType: str | None = None


class _Manifest(_Lenient):
    config: _Descriptor
    layers: list[_Descriptor]


class _Index(_Lenient):
    manifests: list[_Descriptor]


_Document = TypeVar("_Document", bound=_Lenient)


def encode_manifest(info: FileDigest, files: dict[str, FileDigest]) -> bytes:
    """The bytes of the OCI manifest of a version."""
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": descriptor(ARTIFACT_TYPE, info),
        "layers": [
            {**descriptor(_file_type(name), files[name]), "annotations": {TITLE: name}}
            for name in sorted(files)
        ],
    }
    return f"{json.dumps(document, indent=2)}\n".encode()


def decode_manifest(data: bytes, where: Path | str) -> VersionManifest:
    """Read what `encode_manifest` wrote, of whatever origin.

    Raises:
        RegistryError: not a manifest of a delta, or one with unexpected files.
    """
    found = _read(data, where, _Artifact).artifactType
    if found != ARTIFACT_TYPE:
        raise RegistryError(
            f"{where}: not a delta, expected artifactType {ARTIFACT_TYPE}, "
            f"found {repr(found[:100]) if found else 'none'}"
        )
    manifest = _read(data, where, _Manifest)
    names = [layer.annotations.get(TITLE, "") for layer in manifest.layers]
    if len(set(names)) < len(names) or not set(names) <= _KNOWN_FILES:
        raise RegistryError(
            f"{where}: holds files {sorted(name[:100] for name in names)}, "
            f"a delta has some of {sorted(_KNOWN_FILES)}, each once"
        )
    files = dict(zip(names, (layer.file for layer in manifest.layers), strict=True))
    return VersionManifest(manifest.config.file, files)


def descriptor(media_type: str, file: FileDigest) -> dict[str, Any]:
    """An OCI content descriptor."""
    return {"mediaType": media_type, "digest": f"sha256:{file.sha256}", "size": file.size}


def index_line(reference: str, manifest: FileDigest) -> str:
    """The entry of `index.json` under which a version is found."""
    entry = descriptor(MANIFEST_TYPE, manifest)
    return json.dumps(
        {**entry, "artifactType": ARTIFACT_TYPE, "annotations": {REFERENCE: reference}}
    )


def encode_index(lines: list[str]) -> bytes:
    """`index.json` with one entry a line."""
    head = f'{{"schemaVersion": 2, "mediaType": "{INDEX_TYPE}", "manifests": [\n'
    body = (head + ",\n".join(lines)).encode()
    return body + _end(hashlib.sha256(body))


def add_to_index(data: bytes, lines: list[str], where: Path | str) -> bytes | None:
    """`index.json` with more entries; None if it is not one that peftkit wrote, with entries.

    Ten thousand lines cost more to gather than to copy.

    Raises:
        RegistryError: it was changed since.
    """
    found = _checked_body(data, where)
    if found is None or bytes(found[0][-2:]) == b"[\n":
        return None
    body, digest = found
    added = "".join(f",\n{line}" for line in lines).encode()
    digest.update(added)
    return b"".join((body, added, _end(digest))) if lines else data


def check_index(data: bytes, where: Path | str) -> None:
    """Compare an `index.json` with the digest that it carries if peftkit wrote it.

    Raises:
        RegistryError: it was changed since.
    """
    _checked_body(data, where)


def _end(digest: "hashlib._Hash") -> bytes:
    return f'\n], "annotations": {{"{CHECK_KEY}": "{digest.hexdigest()}"}}}}\n'.encode()


def _checked_body(data: bytes, where: Path | str) -> "tuple[memoryview, hashlib._Hash] | None":
    """What stands before the digest, and its hash, to be gone on with."""
    match = _INDEX_END.search(data, max(len(data) - _INDEX_END_BYTES, 0))
    if match is None:
        return None
    body, expected = memoryview(data)[: match.start()], match[1].decode()
    digest = hashlib.sha256(body)
    if digest.hexdigest() != expected:
        found = f"found sha256:{digest.hexdigest()}"
        raise RegistryError(f"{where}: changed, expected sha256:{expected}, {found}")
    return body, digest


def decode_index(data: bytes, where: Path | str) -> dict[str, FileDigest]:
    """Reference → digest of its manifest.

    Raises:
        RegistryError: no OCI index, or one that was changed since peftkit wrote it.
    """
    check_index(data, where)
    entries = _read(data, where, _Index).manifests
    return {e.annotations[REFERENCE]: e.file for e in entries if REFERENCE in e.annotations}


def encode_layout() -> bytes:
    """The marker file of an OCI layout, with the schema of peftkit's own part of it."""
    return f"{json.dumps({'imageLayoutVersion': '1.0.0', STORE_KEY: STORE_SCHEMA})}\n".encode()


def check_layout(root: Path) -> None:
    """Refuse a store that a newer peftkit made, and a folder that is something else.

    Raises:
        RegistryError: as said; an absent or empty folder is none of these.
    """
    path = root / LAYOUT_FILE
    try:
        document = json.loads(path.read_bytes()[:MAX_DOCUMENT_BYTES])
        version, schema = document["imageLayoutVersion"], document.get(STORE_KEY, STORE_SCHEMA)
        strange = document.keys() - {"imageLayoutVersion", STORE_KEY}
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(path, "read", error) from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise RegistryError(f"{path}: not the marker of an OCI layout; restore it") from error
    if strange or schema == 0:
        expected, found = encode_layout().decode().strip(), json.dumps(document)[:200]
        raise RegistryError(f"{path}: changed, expected {expected}, found {found}; restore it")
    if version != "1.0.0" or not isinstance(schema, int) or schema > STORE_SCHEMA:
        raise RegistryError(
            f"{path}: a store of layout {version!r} and schema {schema!r}, this peftkit reads "
            f"layout '1.0.0' and schemas up to {STORE_SCHEMA}; upgrade peftkit"
        )


def _read(data: bytes, where: Path | str, model: type[_Document]) -> _Document:
    try:
        return model.model_validate(json.loads(data))
    except ValidationError as error:
        raise RegistryError(
            f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:20]
        ) from error
    except (RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RegistryError(f"{where}: not readable as JSON ({reason})") from error


def _file_type(name: str) -> str:
    return _FILE_TYPES.get(Path(name).suffix, "application/octet-stream")
