"""Folding a LoRA into a sharded base of over 2 GB: peftkit beside PEFT's own way.

Both start from the same files and end in files: PEFT loads the base, puts the adapter on it, calls
`merge_and_unload` and `save_pretrained`; peftkit folds shard by shard. The arms are interleaved in
one process. The result of each is compared tensor by tensor. peftkit's verification, which PEFT
does not do, is timed apart.

    python benchmarks/merge_speed.py --out benchmarks/results/merge_speed.json
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
}
SHARD = "300MB"


def make_base(folder: Path, layers: int) -> Path:
    """A Llama with random weights in float32, in shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": layers})
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=SHARD)
    return folder


def make_adapter(base: Path, folder: Path, rank: int) -> Path:
    """A LoRA with random factors on every linear layer of the blocks, as PEFT's files."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(folder)
    return folder


def with_peft(base: Path, adapter: Path, target: Path) -> float:
    """Seconds of `merge_and_unload` and `save_pretrained` alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    started = time.perf_counter()
    model.merge_and_unload().save_pretrained(target, max_shard_size=SHARD)
    return time.perf_counter() - started


def fold_of(base: Path, adapter: Path) -> Any:
    """The stored form of the adapter is left out: both arms read PEFT's files."""
    from safetensors.torch import load_file

    from peftkit.contracts import Delta
    from peftkit.merging.folding import Fold
    from peftkit.merging.held_base import HeldBase
    from peftkit.registry import DeltaInfo

    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    delta = Delta("adapter", load_file(adapter / "adapter_model.safetensors"), settings)
    model = {"auto_class": "AutoModelForCausalLM", "config": {}, "dropout": None, "frozen": True}
    info = DeltaInfo.model_construct(model=model | {"mixed_precision": "no"}, quantisation=None)
    return Fold(base, info, delta, HeldBase(base, info))


def with_peftkit(base: Path, adapter: Path, target: Path) -> float:
    """Seconds of folding and writing alone."""
    from peftkit.merging.writing import Form, write_model

    fold = fold_of(base, adapter)
    target.mkdir()
    started = time.perf_counter()
    write_model(fold, base, target, Form())
    return time.perf_counter() - started


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most anonymous memory above that at the start, sampled every 5 ms."""

    def __enter__(self) -> "Peak":
        self._start, self.bytes, self._done = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)


def largest_difference(a: Path, b: Path) -> float:
    """Between the tensors of two folders, which must have the same names."""
    from peftkit.modeling.base_tensors import BaseTensors

    left, right = BaseTensors(a), BaseTensors(b)
    names = left.names()
    assert names == right.names()
    return max(float((left(name) - right(name)).abs().max()) for name in names)


def timed(arm: Callable[[Path, Path, Path], float], *paths: Path) -> dict[str, float]:
    """Seconds from files to files, of the merge alone, and peak memory in bytes."""
    base, adapter, target = paths
    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    with Peak() as peak:
        alone = arm(base, adapter, target)
    total = time.perf_counter() - started
    return {"total_seconds": total, "merge_seconds": alone, "peak_extra_bytes": float(peak.bytes)}


def measure(work: Path, *, rounds: int, layers: int, rank: int) -> dict[str, Any]:
    """The minimum of each figure over the rounds."""
    base = make_base(work / "base", layers)
    adapter = make_adapter(base, work / "adapter", rank)
    arms = {"peft": with_peft, "peftkit": with_peftkit}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            runs[name].append(timed(arm, base, adapter, work / name))
    found: dict[str, Any] = {
        name: {key: min(run[key] for run in rows) for key in rows[0]} for name, rows in runs.items()
    }
    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    own, other = found["peftkit"], found["peft"]
    return {
        **found,
        "base_bytes": sum(shards),
        "shards": len(shards),
        "largest_shard_bytes": max(shards),
        "peft_over_peftkit_total": other["total_seconds"] / own["total_seconds"],
        "peft_over_peftkit_merge": other["merge_seconds"] / own["merge_seconds"],
        "largest_difference": largest_difference(work / "peft", work / "peftkit"),
        "rounds": rounds,
        "rank": rank,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder), rounds=arguments.rounds, layers=arguments.layers, rank=arguments.rank
        )
    text = f"{json.dumps(found, indent=2)}\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
