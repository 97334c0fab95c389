"""Compare learning rates of recipes on the part held out of train, never on validation.

Every recipe gets the same number of rates. One JSON line a run goes to `--out`; runs that are
already there are not repeated. The registry and the run folders go to `--work`.

    python benchmarks/tune_learning_rates.py --work tuning --out rates.jsonl RECIPE=RATE,RATE ...
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


def finished(out: Path) -> set[tuple[str, float, int]]:
    """Recipe, rate and seed of the runs that `out` holds."""
    if not out.exists():
        return set()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {(row["recipe"], row["learning_rate"], row["seed"]) for row in rows}


def run(recipe: str, rate: str, args: argparse.Namespace) -> dict:
    """Train once; what is kept of the record has no validation score."""
    name = f"{Path(recipe).stem}_{rate}".lower()
    words = [f"training.learning_rate={rate}", f"name={name}", f"seed={args.seed}"]
    words += [f"output_dir={args.work / 'runs'}", *args.override, "--overwrite"]
    environment = {**os.environ, "PEFTKIT_REGISTRY": str(args.work / "registry")}
    command = [sys.executable, "peftkit/run.py", recipe, *words]
    subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL)
    folder = args.work / "runs" / f"{name}-seed{args.seed}"
    record = json.loads((folder / "record.json").read_text())
    return {
        "recipe": recipe,
        "learning_rate": float(rate),
        "seed": args.seed,
        "overrides": args.override,
        "status": record["status"],
        "holdout": record["metrics"].get("holdout"),
        "train_seconds": record["seconds"]["train"],
    }


def main() -> None:
    """Run every recipe at every rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="RECIPE=RATE,RATE,…")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", action="append", default=[], metavar="key=value")
    args = parser.parse_args()
    plan = [
        (r, rate)
        for r, _, rates in (p.partition("=") for p in args.pairs)
        for rate in rates.split(",")
    ]
    counts = {r: sum(recipe == r for recipe, _ in plan) for r, _ in plan}
    if len(set(counts.values())) > 1:
        parser.error(f"every recipe needs the same number of rates, found {counts}")
    for recipe, rate in plan:
        if (recipe, float(rate), args.seed) not in finished(args.out):
            line = json.dumps(run(recipe, rate, args))
            with args.out.open("a") as stream:
                stream.write(f"{line}\n")


if __name__ == "__main__":
    main()
