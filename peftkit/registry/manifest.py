"""What a stored delta says of itself: `manifest.json`, its fields and its exact bytes.

Called by the store, and by the experiment to fill in `DeltaInfo`; imports no tensor library.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from peftkit.contracts import Quantisation
from peftkit.errors import RegistryError
from peftkit.registry.tensors import FileDigest
from peftkit.schema import Section

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
UtcTime = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)$")]


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunSummary(Section):
    """The run that a delta comes from."""

    record: str
    """Path or id of the run record."""
    seed: int
    status: str
    metrics: dict[str, float | None]
    """None where a metric was not a number."""


class DeltaInfo(Section):
    """What a delta belongs to and where it comes from. The dicts hold plain JSON values."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["adapter", "weights"]
    base_name: str
    base_revision: str | None = None
    base_digest: Digest
    base_config: dict[str, Any] | None = None
    """What its config says of the base, apart from transformers' defaults."""
    quantisation: Quantisation | None = None
    tokenizer_digest: Digest
    task: dict[str, Any]
    method: dict[str, Any]
    labels: list[str] | None = None
    """Label names in id order."""
    data: dict[str, Digest] = {}
    """Split → digest of its cleaned rows, for `train` and `validation`."""
    model: dict[str, Any]
    """`auto_class` and the overrides of the base's config."""
    recipe: dict[str, Any]
    recipe_digest: Digest
    run: RunSummary
    stand_in: bool
    """True if the run trained on a sample that peftkit made itself."""
    created: UtcTime = Field(default_factory=_utc_now)
    """UTC, ISO 8601."""


class Manifest(Section):
    """Content of `manifest.json`, to which the file adds a `digest` of all of it.

    `name` and `version` say where the folder belongs, so that a moved folder is noticed.
    """

    name: str
    version: str
    info: DeltaInfo
    files: dict[str, FileDigest]


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: the content, then the digest of it.

    Raises:
        RegistryError: the info holds what JSON cannot, or too much.
    """
    try:
        sealed = _sealed(manifest.model_dump())
    except (RecursionError, TypeError, ValueError) as error:
        raise RegistryError(
            f"{manifest.name}: info holds what JSON cannot ({' '.join(str(error).split())})"
        ) from error
    if len(sealed) > MAX_MANIFEST_BYTES:
        raise RegistryError(
            f"{manifest.name}: info of {len(sealed)} bytes, at most {MAX_MANIFEST_BYTES}"
        )
    return sealed


def _sealed(payload: dict[str, Any]) -> bytes:
    digest = f"sha256:{FileDigest.of(_json(payload)).sha256}"
    return _json({**payload, "digest": digest})


def _json(payload: dict[str, Any]) -> bytes:
    text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False, default=os.fspath)
    return f"{text}\n".encode()


def decode_manifest(data: bytes, path: Path) -> Manifest:
    """Content of the bytes of `path`, which must be exactly what `encode_manifest` made.

    Raises:
        RegistryError: not JSON, another digest, a newer schema, or fields that do not fit.
    """
    try:
        payload = json.loads(data.decode())
        payload.pop("digest", None)
        _refuse_newer(payload, path)
        sealed = _sealed(payload)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RegistryError(f"{path}: damaged manifest, not readable as JSON ({reason})") from error
    if sealed != data:
        raise RegistryError(
            f"{path}: damaged manifest, expected {FileDigest.of(sealed)}, "
            f"found {FileDigest.of(data)}"
        )
    try:
        return Manifest.model_validate_json(_json(payload))
    except ValidationError as error:
        raise RegistryError(
            f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
        ) from error


def _refuse_newer(payload: dict[str, Any], path: Path) -> None:
    info = payload.get("info")
    version = info.get("schema_version") if isinstance(info, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RegistryError(
            f"{path}: manifest of schema {version}, this peftkit reads up to {SCHEMA_VERSION}; "
            "upgrade peftkit"
        )
