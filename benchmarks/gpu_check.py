"""Everything about peftkit that only a GPU can show, in one command and one JSON file.

Stands beside peftkit; each check runs in a process of its own, and one that fails is a row with
its reason. Without CUDA it says so and stops.

    python benchmarks/gpu_check.py --out benchmarks/results/gpu_check.json
    python benchmarks/gpu_check.py --only precision planner

`workspaces`: what cuBLAS takes beside the tensors. `planner`: predicted against
`max_memory_allocated` over architectures, methods and shapes. `large`: an 8B Llama of random
weights under LoRA and top layers in bf16 and QLoRA in NF4, and a 1B under full fine-tuning: memory,
tokens/s, and the share of the matrix rate that this GPU reaches. `precision`: how far accumulation,
recomputation and 16 bits move the loss. `runs`: the four recipes on real data through the launcher,
one of them stopped and resumed.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_large
import gpu_precision
import gpu_runs
import planner_accuracy
import torch

from peftkit.reporting.environment import device_description, git_state, library_versions


def workspaces() -> dict[str, Any]:
    """Bytes that stay allocated after products whose tensors are gone, by thread and dtype."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        layer = torch.nn.Linear(512, 512, dtype=dtype, device="cuda")
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            layer(torch.ones(64, 512, dtype=dtype, device="cuda"))
        found[f"{name}_forward"] = torch.cuda.memory_allocated() - before
        layer(torch.ones(64, 512, dtype=dtype, device="cuda")).sum().backward()
        gradients = sum(p.grad.nbytes for p in layer.parameters())
        found[f"{name}_with_backward"] = torch.cuda.memory_allocated() - before - gradients
    return found


def planner() -> dict[str, Any]:
    """All cells of `planner_accuracy` at the width of BERT-base, half as deep."""
    where = planner_accuracy.Where("cuda", "bf16", width=768, depth=6)
    cells = planner_accuracy.all_cells(where, set(), jobs=14)
    return {"summary": planner_accuracy.summarised(cells), "cells": cells}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "workspaces": workspaces,
    "planner": planner,
    "precision": gpu_precision.check,
    "large": gpu_large.check,
    "runs": gpu_runs.check,
}


def _in_child(name: str, queue: Any) -> None:
    try:
        queue.put({"status": "completed", **CHECKS[name]()})
    except BaseException as error:  # a failed check is a row
        traceback.print_exc()
        queue.put({"status": "failed", "error": f"{type(error).__name__}: {error}"})


def checked(name: str) -> dict[str, Any]:
    """One check in a process of its own, with the seconds that it took."""
    started = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    child = spawn.Process(target=_in_child, args=(name, queue))
    child.start()
    while child.is_alive() and queue.empty():
        time.sleep(0.1)
    found = {"status": "failed", "error": f"ended with code {child.exitcode}"}
    if not queue.empty():
        found = queue.get()
    child.join()
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Run the checks in turn; write the file after each, so that nothing is lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=tuple(CHECKS), default=tuple(CHECKS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device here; nothing was checked")
    commit, dirty = git_state(Path.cwd())
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, Any] = {
        "device": device_description(torch.device("cuda")),
        "driver": driver.stdout.strip(),
        "libraries": library_versions(),
        "git_commit": commit,
        "git_dirty": dirty,
        "checks": {},
    }
    for name in arguments.only:
        found["checks"][name] = checked(name)
        shown = {k: v for k, v in found["checks"][name].items() if k != "cells"}
        print(json.dumps({name: shown}, indent=1), flush=True)
        if arguments.out:
            arguments.out.write_text(f"{json.dumps(found, indent=1)}\n")


if __name__ == "__main__":
    main()
