"""How large a full fine-tune is as a difference to its base, of the checkpoint's size.

    python benchmarks/delta_size.py BASE TRAINED.safetensors --out FILE.json

`TRAINED` holds the trained tensors by their names in the model, as a checkpoint or a delta does. In
bfloat16 both sides are rounded first, as a run that trains in bfloat16 would have them.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from peftkit.contracts import Delta
from peftkit.modeling.base_tensors import BaseTensors
from peftkit.registry.tensors import delta_from_files, delta_to_files


def measured(trained: dict[str, Tensor], base: BaseTensors, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes in bytes, seconds, and whether every bit came back."""
    delta = Delta("weights", {name: tensor.to(dtype) for name, tensor in trained.items()})

    def held(name: str) -> Tensor | None:
        found = base(name)
        return None if found is None else found.to(dtype)

    started = time.perf_counter()
    files = delta_to_files(delta, base=held)
    encoded = time.perf_counter()
    back = delta_from_files("weights", files, base=held).tensors
    decoded = time.perf_counter()
    whole = sum(tensor.nbytes for tensor in delta.tensors.values())
    stored = sum(map(len, files.values()))
    return {
        "checkpoint_bytes": whole,
        "delta_bytes": stored,
        "share": stored / whole,
        "encode_seconds": encoded - started,
        "decode_seconds": decoded - encoded,
        "bit_equal": all(torch.equal(back[name], delta.tensors[name]) for name in back),
    }


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    trained, base = load_file(arguments.trained), BaseTensors(arguments.base)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found = {name: measured(trained, base, dtype) for name, dtype in dtypes.items()}
    text = f"{json.dumps(found, indent=2)}\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
