"""What a stored delta says of itself: `manifest.json`, the config of its OCI manifest.

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
from peftkit.schema import Section

SCHEMA_VERSION: Literal[1] = 1
MAX_INFO_BYTES = 4 << 20

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


class Parent(Section):
    """A stored delta that another one was made of."""

    reference: str
    """`name@v1` in the store where it was made."""
    digest: Digest
    """Of its OCI manifest, the same in every store."""
    weight: float | None = None


class Verification(Section):
    """How a written result answered a probe beside what it must equal, in float32 arithmetic."""

    max_abs_difference: float
    """Largest difference of two logits."""
    kl_divergence: float
    """KL(expected ‖ found) in nats, mean over the probe's rows."""
    top1_agreement: float
    """Share of the rows with the same largest logit."""
    rows: int
    bound: str
    """What was asked for, such as `max |Δlogit| ≤ 1e-05`."""


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
    """For a combined delta the run of the parent whose task and head it has, without scores."""
    parents: list[Parent] = []
    """What it was combined or extracted from, in order; empty for a trained delta."""
    verification: Verification | None = None
    """For a combined or extracted delta."""
    stand_in: bool
    """True if the run trained on a sample that peftkit made itself."""
    created: UtcTime = Field(default_factory=_utc_now)
    """UTC, ISO 8601."""


def encode_info(info: DeltaInfo) -> bytes:
    """The bytes of `manifest.json`.

    Raises:
        RegistryError: the info holds what JSON cannot, or too much.
    """
    try:
        text = json.dumps(
            info.model_dump(), indent=2, ensure_ascii=False, allow_nan=False, default=os.fspath
        )
        data = f"{text}\n".encode()
    except (RecursionError, TypeError, ValueError) as error:
        raise RegistryError(
            f"delta: info holds what JSON cannot ({' '.join(str(error).split())})"
        ) from error
    if len(data) > MAX_INFO_BYTES:
        raise RegistryError(f"delta: info of {len(data)} bytes, at most {MAX_INFO_BYTES}")
    return data


def decode_info(data: bytes, where: Path | str) -> DeltaInfo:
    """Read what `encode_info` wrote; the caller has verified the bytes.

    Raises:
        RegistryError: not JSON, a newer schema, or fields that do not fit.
    """
    try:
        payload = json.loads(data)
        _refuse_newer(payload, where)
        return DeltaInfo.model_validate_json(data)
    except ValidationError as error:
        raise RegistryError(
            f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
        ) from error
    except (RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RegistryError(f"{where}: damaged info, not readable as JSON ({reason})") from error


def _refuse_newer(payload: Any, where: Path | str) -> None:
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RegistryError(
            f"{where}: a delta of schema {version}, this peftkit reads up to {SCHEMA_VERSION}; "
            "upgrade peftkit"
        )
