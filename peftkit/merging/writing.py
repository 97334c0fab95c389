"""A merged model as files that plain transformers opens, written a shard at a time.

Called by `into_base`. What a delta leaves alone goes from the base's mapped file into the new one;
of the rest one layer is in memory at a time, and in 4 bits one shard.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from peftkit.errors import RegistryError, SourceError
from peftkit.merging.folding import Fold
from peftkit.merging.targets import Target
from peftkit.modeling.four_bit import four_bit_config, quantised
from peftkit.modeling.identity import TOKENIZER_FILES
from peftkit.modeling.tensor_file import Entry, write_shard

_BESIDE_THE_WEIGHTS = (*TOKENIZER_FILES, "generation_config.json", "LICENSE", "LICENSE.txt")


@dataclass(frozen=True)
class Form:
    """How a merged model is written."""

    target: Target = "dequantised"
    dtype: torch.dtype | None = None
    """Of every floating-point tensor; None keeps that of the base's files."""


def write_model(fold: Fold, source: Path, folder: Path, form: Form) -> None:
    """Write weights, config and tokenizer of the merged model into `folder`, which exists.

    Raises:
        OSError: the disk refuses.
        RegistryError: NaN or Inf, or the delta changes nothing.
        SourceError: the base's files lack a tensor.
    """
    write_weights(fold, folder, form)
    write_config(fold, folder, form)
    for name in _BESIDE_THE_WEIGHTS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_weights(fold: Fold, folder: Path, form: Form) -> None:
    """Write the tensors in shards that hold what the base's shards hold; as for `write_model`."""
    shards = _shards(fold)
    weight_map: dict[str, str] = {}
    size, change = 0, _Change(fold)
    for number, names in enumerate(shards, 1):
        file = _shard_name(number, len(shards))
        entries = [entry for name in names for entry in _entries(fold, name, form, change)]
        size += write_shard(folder / file, entries)
        weight_map |= {entry.name: file for entry in entries}
    if not change.seen:
        raise RegistryError("delta: changes no tensor of the base; nothing is written")
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        text = f"{json.dumps(index, indent=2)}\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_config(fold: Fold, folder: Path, form: Form) -> None:
    """Write `config.json`: the task's labels included, and the 4 bits if there are any."""
    config = fold.model.config
    config.architectures = [type(fold.model).__name__]
    config.dtype = written_dtype(fold, form)
    if form.target == "quantised" and fold.base.quantisation:
        four_bit = four_bit_config(fold.base.quantisation, fold.base.held, fold.model)
        config.quantization_config = four_bit.to_dict()
    config.save_pretrained(folder)


def written_dtype(fold: Fold, form: Form) -> torch.dtype:
    """Dtype of most of what is written."""
    if form.dtype is not None:
        return form.dtype
    sizes: dict[torch.dtype, int] = {}
    for name, _ in fold.model.named_parameters():
        stored = fold.base.files(name)
        if stored is not None and stored.is_floating_point():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _shards(fold: Fold) -> list[list[str]]:
    """Names of the model's tensors by the base's file that holds them; new ones in the last.

    Raises:
        SourceError: a tensor is in no file, and the delta does not give it.
    """
    files = fold.base.files
    members: dict[Path, list[str]] = {}
    new, problems = [], []
    ties = fold.model.all_tied_weights_keys
    parameters = dict(fold.model.named_parameters(remove_duplicate=False))
    for name in fold.model.state_dict():
        found = None if name in ties else files.file(name)
        if found is not None:
            members.setdefault(found, []).append(name)
        elif name in fold.changed:
            new.append(name)
        elif name in parameters and name not in ties:
            problems.append(f"{name}: is missing from the base's files")
    if problems:
        raise SourceError(problems)
    shards = [members[path] for path in files.files if path in members]
    shards[-1].extend(new)
    return shards


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


class _Change:
    """Whether anything came out other than the base has it; looks no further once it did."""

    def __init__(self, fold: Fold) -> None:
        self._base = fold.base
        self._telling = fold.adapted or fold.changed
        self.seen = False

    def look(self, name: str, start: int, block: Tensor) -> None:
        """Compare the rows from `start` on of a changed tensor with the base's."""
        if self.seen or name not in self._telling:
            return
        if self._base.files(name) is None:
            self.seen = True
            return
        held = self._base(name)
        rows = held[start : start + len(block)] if held.ndim else held
        self.seen = not torch.equal(rows, block)


def _entries(fold: Fold, name: str, form: Form, change: _Change) -> list[Entry]:
    """What a tensor is written as: itself, or its 4 bits with their constants."""
    base = fold.base
    stored = base.files(name)
    own = written_dtype(fold, form) if stored is None else stored.dtype
    if form.target == "quantised" and base.quantisation and name in base.four_bit:
        value = torch.cat([b.clone() for b in _blocks(fold, name, base.held, change)])
        four_bit = quantised(value, base.quantisation, transposed=base.four_bit[name])
        constants = four_bit.quant_state.as_dict(packed=True)
        parts = {name: four_bit.data, **{f"{name}.{key}": p for key, p in constants.items()}}
        return [Entry.of(key, part) for key, part in parts.items()]
    if name not in fold.changed and stored is not None and not stored.is_floating_point():
        return [Entry.of(name, stored)]
    dtype = form.dtype or own
    shape = tuple(fold.model.get_parameter_or_buffer(name).shape)
    return [Entry(name, dtype, shape, partial(_blocks, fold, name, dtype, change))]


def _blocks(fold: Fold, name: str, dtype: torch.dtype, change: _Change) -> Iterator[Tensor]:
    """A tensor of the merged model in the dtype in which it is written, part by part."""
    if name not in fold.changed:
        yield fold.base.as_held(name).to(dtype)
        return
    start = 0
    for block in fold.blocks(name):
        change.look(name, start, block)
        value = block.to(dtype)
        if dtype == torch.float16 and not value.isfinite().all():
            raise RegistryError(f"{name}: holds a value that float16 cannot; take --dtype bfloat16")
        start += len(value) if value.ndim else 1
        yield value
