"""A delta as files and back: digests of the bytes, safetensors with bounded, checked headers.

Called by the store; imports torch only when tensors are made or written.
The file names are PEFT's own for adapters, so that `peft.PeftModel.from_pretrained` opens the
stored folder as it is.
"""

import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pydantic import Field

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000

ADAPTER_CONFIG = "adapter_config.json"
TENSOR_FILES = {"adapter": "adapter_model.safetensors", "weights": "weights.safetensors"}
DELTA_FILES = {
    "adapter": frozenset({TENSOR_FILES["adapter"], ADAPTER_CONFIG}),
    "weights": frozenset({TENSOR_FILES["weights"]}),
}
"""Kind of the delta → exactly the files that carry it."""

_METADATA_KEY = "__metadata__"
_NAMED_PROBLEMS = 20
_CHUNK_BYTES = 1 << 20
_RESTORE = "restore this version from a copy or save the delta again"


class FileDigest(Section):
    """Size in bytes and hex SHA-256 of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    def __str__(self) -> str:
        return f"sha256:{self.sha256} ({self.size} bytes)"

    @classmethod
    def of(cls, data: bytes) -> "FileDigest":
        """Digest of bytes in memory."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def checked_file(path: Path, expected: FileDigest | None, *, keep: bool = True) -> bytes:
    """The bytes of a file that is as `expected`, read once; empty bytes unless `keep`.

    Raises:
        RegistryError: another content than `expected`, which is None for a file that should not
            be there; or no regular file.
    """
    limit = expected.size if keep and expected else 0
    try:
        data, found = read_file(path, limit)
    except FileNotFoundError as error:
        raise RegistryError(f"{path}: missing, expected {expected}; {_RESTORE}") from error
    except OSError as error:
        wanted = f"expected {expected or 'no such file'}, found"
        raise RegistryError(f"{path}: {wanted} {_reason(error)}; {_RESTORE}") from error
    if expected is None:
        raise RegistryError(f"{path}: stray, expected no such file, found {found}; remove it")
    if found != expected:
        raise RegistryError(f"{path}: changed, expected {expected}, found {found}; {_RESTORE}")
    return data


def read_file(path: Path, limit: int) -> tuple[bytes, FileDigest]:
    """At most the first `limit` bytes of a regular file, and the digest of all of it.

    Raises:
        OSError: it cannot be read, is a symbolic link (ELOOP), or no file.
    """
    with _opened(path) as stream:
        # Bounded by the true size: a hostile limit would be allocated before it is read.
        data = stream.read(min(limit, os.fstat(stream.fileno()).st_size))
        size, digest = len(data), hashlib.sha256(data)
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            digest.update(chunk)
    return data, FileDigest(size=size, sha256=digest.hexdigest())


def _opened(path: Path) -> BinaryIO:
    # O_NONBLOCK: opening a named pipe would otherwise wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a symbolic link"
    return error.strerror or str(error)


def delta_to_files(delta: Delta) -> dict[str, bytes]:
    """The bytes of each file of `delta`, by file name; nothing is written.

    Raises:
        RegistryError: no tensors, NaN or Inf in a tensor, or content that the files cannot hold;
            lists every problem.
    """
    problems = _config_problems(delta) + _tensor_problems(delta.tensors)
    if problems:
        raise RegistryError(problems)
    tensor_file = TENSOR_FILES[delta.kind]
    files = {tensor_file: _serialised(delta.tensors)}
    # A file that could not be read again must not be written.
    check_header(files[tensor_file], tensor_file)
    if delta.adapter_config is not None:
        files[ADAPTER_CONFIG] = _config_bytes(delta.adapter_config)
    return files


def delta_from_files(kind: Literal["adapter", "weights"], files: Mapping[str, bytes]) -> Delta:
    """The delta in `files`, whose bytes the caller has verified; the inverse of `delta_to_files`.

    Raises:
        RegistryError: a file that cannot be read as what its name says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    tensor_file = TENSOR_FILES[kind]
    data = files[tensor_file]
    check_header(data, tensor_file)
    try:
        tensors = load(data)
        config = json.loads(files[ADAPTER_CONFIG]) if kind == "adapter" else None
    except (SafetensorError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as e:
        raise RegistryError(f"{kind} delta: cannot be read ({_one_line(e)})") from e
    return Delta(kind=kind, tensors=tensors, adapter_config=config)


def check_header(data: bytes, where: str) -> None:
    """Refuse a safetensors header that is too large to parse safely or says a thing twice.

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
    if header.count(b"{") > MAX_TENSORS + 2:
        raise RegistryError(f"{where}: more than {MAX_TENSORS} tensors, which is the most allowed")
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
    except (RecursionError, ValueError) as error:
        raise RegistryError(f"{where}: unreadable header ({_one_line(error)})") from error
    if not isinstance(entries, dict) or len(entries.keys() - {_METADATA_KEY}) > MAX_TENSORS:
        raise RegistryError(f"{where}: expected a header of at most {MAX_TENSORS} named tensors")


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
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no isfinite for float8
    return bool(tensor.isfinite().all())


def _serialised(tensors: "Mapping[str, Tensor]") -> bytes:
    from safetensors import SafetensorError
    from safetensors.torch import save

    try:
        return bytes(save(_unshared(tensors), metadata={"format": "pt"}))
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RegistryError(f"delta: cannot be written ({_one_line(error)})") from error


def _unshared(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Dense copies where safetensors needs them: it refuses views and tied tensors."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        dense = tensor.detach().contiguous()
        storage = dense.untyped_storage().data_ptr()
        result[name] = dense.clone() if storage in seen else dense
        seen.add(storage)
    return result


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    """`adapter_config.json` in the form that `PeftConfig.save_pretrained` gives it."""
    try:
        return json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode()
    except (RecursionError, TypeError, ValueError) as error:
        raise RegistryError(f"delta: {ADAPTER_CONFIG}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
