"""The run record: one JSON file that says what a run was, what it cost and what it scored.

Written by the experiment at the end of every run, whichever way it ended; read by the tables, the
registry and the command line. Imports errors and staging; no torch. A figure that the run did not
reach, or that cannot be measured on its device, is null. A score or a loss that was computed but
is not a finite number is null as well in the file, and NaN once read.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, NotRequired, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict

from peftkit.errors import RunError
from peftkit.staging import write_file

SCHEMA_VERSION: Final = 1

Status = Literal["completed", "failed", "out_of_memory", "non_finite", "interrupted", "terminated"]
Phase = Literal["load", "train_step", "eval"]
SplitName = Literal["holdout", "validation"]


def _nan_if_not_finite(value: Any) -> Any:
    is_lost = value is None or (isinstance(value, float) and not math.isfinite(value))
    return math.nan if is_lost else value


Score = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(_nan_if_not_finite),
    PlainSerializer(lambda value: None if math.isnan(value) else value, when_used="json"),
]
"""A computed number. NaN and the infinities are kept as NaN, which JSON output turns to null."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
"""Like that of a count, its bound is far beyond anything measured: sums stay finite below it."""
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]

_CONFIG = ConfigDict(
    frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
)


class _Part(BaseModel):
    """A block of the record: unknown keys and infinite numbers refused, types not converted."""

    model_config = _CONFIG


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Epoch(TypedDict):
    """One evaluation during training. `step` counts optimizer steps, `loss` is the train loss."""

    epoch: NotRequired[Count]
    step: Count
    loss: Score
    holdout: dict[str, Score]


class MemoryPeaks(_Part):
    """Peaks of one phase in bytes; None: not measured on this device. See docs/measuring.md."""

    allocated_bytes: Count | None
    reserved_bytes: Count | None
    resident_bytes: Count | None


class Seconds(_Part):
    """Wall time of each part of the run; None: not reached.

    `train` and `eval` leave out `metered`, the steps that the memory probe watched. `train_cpu` is
    the main process's processor time in `train`, all its threads together: the steadier figure
    where other programs share the machine; None also in records from before it was kept.
    """

    load: Amount | None
    tokenise: Amount | None
    train: Amount | None
    train_cpu: Amount | None = None
    eval: Amount | None
    metered: Amount | None


class TrainBatch(_Part):
    """How an optimizer step was really cut up on each process."""

    per_device_train_batch_size: Annotated[int, Field(ge=1)]
    gradient_accumulation_steps: Annotated[int, Field(ge=1)]
    found: bool
    """Whether `auto_batch_size` looked for it; else it is as the recipe asks."""


class Digests(_Part):
    """Content digests, `sha256:…`; None: not reached."""

    base: Digest | None
    data_train: Digest | None
    data_validation: Digest | None
    recipe: Digest


class Origins(_Part):
    """Where base and data came from: path, mirror, hub, package or sample; None: not reached."""

    base: str | None
    data: str | None


class RunRecord(_Part):
    """All that is kept of one run, besides its predictions, log and delta."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    status: Status
    error: str | None
    """Why the run did not complete, in one or a few lines."""
    recipe: dict[str, Any]
    """The resolved recipe: defaults filled in, overrides applied."""
    recipe_digest: Digest
    seed: int
    metrics: dict[SplitName, dict[str, Score]]
    history: list[Epoch]
    memory: dict[Phase, MemoryPeaks]
    predicted_allocated_bytes: dict[Phase, Count] | None = None
    """What the planner expected of `memory`, before the run; None: nothing, or an older record."""
    seconds: Seconds
    examples_per_second: Amount | None
    tokens_per_second: Amount | None
    """Padding not counted."""
    optimizer_steps: Count
    resumed_after_step: Count | None = None
    """Where the last `--resume` took the run up; None: it ran through in one process. Seconds,
    memory and throughput are those of all its processes together."""
    train_batch: TrainBatch | None = None
    """None: no step was reached, or the record is older."""
    weights_from_step: Count | None = None
    """Step of an earlier training whose weights `--resume-weights-only` began with; what that
    training cost is not in this record."""
    trainable_parameters: Count | None
    total_parameters: Count | None
    delta_bytes: Count | None
    delta: str | None
    """The delta in the registry, `name@version`."""
    digests: Digests
    learning_rates_tried: list[Amount]
    libraries: dict[str, str]
    device: str
    processes: Annotated[int, Field(ge=1)]
    mixed_precision: str
    distributed_type: str
    git_commit: str | None
    git_dirty: bool | None
    predictions: str | None
    """Path of the per-example predictions, relative to the record's folder."""
    stand_in: bool
    """True if any input was a sample that peftkit made itself."""
    origins: Origins
    started: AwareDatetime
    finished: AwareDatetime

    @field_validator("recipe")
    @classmethod
    def _recipe_is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("predictions")
    @classmethod
    def _predictions_stay_inside(cls, value: str | None) -> str | None:
        if value is not None and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError("must be a path relative to the record's folder, and inside it")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        disagreements = {
            "recipe_digest differs from digests.recipe": self.recipe_digest != self.digests.recipe,
            "stand_in must be true when origins name a sample": not self.stand_in
            and "sample" in (self.origins.base, self.origins.data),
            "a completed run has no error": self.status == "completed" and self.error is not None,
            "started and finished must be UTC": any(
                moment.utcoffset() for moment in (self.started, self.finished)
            ),
        }
        found = [text for text, wrong in disagreements.items() if wrong]
        if found:
            raise ValueError("; ".join(found))
        return self


def write_record(path: Path, record: RunRecord) -> None:
    """Write or replace the record; a reader sees the old one whole or the new one whole."""
    text = json.dumps(record.model_dump(mode="json"), allow_nan=False, indent=2, ensure_ascii=False)
    write_file(path, f"{text}\n".encode())


def read_record(path: Path) -> RunRecord:
    """Read a record back, checked.

    Raises:
        RunError: no such file, not a whole JSON object, another schema, or fields that are
            missing, unknown or wrong; one line each.
    """
    content = _read_object(path)
    version = content.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RunError(
            f"{path}: schema_version: found {version}, this peftkit reads up to {SCHEMA_VERSION}; "
            "upgrade peftkit to read it"
        )
    if version is None:
        raise RunError(f"{path}: schema_version: missing; this is not a run record")
    try:
        return RunRecord.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise RunError([f"{path}: {_problem(detail)}" for detail in error.errors()]) from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise RunError(f"{path}: cannot be read as a run record: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path}: not a whole JSON document ({error}); restore it or run the experiment again"
        ) from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: found {type(content).__name__}, a run record is a JSON object")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _problem(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"{key}: missing"
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown field"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    return f"{key}: found {str(detail['input'])[:80]!r}; {message[:1].lower()}{message[1:]}"
