"""Safetensors files, written a block at a time or put together in one piece of memory.

Called by merging and by the registry. The library's own writer makes two copies of the whole.
Source: safetensors format, https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]
    """Its parts along the first dimension, in order and in its dtype; each is written at once, so
    that one buffer can carry all."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        """A tensor that is there already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shard(path: Path, entries: Iterable[Entry]) -> int:
    """Write a new file.

    Returns:
        Bytes of the tensors.

    Raises:
        OSError: the disk refuses.
    """
    ordered = _ordered(entries)
    with path.open("xb") as stream:
        stream.write(_header(ordered, {"format": "pt"}))
        for entry in ordered:
            before = stream.tell()
            for block in entry.blocks():
                stream.write(_buffer(block))
            assert stream.tell() - before == entry.nbytes, entry.name
    return sum(entry.nbytes for entry in ordered)


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file; the same for the same tensors, whatever their order.

    Raises:
        KeyError: a dtype that the format does not have.
    """
    ordered = _ordered(Entry.of(name, tensor) for name, tensor in tensors.items())
    parts = [_buffer(block) for entry in ordered for block in entry.blocks()]
    return b"".join([_header(ordered, metadata), *parts])


def _ordered(entries: Iterable[Entry]) -> list[Entry]:
    """Wide elements first: every tensor then lies at a multiple of its own element's size."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def _header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    place = 0
    for entry in entries:
        end = place + entry.nbytes
        content[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _buffer(block: Tensor) -> memoryview:
    """The block's bytes, in its own memory where that is dense."""
    flat = block.detach().contiguous().reshape(-1)
    # An empty tensor cannot be viewed as bytes.
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
