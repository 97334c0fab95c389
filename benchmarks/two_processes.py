"""Examples a second of two gloo processes on two cores, against one process pinned to one core.

Stands beside peftkit; starts `peftkit/run.py` as a launcher would and reads the runs' records.

    python benchmarks/two_processes.py --out benchmarks/results/two_processes.json

The promise: at least 1.5 times as many. Both arms train on the same optimizer steps (the effective
batch is 64: two micro-batches of one process, or one of each of two), each process with one thread
and pinned to its core. The arms take turns; the best of several rounds counts, as whatever else
the machine does only ever slows a run. Without PEFTKIT_MIRROR or the Hub the recipes take their
sample.
"""

import argparse
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = (
    "name=timed",
    "training.per_device_train_batch_size=32",
    "task.holdout_fraction=0",
)
ARMS = {"one_process": 1, "two_processes": 2}
PROMISED = 1.5


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun would set, for a process with one thread."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    ranks |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    several = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | own | (several if processes > 1 else {})


def run(recipe: Path, steps: int, processes: int) -> tuple[float, bool]:
    """Examples a second of one run, and whether its data was a sample."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        words = [*SETTINGS, f"training.max_steps={steps}"]
        words.append(f"training.gradient_accumulation_steps={2 // processes}")
        started = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "peftkit" / "run.py"), str(recipe), *words],
                cwd=folder,
                env=environment(rank, processes, port) | {"PEFTKIT_REGISTRY": f"{folder}/registry"},
                preexec_fn=lambda core=rank: os.sched_setaffinity(0, {core}),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        said = [process.communicate()[1] for process in started]
        if any(process.returncode for process in started):
            sys.exit("\n".join(said))
        record = json.loads(next(Path(folder).glob("runs/*/record.json")).read_text())
        return record["examples_per_second"], record["stand_in"]


def compare(recipe: Path, steps: int, rounds: int) -> dict[str, object]:
    """The best round of each arm, and their ratio."""
    speeds: dict[str, list[float]] = {name: [] for name in ARMS}
    sample = False
    for number in range(rounds):
        for name in sorted(ARMS, reverse=bool(number % 2)):
            speed, sample = run(recipe, steps, ARMS[name])
            speeds[name].append(round(speed, 2))
            print(f"round {number + 1}/{rounds}: {name} {speed:.1f} examples/s", file=sys.stderr)
    best = {name: max(found) for name, found in speeds.items()}
    ratio = best["two_processes"] / best["one_process"]
    return {
        "recipe": recipe.name,
        "sample": sample,
        "examples_per_second": best,
        "all_rounds": speeds,
        "ratio": round(ratio, 3),
        "kept": ratio >= PROMISED,
    }


def main() -> None:
    """Compare by LoRA, which exchanges little, and by full fine-tuning, which exchanges all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    recipes = [ROOT / "recipes" / name for name in ("lora_sst2.yaml", "full_sst2.yaml")]
    found = {
        "promised_ratio": PROMISED,
        "effective_batch": 64,
        "steps": args.steps,
        "cores": os.cpu_count(),
        "load_average_before": round(load, 2),
        "torch": importlib.metadata.version("torch"),
        "results": [compare(recipe, args.steps, args.rounds) for recipe in recipes],
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
