"""The check `runs` of `gpu_check`: recipes through the launcher, sharded, and stopped and resumed.

Each recipe trains for a few hundred steps in bf16, side by side with the others, and leaves its
record as any run does. Without dropout, whose masks depend on the precision that it runs in, three
do so once more alone, under FSDP2 with one process, and under DeepSpeed's ZeRO where that is
installed. The resumed run gets SIGTERM in the middle and is compared with the one that was left
alone, step by step.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.errors import PeftkitError
from peftkit.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("full", "top_layers", "lora", "qlora")
ALONE = [("full", "gpu_bf16"), ("lora", "gpu_bf16"), ("qlora", "gpu_bf16")]
SHARDED = [("full", "fsdp2"), ("lora", "fsdp2"), ("qlora", "fsdp2_qlora")]
"""Methods, and the file of accelerate_configs/ under which they are run without dropout."""
if importlib.util.find_spec("deepspeed"):
    SHARDED += [("lora", "zero2"), ("full", "zero3")]
STEPS, SAVE_EVERY, STOP_AFTER = 300, 50, 120
SETTINGS = (
    f"training.max_steps={STEPS}",
    f"training.save_steps={SAVE_EVERY}",
    "training.logging_steps=1",
)
TIMEOUT_SECONDS = 240
KEPT = (
    "name",
    "status",
    "error",
    "metrics",
    "distributed_type",
    "examples_per_second",
    "trainable_parameters",
    "resumed_after_step",
)
"""What is taken from a run's record."""


def check() -> dict[str, Any]:
    """What the records of the runs say, and how far the resumed run differs."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        started = {f"{method}_sst2": _start(work, f"{method}_sst2") for method in METHODS}
        for method, config in [*ALONE, *SHARDED]:
            words = (f"name={method}_{config}", "training.dropout=0.0")
            started[f"{method}_{config}"] = _start(work, f"{method}_sst2", *words, config=config)
        stopped = _start(work, "lora_sst2", "name=stopped")
        _stop_in_the_middle(stopped, work / "runs/stopped-seed0/log.jsonl")
        resumed = _start(work, "lora_sst2", "name=stopped", "--resume")
        for process in (*started.values(), resumed):
            process.wait(TIMEOUT_SECONDS)
        names = (*started, "stopped")
        logs = {name: _log(work / f"runs/{name}-seed0") for name in names}
        deltas = {name: _tensors(work, name) for name in names}
        rows = [_row(work, name, deltas[name]) for name in names]
    pairs = {"resumed": ("lora_sst2", "stopped")}
    pairs |= {f"{m}_{config}": (f"{m}_gpu_bf16", f"{m}_{config}") for m, config in SHARDED}
    return {
        "runs": rows,
        "stopped_with": stopped.returncode,
        "resumed_with": resumed.returncode,
        "differences": {
            name: _difference(logs[one], logs[other]) | _apart(deltas[one], deltas[other])
            for name, (one, other) in pairs.items()
        },
    }


def _difference(one: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    apart = [abs(one[step] - other[step]) for step in one.keys() & other.keys()]
    return {"steps": len(apart), "largest_loss_difference": max(apart, default=None)}


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    """How far two deltas differ, which must have the same tensors."""
    if not one or one.keys() != other.keys():
        return {"largest_weight_difference": None}
    apart = [float((one[key].float() - other[key].float()).abs().max()) for key in one]
    return {"largest_weight_difference": max(apart)}


def _tensors(work: Path, name: str) -> dict[str, Tensor]:
    registry = Registry(work / "registry")
    try:
        return dict(registry.read_delta(registry.find(name)).tensors)
    except PeftkitError:
        return {}


def _start(
    work: Path, recipe: str, *words: str, config: str = "gpu_bf16"
) -> subprocess.Popen[bytes]:
    arguments = [str(ROOT / f"recipes/{recipe}.yaml"), *SETTINGS, *words]
    launched = ["--config_file", str(ROOT / f"accelerate_configs/{config}.yaml")]
    launched += ["--num_processes", "1"]
    command = [sys.executable, "-m", "peftkit", "run", *arguments, "--", *launched]
    environment = {**os.environ, "PEFTKIT_REGISTRY": str(work / "registry"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=work, env=environment)


def _stop_in_the_middle(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") > STOP_AFTER:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    process.wait(TIMEOUT_SECONDS)


def _log(folder: Path) -> dict[int, float]:
    """Step → loss."""
    if not (folder / "log.jsonl").exists():
        return {}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _row(work: Path, name: str, delta: dict[str, Tensor]) -> dict[str, Any]:
    path = work / f"runs/{name}-seed0/record.json"
    if not path.exists():
        return {"name": name, "status": "failed", "error": "left no record"}
    record = json.loads(path.read_text())
    row = {key: record[key] for key in KEPT}
    row["saved_parameters"] = sum(tensor.numel() for tensor in delta.values())
    predicted = record["predicted_allocated_bytes"] or {}
    for phase, peak in record["memory"].items():
        row[f"{phase}_measured"] = peak["allocated_bytes"]
        row[f"{phase}_predicted"] = predicted.get(phase)
    return row
