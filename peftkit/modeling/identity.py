"""Which base model this is: a digest that does not depend on path, sharding or file order.

Called by the experiment when a delta is saved and by the registry when one is attached.
Reads safetensors files directly, so that no model is built and no code of the base runs.
"""

import hashlib
import json
import operator
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from peftkit.errors import SourceError
from peftkit.modeling.digest_cache import cached_lines

_CHUNK_BYTES = 1 << 22
_DAMAGE = (
    AttributeError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
)
"""What reading a header raises that is not what the format says."""
TOKENIZER_FILES = (
    "added_tokens.json",
    "bpe.codes",
    "byte_maps.json",
    "chat_template.jinja",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
    "word_shape.json",
    "word_pronunciation.json",
)
"""`VOCAB_FILES_NAMES` of transformers' tokenizers, and what stands beside them."""


def base_digest(folder: Path) -> str:
    """Digest over the sorted (tensor name, dtype, shape, bytes) of a folder's safetensors.

    A file that was hashed before is not read again, as long as it is the same file.

    Returns:
        `sha256:<hex>`, the same for one file or many shards of the same tensors.

    Raises:
        SourceError: no safetensors file, a damaged one, or one tensor in two files.
    """
    lines: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, line in cached_lines(path, lambda path: dict(_tensor_lines(path))).items():
            if name in lines:
                raise SourceError(f"{path}: tensor '{name}' is in another file of the folder too")
            lines[name] = line
    if not lines:
        raise SourceError(f"{folder}: no *.safetensors file to take the base's digest from")
    text = "\n".join(lines[name] for name in sorted(lines))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def tokenizer_digest(folder: Path) -> str:
    """Digest over the tokenizer files of a folder, by sorted name.

    Returns:
        `sha256:<hex>`.
    """
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_FILES):
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _tensor_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Name and canonical line of each tensor in one file."""
    with path.open("rb") as stream:
        try:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
            entries = [_entry(n, entry) for n, entry in header.items() if n != "__metadata__"]
        except _DAMAGE as error:
            raise SourceError(f"{path}: not a readable safetensors file ({error})") from error
        for name, start, end, label in entries:
            stream.seek(8 + size + start)
            yield name, f"{label} {_hash(stream, end - start)}"


def _entry(name: str, entry: dict[str, Any]) -> tuple[str, int, int, str]:
    """Name, first byte, byte after the last, and canonical label of a tensor in the header."""
    start, end = map(operator.index, entry["data_offsets"])
    if not 0 <= start <= end:
        raise ValueError(f"tensor '{name}' lies at bytes {start} to {end}")
    shape = ",".join(map(str, entry["shape"]))
    return name, start, end, f"{name} {entry['dtype']} [{shape}]"


def _hash(stream: BinaryIO, length: int) -> str:
    digest = hashlib.sha256()
    while length > 0:
        chunk = stream.read(min(length, _CHUNK_BYTES))
        if not chunk:
            raise SourceError(f"{stream.name}: ends before its last tensor does")
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()
