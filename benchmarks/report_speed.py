"""How long `peftkit report` takes over many records, and how large its page is.

Writes records of a search: recipes with three seeds, each run with per-example predictions. Two
layouts: all on one validation set, where every pair of recipes is tested, and one recipe a record.

    python benchmarks/report_speed.py --records 1000 --json benchmarks/results/report_speed.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from peftkit.reporting.environment import device_description, library_versions
from peftkit.reporting.predictions import write_predictions
from peftkit.reporting.record import RunRecord, read_record, write_record

EXAMPLES = 872
TEMPLATE = Path(__file__).parent / "results" / "runs" / "lora_sst2-seed0" / "record.json"


def records(count: int, seeds: int) -> list[RunRecord]:
    """Runs of `count / seeds` recipes, which differ in rank and learning rate."""
    template = read_record(TEMPLATE)
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        arm, seed = divmod(number, seeds)
        name = f"lora_sst2_r{2 ** (arm % 6)}_search_{arm:03d}"
        recipe = json.loads(json.dumps(template.recipe)) | {"name": name, "seed": seed}
        recipe["method"]["r"] = 2 ** (arm % 6)
        recipe["training"]["learning_rate"] = 1e-5 * (arm + 1)
        started = template.started + timedelta(minutes=60 * number)
        peak = int(rng.uniform(2, 9) * 1e8)
        memory = {
            phase: peaks.model_copy(update={"allocated_bytes": peak // (1 + place)})
            for place, (phase, peaks) in enumerate(reversed(template.memory.items()))
        }
        changes = {
            "name": name,
            "recipe": recipe,
            "seed": seed,
            "memory": memory,
            "started": started,
            "finished": started + timedelta(minutes=30),
            "delta_bytes": int(rng.uniform(1, 90) * 1e6),
        }
        made.append(template.model_copy(update=changes))
    return made


def write_runs(folder: Path, made: list[RunRecord]) -> None:
    """Each record with predictions whose accuracy it states."""
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=EXAMPLES)
    difficulty = rng.normal(2.5, 2, size=EXAMPLES)
    for number, record in enumerate(made):
        right = rng.normal(size=EXAMPLES) < difficulty
        run = folder / f"run{number:04d}"
        run.mkdir()
        predictions = np.where(right, labels, 1 - labels)
        write_predictions(run / "predictions.parquet", {"label": labels, "prediction": predictions})
        scores = {"validation": {"accuracy": float(right.mean())}}
        write_record(run / "record.json", record.model_copy(update={"metrics": scores}))


def measured(runs: Path, out: Path) -> dict[str, float]:
    """Seconds of a whole `peftkit report`, start of the interpreter included, and bytes written."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "peftkit", "report", str(runs), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    sizes = {f"{p.suffix[1:]}_bytes": p.stat().st_size for p in sorted(out.iterdir())}
    return {"seconds": round(seconds, 2), **sizes}


def main() -> None:
    """Measure both layouts, three times each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {
        "records": arguments.records,
        "examples": EXAMPLES,
        "device": device_description(),
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "libraries": library_versions(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for seeds in (3, 1):
        with tempfile.TemporaryDirectory() as folder:
            runs = Path(folder) / "runs"
            runs.mkdir()
            write_runs(runs, records(arguments.records, seeds))
            times = [measured(runs, Path(folder) / "out") for _ in range(3)]
            result[f"{seeds}_seeds"] = times
            print(f"{seeds} seeds:", *times, sep="\n  ")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
