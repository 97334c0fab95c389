"""Writing a safetensors file a block at a time, so that no tensor is in memory twice.

Called by `writing`. The header comes first and says where each tensor will lie.
Source: safetensors format, https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
    # Wide elements first: every tensor then lies at a multiple of its own element's size.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    with path.open("xb") as stream:
        stream.write(_header(ordered))
        for entry in ordered:
            before = stream.tell()
            for block in entry.blocks():
                _write(stream, block)
            assert stream.tell() - before == entry.nbytes, entry.name
    return sum(entry.nbytes for entry in ordered)


def _header(entries: Iterable[Entry]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
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


def _write(stream: BinaryIO, block: Tensor) -> None:
    if block.numel():
        flat = block.detach().contiguous().reshape(-1)
        stream.write(flat.view(torch.uint8).numpy().data)
