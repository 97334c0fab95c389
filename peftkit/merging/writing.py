"""A merged model as files that plain transformers opens, written a shard at a time.

Called by `into_base`. What a delta leaves alone goes from the base's mapped file into the new one;
one shard's changed tensors are in memory at a time.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftkit.errors import RegistryError, SourceError
from peftkit.merging.folding import Fold
from peftkit.merging.targets import Target
from peftkit.modeling.four_bit import four_bit_config, quantised
from peftkit.modeling.identity import TOKENIZER_FILES

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
    size, changed, telling = 0, False, fold.adapted or fold.changed
    for number, names in enumerate(shards, 1):
        file = _shard_name(number, len(shards))
        tensors: dict[str, Tensor] = {}
        for name in names:
            value = _value(fold, name, form)
            changed = changed or (name in telling and _differs(fold, name, value))
            tensors |= _entries(fold, name, value, form)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if not changed:
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


def _value(fold: Fold, name: str, form: Form) -> Tensor:
    """A tensor of the merged model in the dtype in which it is written or quantised."""
    if name not in fold.changed:
        value, stored = fold.base.as_held(name), fold.base.stored(name).dtype
        return value.to(form.dtype or stored) if value.is_floating_point() else value
    value = fold.tensor(name)
    stored_tensor = fold.base.files(name)
    own = written_dtype(fold, form) if stored_tensor is None else stored_tensor.dtype
    value = value.to(form.dtype or own)
    if value.dtype == torch.float16 and not value.isfinite().all():
        raise RegistryError(f"{name}: holds a value that float16 cannot; take --dtype bfloat16")
    return value


def _differs(fold: Fold, name: str, value: Tensor) -> bool:
    """Whether a tensor is another than the base's."""
    stored = fold.base.files(name)
    return stored is None or stored.shape != value.shape or not torch.equal(stored, value)


def _entries(fold: Fold, name: str, value: Tensor, form: Form) -> dict[str, Tensor]:
    """What a tensor is written as: itself, or its 4 bits with their constants."""
    base = fold.base
    if form.target != "quantised" or not base.quantisation or name not in base.four_bit:
        return {name: value.contiguous()}
    stored = quantised(value.to(base.held), base.quantisation, transposed=base.four_bit[name])
    constants = stored.quant_state.as_dict(packed=True)
    return {name: stored.data, **{f"{name}.{key}": part for key, part in constants.items()}}
