"""The check `runs` of `gpu_check`: recipes through the launcher, and one run stopped and resumed.

Each recipe trains for a few hundred steps in bf16, side by side with the others, and leaves its
record as any run does. The resumed run gets SIGTERM in the middle and is compared with the one that
was left alone, step by step.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
METHODS = ("full", "top_layers", "lora", "qlora")
STEPS, SAVE_EVERY, STOP_AFTER = 300, 50, 120
SETTINGS = (
    f"training.max_steps={STEPS}",
    f"training.save_steps={SAVE_EVERY}",
    "training.logging_steps=1",
)
TIMEOUT_SECONDS = 240


def check() -> dict[str, Any]:
    """What the records of the runs say, and how far the resumed run differs."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        started = {method: _start(work, f"{method}_sst2") for method in METHODS}
        stopped = _start(work, "lora_sst2", "name=stopped")
        _stop_in_the_middle(stopped, work / "runs/stopped-seed0/log.jsonl")
        resumed = _start(work, "lora_sst2", "name=stopped", "--resume")
        for process in (*started.values(), resumed):
            process.wait(TIMEOUT_SECONDS)
        rows = [_row(work, f"{method}_sst2") for method in METHODS]
        alone, other = (_log(work / f"runs/{n}-seed0") for n in ("lora_sst2", "stopped"))
    return {
        "runs": rows,
        "stopped_with": stopped.returncode,
        "resumed_with": resumed.returncode,
        "resume_largest_loss_difference": max(abs(alone[s] - other[s]) for s in alone),
    }


def _start(work: Path, recipe: str, *words: str) -> subprocess.Popen[bytes]:
    arguments = [str(RECIPES / f"{recipe}.yaml"), *SETTINGS, *words]
    command = [
        sys.executable,
        "-m",
        "peftkit",
        "run",
        *arguments,
        "--",
        "--mixed_precision",
        "bf16",
    ]
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
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _row(work: Path, name: str) -> dict[str, Any]:
    record = json.loads((work / f"runs/{name}-seed0/record.json").read_text())
    kept = ("name", "status", "error", "metrics", "tokens_per_second", "examples_per_second")
    row = {key: record[key] for key in kept}
    predicted = record["predicted_allocated_bytes"] or {}
    for phase, peak in record["memory"].items():
        row[f"{phase}_measured"] = peak["allocated_bytes"]
        row[f"{phase}_predicted"] = predicted.get(phase)
    return row
