"""Saving and loading beside copying and hashing, and a store of many versions.

The arms are interleaved in one process; each figure is the minimum of the rounds. A copy reads the
same bytes, writes them, forces them to disk and hashes them; a read hashes what it read.

    python benchmarks/store_speed.py --out benchmarks/results/store_speed.json
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftkit.contracts import Delta
from peftkit.registry import DeltaInfo, Registry, RunSummary

NO_DIGEST = "sha256:" + "0" * 64


def info(kind: str) -> DeltaInfo:
    """What a run would say; none of it matters here."""
    return DeltaInfo(
        kind=kind,
        base_name="org/base",
        base_digest=NO_DIGEST,
        tokenizer_digest=NO_DIGEST,
        task={"type": "classification", "dataset": "org/data"},
        method={"type": "lora"},
        model={"auto_class": "AutoModelForSequenceClassification"},
        recipe={"name": "r"},
        recipe_digest=NO_DIGEST,
        run=RunSummary(record="record.json", seed=0, status="completed", metrics={"f1": 0.5}),
        stand_in=False,
    )


def adapter(megabytes: int, seed: int) -> Delta:
    """Random factors, 1 MB a tensor."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        f"layer.{i}.lora_A.weight": torch.randn(256, 1024, generator=draw) for i in range(megabytes)
    }
    return Delta("adapter", tensors, {"peft_type": "LORA", "r": 256})


def copied(source: Path, target: Path) -> None:
    """Copy durably and hash."""
    data = source.read_bytes()
    with target.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    hashlib.sha256(data).hexdigest()


def hashed(source: Path) -> None:
    """Read and hash."""
    hashlib.sha256(source.read_bytes()).hexdigest()


def loaded(registry: Registry, name: str) -> None:
    """Find, verify and read."""
    registry.read_delta(registry.find(name))


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def save_and_load(work: Path, *, megabytes: int, rounds: int) -> dict[str, Any]:
    """One delta of this size, saved and loaded with every byte verified."""
    registry = Registry(work / "store")
    times: dict[str, list[float]] = {"save": [], "copy": [], "load": [], "read": []}
    for number in range(rounds):
        name, delta = f"d{number}", adapter(megabytes, seed=number)
        times["save"].append(seconds(partial(registry.save, name, delta, info("adapter"))))
        file = registry.find(name).path / "adapter_model.safetensors"
        times["copy"].append(seconds(partial(copied, file, work / f"copy{number}")))
        times["load"].append(seconds(partial(loaded, registry, name)))
        times["read"].append(seconds(partial(hashed, file)))
    best = {f"{name}_seconds": min(values) for name, values in times.items()}
    return {
        "megabytes": megabytes,
        **best,
        "save_over_copy": best["save_seconds"] / best["copy_seconds"],
        "load_over_read": best["load_seconds"] / best["read_seconds"],
    }


def many_versions(work: Path, *, count: int, rounds: int) -> dict[str, Any]:
    """Listing and saving in a store of `count` versions, beside a store that is empty."""
    full, names = Registry(work / "full"), max(1, count // 100)
    for number in range(count):
        full.save(f"d{number % names}", tiny(number), info("adapter"))
    command = [sys.executable, "-m", "peftkit", "adapters", "ls", "--json"]
    environment = {**os.environ, "PEFTKIT_REGISTRY": str(full.root)}
    run = partial(subprocess.run, command, env=environment, check=True, stdout=subprocess.DEVNULL)
    run()
    listed = min(seconds(run) for _ in range(rounds))
    into_full, into_empty = [], []
    for number in range(rounds):
        empty = Registry(work / f"empty{number}")
        into_empty.append(seconds(partial(empty.save, "d", tiny(-1), info("adapter"))))
        delta = tiny(count + number)
        into_full.append(seconds(partial(full.save, "d0", delta, info("adapter"))))
    return {
        "versions": count,
        "adapters_ls_seconds": listed,
        "save_seconds": min(into_full),
        "save_into_empty_seconds": min(into_empty),
        "save_over_empty": min(into_full) / min(into_empty),
    }


def tiny(number: int) -> Delta:
    """A delta of a few bytes, another for each number."""
    return Delta(
        "adapter", {"w.lora_A.weight": torch.full((2, 2), float(number))}, {"peft_type": "LORA"}
    )


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sizes = dict.fromkeys((4, arguments.megabytes))
        found = {
            "one_delta": [
                save_and_load(_made(work / str(size)), megabytes=size, rounds=arguments.rounds)
                for size in sizes
            ],
            "many": many_versions(work, count=arguments.versions, rounds=arguments.rounds),
        }
    text = f"{json.dumps(found, indent=2)}\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
