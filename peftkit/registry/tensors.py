"""A delta as files and back: safetensors with bounded, checked headers.

Called by the store; imports torch only when tensors are made or written.
The file names are PEFT's own for adapters, so that `peft.PeftModel.from_pretrained` opens the
stored folder as it is.
"""

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from peftkit.contracts import Delta
from peftkit.errors import RegistryError

if TYPE_CHECKING:
    from torch import Tensor

    from peftkit.registry.bit_delta import BaseTensors

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000

ADAPTER_CONFIG = "adapter_config.json"
TENSOR_FILES = {"adapter": "adapter_model.safetensors", "weights": "weights.safetensors"}
DELTA_FILES = {
    "adapter": frozenset({TENSOR_FILES["adapter"], ADAPTER_CONFIG}),
    "weights": frozenset({TENSOR_FILES["weights"]}),
}
"""Kind of the delta → exactly the files that carry it."""

BIT_DELTA = "peftkit.bit-delta"
"""Key of the metadata of tensors that are kept as differences to the base's; the only one, since
safetensors writes several in any order."""

_MOST = {b"{": 1, b"[": 12, b":": 10}
"""How often a character of JSON stands in a header for each tensor, with what says how to restore a
difference to the base: up to eight planes of two values, and six keys."""

_METADATA_KEY = "__metadata__"
_NAMED_PROBLEMS = 20


def delta_to_files(delta: Delta, *, base: "BaseTensors | None" = None) -> dict[str, bytes]:
    """The bytes of each file of `delta`, by file name; nothing is written.

    With `base`, tensors of kind `weights` are kept as differences to the base's.

    Raises:
        RegistryError: no tensors, NaN or Inf in a tensor, or content that the files cannot hold;
            lists every problem.
    """
    problems = _config_problems(delta) + _tensor_problems(delta.tensors)
    if problems:
        raise RegistryError(problems)
    tensor_file = TENSOR_FILES[delta.kind]
    if delta.kind == "weights" and base is not None:
        from peftkit.registry import bit_delta

        files = {tensor_file: _serialised(*bit_delta.encode(delta.tensors, base))}
    else:
        files = {tensor_file: _serialised(delta.tensors, {"format": "pt"})}
    # A file that could not be read again must not be written.
    check_header(files[tensor_file], tensor_file)
    if delta.adapter_config is not None:
        files[ADAPTER_CONFIG] = _config_bytes(delta.adapter_config)
    return files


def delta_from_files(
    kind: Literal["adapter", "weights"],
    files: Mapping[str, bytes],
    *,
    base: "BaseTensors | None" = None,
) -> Delta:
    """The delta in `files`, whose bytes the caller has verified; the inverse of `delta_to_files`.

    Raises:
        RegistryError: a file that cannot be read as what its name says, or one that needs its base
            and gets none.
    """
    tensors, metadata = _deserialised(kind, files)
    if BIT_DELTA in metadata:
        from peftkit.registry import bit_delta

        if base is None:
            raise RegistryError(f"{kind} delta: is kept as a difference and needs its base")
        tensors = bit_delta.decode(tensors, metadata, base)
    return Delta(kind=kind, tensors=tensors, adapter_config=_config_in(kind, files))


def check_files(kind: Literal["adapter", "weights"], files: Mapping[str, bytes]) -> None:
    """Whether files from elsewhere can be read as a delta, as far as that shows without the base.

    Raises:
        RegistryError: a file that cannot be read as what its name says, or NaN or Inf.
    """
    tensors, metadata = _deserialised(kind, files)
    _config_in(kind, files)
    if BIT_DELTA in metadata:
        from peftkit.registry import bit_delta

        bit_delta.read_entries(metadata, {name: t.numel() for name, t in tensors.items()})
    elif problems := _tensor_problems(tensors):
        raise RegistryError(problems)


def needs_base(kind: Literal["adapter", "weights"], files: Mapping[str, bytes]) -> bool:
    """Whether the delta in `files` can only be read beside its base."""
    data = files[TENSOR_FILES[kind]]
    return kind == "weights" and BIT_DELTA in check_header(data, kind)


def _deserialised(
    kind: Literal["adapter", "weights"], files: Mapping[str, bytes]
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The tensors of a file and its metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    tensor_file = TENSOR_FILES[kind]
    data = files[tensor_file]
    metadata = check_header(data, tensor_file)
    try:
        tensors = load(data)
    except (SafetensorError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as e:
        raise RegistryError(f"{kind} delta: cannot be read ({_one_line(e)})") from e
    if kind == "weights" and metadata.keys() not in ({"format"}, {BIT_DELTA}):
        raise RegistryError(
            f"{tensor_file}: expected metadata 'format' or '{BIT_DELTA}', "
            f"found {sorted(metadata)[:5]}"
        )
    return tensors, metadata


def _config_in(
    kind: Literal["adapter", "weights"], files: Mapping[str, bytes]
) -> dict[str, Any] | None:
    try:
        return json.loads(files[ADAPTER_CONFIG]) if kind == "adapter" else None
    except (LookupError, RecursionError, ValueError) as error:
        raise RegistryError(f"{kind} delta: cannot be read ({_one_line(error)})") from error


def check_header(data: bytes, where: str) -> dict[str, str]:
    """Refuse a safetensors header that is too large to parse safely or says a thing twice.

    Returns:
        Its metadata.

    Offsets, dtypes and shapes are left to safetensors, which checks them.

    Raises:
        RegistryError: starts with `where`.
    """
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if size > MAX_HEADER_BYTES:
        raise RegistryError(
            f"{where}: header of {size} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    if not 0 < size <= len(data) - 8:
        raise RegistryError(
            f"{where}: not a safetensors file (header of {size} in {len(data)} bytes)"
        )
    header = data[8 : 8 + size]
    # Counted before parsing: four MiB of '{}' would become more than a million objects.
    if any(header.count(mark) > most * MAX_TENSORS + 2 for mark, most in _MOST.items()):
        raise RegistryError(f"{where}: more than {MAX_TENSORS} tensors, which is the most allowed")
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
    except (RecursionError, ValueError) as error:
        raise RegistryError(f"{where}: unreadable header ({_one_line(error)})") from error
    if not isinstance(entries, dict) or len(entries.keys() - {_METADATA_KEY}) > MAX_TENSORS:
        raise RegistryError(f"{where}: expected a header of at most {MAX_TENSORS} named tensors")
    metadata = entries.get(_METADATA_KEY, {})
    return metadata if isinstance(metadata, dict) else {}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One JSON object; two equal keys would let two readers see different tensors."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:80]!r} appears more than once")
        found[key] = value
    return found


def _config_problems(delta: Delta) -> list[str]:
    config = delta.adapter_config
    if delta.kind == "weights":
        return [] if config is None else ["delta: kind 'weights' takes no adapter_config"]
    if config is None or "peft_type" not in config:
        return ["delta: kind 'adapter' needs the adapter_config of its PEFT model, with peft_type"]
    return []


def _tensor_problems(tensors: "Mapping[str, Tensor]") -> list[str]:
    if not any(tensor.numel() for tensor in tensors.values()):
        return ["delta: holds no values; training changed nothing, so there is nothing to save"]
    if _METADATA_KEY in tensors:
        return [f"delta: no tensor may be called '{_METADATA_KEY}', safetensors uses that name"]
    bad = sorted(name for name, tensor in tensors.items() if not _is_finite(tensor))
    problems = [
        f"delta: tensor '{name}' holds NaN or Inf; a diverged run is not saved"
        for name in bad[:_NAMED_PROBLEMS]
    ]
    if len(bad) > _NAMED_PROBLEMS:
        problems.append(f"delta: and {len(bad) - _NAMED_PROBLEMS} more tensors with NaN or Inf")
    return problems


def _is_finite(tensor: "Tensor") -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no isfinite for float8
    # A sum takes a tenth of the time and is finite only if all values are; a finite tensor may
    # still overflow it.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _serialised(tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> bytes:
    from peftkit.modeling.tensor_file import encoded

    try:
        return encoded(tensors, metadata)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RegistryError(f"delta: cannot be written ({_one_line(error)})") from error


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    """`adapter_config.json` in the form that `PeftConfig.save_pretrained` gives it."""
    try:
        return json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode()
    except (RecursionError, TypeError, ValueError) as error:
        raise RegistryError(f"delta: {ADAPTER_CONFIG}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
