"""Writing a checkpoint beside copying the same bytes.

Stands beside peftkit; drives `peftkit.training.snapshots` with an AdamW that has stepped.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_speed.py \
        --out benchmarks/results/checkpoint_speed.json

A checkpoint takes the trained parameters, the optimizer's state and the random numbers from memory,
writes, hashes, forces to disk and renames them. A copy takes the files of such a checkpoint from
the page cache, writes them to the same disk and forces each and their folder to it; it hashes
nothing, or what it has read. All in turn, each into a fresh folder, each first every other round.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from torch import nn

from peftkit.memory.meter import MemoryMeter
from peftkit.staging import fsync_path, sha256_file
from peftkit.training.checkpoints import CheckpointFolder
from peftkit.training.snapshots import Snapshots
from peftkit.training.state import TrainState
from peftkit.training.updates import AcceleratedUpdates

AIM = 1.2
MEGABYTES = {"lora": 5, "full": 440}
"""What trains: a LoRA of r 8 on all linear layers of a BERT-base, and all of it. In a checkpoint it
is three times as much, with the two moments of AdamW."""


def trained_model(megabytes: int) -> nn.Module:
    """Parameters of about this size, 2.36 MB each, or 74 kB where there are few."""
    rows = 768 if megabytes > 100 else 24
    count = round(megabytes * 1e6 / (rows * 768 * 4))
    draw = torch.Generator().manual_seed(0)
    return nn.ParameterList(
        [nn.Parameter(torch.randn(rows, 768, generator=draw)) for _ in range(count)]
    )


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with its state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def take(snapshots: Snapshots) -> None:
    """The checkpoint of a first step."""
    snapshots.take(TrainState(step=1, losses=[0.5] * 100))


def copy(source: Path, target: Path, *, hashed: bool = False) -> None:
    """Copy a folder and force it to disk."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if hashed:
            sha256_file(file)
        shutil.copyfile(file, target / file.name)
        fsync_path(target / file.name)
    fsync_path(target)
    fsync_path(target.parent)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call, with nothing of earlier ones left to be written."""
    os.sync()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def compare(work: Path, megabytes: int, rounds: int) -> dict[str, object]:
    """All arms in turn, in fresh folders."""
    accelerator, model = Accelerator(cpu=True), trained_model(megabytes)
    updates = AcceleratedUpdates(accelerator, model, stepped(model), None)
    meter = MemoryMeter(accelerator.device)
    times: dict[str, list[float]] = {"checkpoint": [], "copy": [], "copy_and_hash": []}

    def snapshots(folder: Path) -> Snapshots:
        return Snapshots(accelerator, model, updates, meter, CheckpointFolder(folder), {})

    take(snapshots(work / "source"))
    source = next((work / "source").glob("step-*"))
    for number in range(rounds):
        folder = work / str(number)
        arms = {
            "checkpoint": partial(take, snapshots(folder / "own")),
            "copy": partial(copy, source, folder / "copy"),
            "copy_and_hash": partial(copy, source, folder / "hashed", hashed=True),
        }
        for name in sorted(arms, reverse=bool(number % 2)):
            times[name].append(seconds(arms[name]))
        print({name: round(all_[-1], 3) for name, all_ in times.items()}, file=sys.stderr)
        shutil.rmtree(folder)
    size = sum(file.stat().st_size for file in source.iterdir())
    shutil.rmtree(work / "source")
    return {"bytes": size, **summary(times)}


def summary(times: dict[str, list[float]]) -> dict[str, object]:
    """Minimum and median of each arm, and the ratio of either."""
    rows = {
        name: {"minimum": round(min(all_), 4), "median": round(median(all_), 4)}
        for name, all_ in times.items()
    }
    own = rows["checkpoint"]
    ratios = {
        f"over_{name}": {kind: round(own[kind] / rows[name][kind], 3) for kind in own}
        for name in ("copy", "copy_and_hash")
    }
    return {"seconds": rows, **ratios}


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, help="a folder on the disk to be measured")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    result: dict[str, object] = {"aim": AIM, "rounds": args.rounds}
    result["torch"] = importlib.metadata.version("torch")
    for name, megabytes in MEGABYTES.items():
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            result[name] = compare(Path(folder), megabytes, args.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
