"""Changed tensors, compressed without loss against the base that they came from.

Called by `tensors`, which writes and reads a delta's files. Imports torch, numpy and zstandard.
The base's bits are subtracted from a tensor's as unsigned integers, so that a small step of
training leaves a small number; the numbers' bytes are split into planes, and each plane is
compressed if that makes it smaller. What comes back is compared with a digest of what went in.

Legend: E elements of a tensor, W bytes of one element.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from peftkit.errors import RegistryError
from peftkit.registry.tensors import BIT_DELTA
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import Tensor

VERSION = "1"
LEVEL = 1
"""Of zstd. Higher levels cost several times the time for one or two percent."""

_MAX_GROWTH = 64
_FREE_BYTES = 64 << 20
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

BaseTensors = Callable[[str], "Tensor | None"]
"""Name in the delta → the base's tensor, None where it has none of that name."""


class _Entry(Section):
    dtype: str
    shape: list[int]
    against_base: bool
    planes: list[tuple[Literal["raw", "zstd"], int]] = Field(max_length=8)
    """Codec and stored bytes of each plane, from the lowest byte to the highest."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the restored bytes."""


class _Content(Section):
    version: Literal["1"] = "1"
    tensors: dict[str, _Entry]


def encode(
    tensors: "Mapping[str, Tensor]", base: BaseTensors
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Streams by name (uint8, 1-D) and the metadata that says how to read them.

    The same input gives the same bytes. One tensor at a time is held twice.
    """
    import torch

    streams, entries = {}, {}
    for name, tensor in sorted(tensors.items()):
        data = _bytes_of(tensor)
        reference = _reference(tensor, base(name))
        planes = [_packed(plane) for plane in _planes(data, tensor.element_size(), reference)]
        entries[name] = _Entry(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            against_base=reference is not None,
            planes=[(codec, len(stored)) for codec, stored in planes],
            sha256=hashlib.sha256(data).hexdigest(),
        )
        joined = b"".join(stored for _, stored in planes)
        streams[name] = (
            torch.frombuffer(bytearray(joined), dtype=torch.uint8)
            if joined
            else (torch.empty(0, dtype=torch.uint8))
        )
    content = _Content(tensors=entries).model_dump_json()
    return streams, {BIT_DELTA: content}


def decode(
    streams: "Mapping[str, Tensor]", metadata: Mapping[str, str], base: BaseTensors
) -> "dict[str, Tensor]":
    """The tensors that `encode` was given, to the bit.

    Raises:
        RegistryError: damaged or hostile streams, or another base; lists every problem.
    """
    entries = read_entries(metadata, {name: s.numel() for name, s in streams.items()})
    problems, tensors = [], {}
    for name, entry in entries.items():
        try:
            tensors[name] = _restored(name, entry, streams[name], base)
        except RegistryError as error:
            problems.extend(error.problems)
    if problems:
        raise RegistryError(problems)
    return tensors


def read_entries(metadata: Mapping[str, str], lengths: Mapping[str, int]) -> dict[str, _Entry]:
    """What the metadata says, checked against the streams' lengths; nothing is restored.

    Raises:
        RegistryError: it does not fit the streams, or would need absurd memory.
    """
    try:
        payload: Any = json.loads(metadata[BIT_DELTA])
        if isinstance(payload, dict) and payload.get("version") != VERSION:
            raise RegistryError(
                f"weights delta: compressed form {str(payload.get('version'))[:20]!r}, this "
                f"peftkit reads {VERSION!r}; upgrade peftkit"
            )
        entries = _Content.model_validate_json(metadata[BIT_DELTA]).tensors
    except (KeyError, RecursionError, ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RegistryError(f"weights delta: unreadable description ({reason})") from error
    if entries.keys() != lengths.keys():
        raise RegistryError("weights delta: describes other tensors than it holds")
    problems = [p for n, entry in entries.items() for p in _problems(n, entry, lengths[n])]
    own = sum(_bytes(e) for e in entries.values() if not e.against_base)
    if not problems and own > _MAX_GROWTH * sum(lengths.values()) + _FREE_BYTES:
        problems = [f"weights delta: would grow to {own} bytes, more than {_MAX_GROWTH} times"]
    if problems:
        raise RegistryError(problems)
    return entries


def _problems(name: str, entry: _Entry, length: int) -> list[str]:
    import torch

    dtype = getattr(torch, entry.dtype, None)
    where = f"weights delta: tensor {name[:100]!r}"
    if not isinstance(dtype, torch.dtype) or dtype.itemsize not in _INTEGERS:
        return [f"{where} has unknown dtype {entry.dtype[:40]!r}"]
    elements = math.prod(entry.shape)
    if any(not 0 <= size < 1 << 48 for size in entry.shape) or elements >= 1 << 48:
        return [f"{where} has shape {entry.shape[:8]}"]
    if len(entry.planes) != dtype.itemsize:
        return [f"{where} has {len(entry.planes)} planes, expected {dtype.itemsize}"]
    sizes = [size for _, size in entry.planes]
    if min(sizes) < 0 or sum(sizes) != length:
        return [f"{where} says {sum(sizes)} bytes, {length} are stored"]
    if any(codec == "raw" and size != elements for codec, size in entry.planes):
        return [f"{where} has a plane of another length than its {elements} elements"]
    return []


def _bytes(entry: _Entry) -> int:
    return math.prod(entry.shape) * len(entry.planes)


def _restored(name: str, entry: _Entry, stream: "Tensor", base: BaseTensors) -> "Tensor":
    import torch

    dtype = getattr(torch, entry.dtype)
    where = f"weights delta: tensor '{name}'"
    reference = None
    if entry.against_base:
        reference = _reference(torch.empty(entry.shape, dtype=dtype, device="meta"), base(name))
        if reference is None:
            raise RegistryError(f"{where}: the base has no such tensor of shape {entry.shape}")
    elements, stored, planes = math.prod(entry.shape), stream.numpy(), []
    place = 0
    for codec, size in entry.planes:
        planes.append(_unpacked(codec, stored[place : place + size].tobytes(), elements, where))
        place += size
    data = _joined(planes, dtype.itemsize, reference)
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise RegistryError(
            f"{where}: expected sha256:{entry.sha256}, restored sha256:{found}; "
            "the base is another one, or the delta is damaged"
        )
    if not elements:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(entry.shape)


def _bytes_of(tensor: "Tensor") -> bytes:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _reference(tensor: "Tensor", base: "Tensor | None") -> bytes | None:
    """The base's bytes in the tensor's dtype; None where it has no counterpart."""
    if base is None or base.shape != tensor.shape:
        return None
    return _bytes_of(base.to(tensor.dtype))


def _planes(data: bytes, width: int, reference: bytes | None) -> list[bytes]:
    """The W byte planes of the difference to the base, or of the bits themselves.

    A difference is folded (0, -1, 1, -2, … become 0, 1, 2, 3, …): small steps down would otherwise
    set every high bit.
    """
    numbers = np.frombuffer(data, dtype=_INTEGERS[width])
    if reference is not None:
        step = numbers - np.frombuffer(reference, dtype=_INTEGERS[width])
        sign = (step >> (8 * width - 1)).astype(numbers.dtype)
        numbers = (step << 1) ^ (0 - sign).astype(numbers.dtype)
    split = numbers.view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(split[:, byte]).tobytes() for byte in range(width)]


def _joined(planes: list[bytes], width: int, reference: bytes | None) -> bytes:
    """The inverse of `_planes`."""
    split = np.stack([np.frombuffer(plane, dtype=np.uint8) for plane in planes], axis=1)
    numbers = np.ascontiguousarray(split).reshape(-1).view(_INTEGERS[width])
    if reference is not None:
        sign = (0 - (numbers & 1)).astype(numbers.dtype)
        step = (numbers >> 1) ^ sign
        numbers = step + np.frombuffer(reference, dtype=_INTEGERS[width])
    return bytes(numbers.tobytes())


def _packed(plane: bytes) -> tuple[Literal["raw", "zstd"], bytes]:
    import zstandard

    packed = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False).compress(plane)
    return ("zstd", packed) if len(packed) < len(plane) else ("raw", plane)


def _unpacked(codec: str, stored: bytes, elements: int, where: str) -> bytes:
    """A plane of E bytes. Its frame says its size, which is compared before anything is made."""
    import zstandard

    if codec == "raw":
        return stored
    try:
        size = zstandard.frame_content_size(stored)
        if size != elements:
            raise RegistryError(f"{where}: a plane of {size} bytes, expected {elements}")
        plane = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(
            stored, allow_extra_data=False
        )
    except (MemoryError, zstandard.ZstdError) as error:
        raise RegistryError(f"{where}: a damaged plane ({error})") from error
    return plane
